"""Which values of a graph are constants, and what they are at given sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from fxport.capture.inputs import InputKind, graph_input

__all__ = ["depends_on", "evaluate", "is_symbolic"]

Sizes = Mapping[sympy.Symbol, int]


def depends_on(gm: fx.GraphModule, *kinds: InputKind) -> set[fx.Node]:
    """Nodes whose value depends on a placeholder of one of these kinds.

    Sizes do not count: ``x.shape[1]`` of a data tensor is not data.
    """
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if graph_input(node).kind in kinds:
                found.add(node)
        elif not is_symbolic(node) and any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def is_symbolic(node: fx.Node) -> bool:
    """Whether the node computes a size rather than a tensor."""
    return isinstance(
        node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool
    )


def evaluate(node: fx.Node, sizes: Sizes, known: dict[fx.Node, Any] | None = None) -> Any:
    """The real value of a node that depends on buffers and sizes only.

    Args:
        node: must not depend on data or parameters.
        sizes: a number for every symbol that occurs.
        known: values already computed for these sizes; filled further.

    Raises:
        ValueError: when the node depends on something that has no value.
    """
    values = {} if known is None else known
    pending = [node]
    while pending:
        current = pending[-1]
        if current in values:
            pending.pop()
            continue
        if is_symbolic(current):
            values[current] = _size(current.meta["val"], sizes)
            continue
        missing = [n for n in current.all_input_nodes if n not in values]
        if missing:
            pending.extend(missing)
            continue
        values[current] = _run(current, values)
    return values[node]


def _size(value: Any, sizes: Sizes) -> Any:
    if isinstance(value, int | float | bool):
        return value
    result = value.node.expr.subs(dict(sizes))
    if result.free_symbols:
        raise ValueError(f"no value for {result.free_symbols}")
    if isinstance(value, torch.SymInt):
        return int(result)
    return float(result) if isinstance(value, torch.SymFloat) else bool(result)


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.op == "placeholder":
        source = graph_input(node)
        if source.kind is not InputKind.BUFFER or source.value is None:
            raise ValueError(f"`{source.name}` is not a constant")
        return source.value
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(node.graph.owning_module)
    if node.op != "call_function":
        raise ValueError(f"`{node.format_node()}` cannot be evaluated")
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    with torch.no_grad():
        return target(*args, **kwargs)
