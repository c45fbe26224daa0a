"""Real values of constant nodes, outside whatever tracing is going on around us."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.views import overload_packet
from fxport.passes.constants import Sizes, evaluate, is_symbolic
from fxport.passes.graph_facts import value_inputs

__all__ = ["constant_value"]

aten = torch.ops.aten


def constant_value(node: fx.Node, sizes: Sizes, known: dict[fx.Node, Any] | None = None) -> Any:
    """`evaluate`, on real tensors even while a compiler holds fake ones.

    Raises:
        ValueError: the node has no constant value.
    """
    known = {} if known is None else known
    with _disable_current_modes():
        for lent in _lending(node):
            if lent not in known:
                known[lent] = _from_shape(lent, sizes, known)
        return evaluate(node, sizes, known)


def _lending(node: fx.Node) -> list[fx.Node]:
    """Nodes behind `node` that take a shape from a tensor without a value; inner ones first."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in seen or is_symbolic(current):
            continue
        seen.add(current)
        inputs = value_inputs(current)
        if len(inputs) != len(current.all_input_nodes):
            found.add(current)
        pending.extend(inputs)
    return sorted(found)


def _from_shape(node: fx.Node, sizes: Sizes, known: dict[fx.Node, Any]) -> torch.Tensor:
    shape = [s if isinstance(s, int) else _number(s, sizes) for s in shape_of(node)]
    dtype, device = node.meta["val"].dtype, node.meta["val"].device
    packet = overload_packet(node)
    if packet in (aten.ones_like, aten.new_ones):
        return torch.ones(shape, dtype=dtype, device=device)
    if packet in (aten.zeros_like, aten.new_zeros):
        return torch.zeros(shape, dtype=dtype, device=device)
    if packet in (aten.full_like, aten.new_full):
        fill: Any = arguments(node)["fill_value"]
        if isinstance(fill, fx.Node):
            fill = evaluate(fill, sizes, known)
        return torch.full(shape, fill, dtype=dtype, device=device)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value: torch.Tensor = evaluate(source, sizes, known)
    if packet is aten.type_as:
        return value.to(dtype)
    return value.expand(shape) if packet is aten.expand_as else value.reshape(shape)


def _number(size: sympy.Expr, sizes: Sizes) -> int:
    found = size.subs(dict(sizes))
    if not found.is_Integer:
        raise ValueError(f"the size {size} is not known")
    return int(found)
