"""Names of nodes that survive unrelated changes: no shapes, no counters over the whole graph.

``blocks.3.attn/linear#2`` is the second linear of the module ``blocks.3.attn``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from fxport.capture.inputs import GraphInput
from fxport.capture.location import module_of

__all__ = ["argument_text", "module_near", "op_name", "stable_names", "target_text"]


def stable_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """One name per node, in graph order."""
    names: dict[fx.Node, str] = {}
    counts: Counter[str] = Counter()
    modules: dict[fx.Node, str] = {}
    for node in graph.nodes:
        base = _base(node, modules)
        counts[base] += 1
        names[node] = base if counts[base] == 1 else f"{base}#{counts[base]}"
    return names


def module_near(node: fx.Node, known: dict[fx.Node, str]) -> str:
    """The user's module of a node; a node that a pass made belongs where its inputs do."""
    if node not in known:
        inputs = [known.get(n, "") for n in node.all_input_nodes if n.op != "placeholder"]
        known[node] = module_of(node) or next((m for m in reversed(inputs) if m), "")
    return known[node]


def op_name(target: Any) -> str:
    """``softmax`` for ``aten.softmax.int``."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.split("::")[-1])
    return str(getattr(target, "__name__", target))


def target_text(node: fx.Node) -> str:
    """``aten.softmax.int``; the qualified name for an input."""
    known = node.meta.get("input")
    if isinstance(known, GraphInput):
        return known.name
    if isinstance(node.target, torch._ops.OpOverload | str):
        return str(node.target)
    return op_name(node.target)


def argument_text(value: Any, names: dict[fx.Node, str]) -> str:
    """An argument with nodes under their stable names."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(argument_text(v, names) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {argument_text(v, names)}' for k, v in value.items())}}}"
    return repr(value)


def _base(node: fx.Node, modules: dict[fx.Node, str]) -> str:
    if node.op == "output":
        return "output"
    if node.op in ("placeholder", "get_attr"):
        return target_text(node)
    module = module_near(node, modules)
    return f"{module}/{op_name(node.target)}" if module else op_name(node.target)
