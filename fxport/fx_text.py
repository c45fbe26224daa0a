"""A graph as text that survives unrelated changes: no shapes, no counters over the whole graph.

    h.0.attn/softmax = aten.softmax.int(h.0.attn/masked_fill, -1)

A node is named after the user's module it belongs to and its operation; the second of its kind
within one module gets ``#2``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from fxport.capture.inputs import GraphInput
from fxport.capture.location import module_of

__all__ = ["graph_text"]


def graph_text(graph: fx.GraphModule | fx.Graph) -> str:
    """One line per node."""
    if isinstance(graph, fx.GraphModule):
        graph = graph.graph
    names: dict[fx.Node, str] = {}
    counts: Counter[str] = Counter()
    lines = []
    for node in graph.nodes:
        base = _base(node)
        counts[base] += 1
        names[node] = base if counts[base] == 1 else f"{base}#{counts[base]}"
        args = [_argument(a, names) for a in node.args]
        args += [f"{key}={_argument(a, names)}" for key, a in node.kwargs.items()]
        if node.op == "output":
            lines.append(f"return {', '.join(args)}")
        elif node.op == "placeholder":
            lines.append(f"input {names[node]}")
        else:
            lines.append(f"{names[node]} = {_target(node.target)}({', '.join(args)})")
    return "\n".join(lines)


def _base(node: fx.Node) -> str:
    known = node.meta.get("input")
    if isinstance(known, GraphInput):
        return known.name
    if node.op in ("placeholder", "get_attr"):
        return str(node.target)
    module = module_of(node)
    return f"{module}/{_short(node.target)}" if module else _short(node.target)


def _short(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.split("::")[-1])
    return str(getattr(target, "__name__", target))


def _target(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else _short(target)


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(v, names) for v in value)}]"
    return repr(value)
