"""Whole numbers that every entry of a tensor is, told from how the tensor is made.

(torch.full((B,), T) - 1).view(B, 1, 1).expand(B, 1, C)        T - 1
torch.ones_like(ids).sum(1, keepdim=True) - 1                  T - 1
torch.tensor([h.shape[1] - 1])                                 T - 1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.attention.views import overload_packet

__all__ = ["every_entry"]

aten = torch.ops.aten

_WHOLE = (torch.int64, torch.int32)


def every_entry(value: Any) -> sympy.Expr | None:
    """The one number in a tensor of integers, or the size that an argument is; None if unknown.

    Nothing may be written to in place on the way.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return sympy.Integer(value)
    if not isinstance(value, fx.Node):
        return None
    made = value.meta.get("val")
    if isinstance(made, int | torch.SymInt):
        return made.node.expr if isinstance(made, torch.SymInt) else every_entry(made)
    if not isinstance(made, torch.Tensor):
        return None
    if value.op in ("placeholder", "get_attr"):
        return _stored(value)
    rule = _RULES.get(overload_packet(value))
    if rule is None or made.dtype not in (*_WHOLE, torch.bool):
        return None
    return rule(value)


def _stored(node: fx.Node) -> sympy.Expr | None:
    if node.op != "placeholder" or graph_input(node).kind is not InputKind.BUFFER:
        return None
    held = graph_input(node).value
    if held is None or held.dtype not in _WHOLE or held.is_meta or not held.numel():
        return None
    first = held.flatten()[0]
    return sympy.Integer(int(first)) if bool((held == first).all()) else None


def _filled(name: str) -> Callable[[fx.Node], sympy.Expr | None]:
    return lambda node: every_entry(arguments(node)[name])


def _same(node: fx.Node) -> sympy.Expr | None:
    """Whatever is taken out of it, repeated, or put into another shape."""
    source = node.all_input_nodes[0]
    kept = source.meta["val"].dtype in (node.meta["val"].dtype, *_WHOLE)
    return every_entry(source) if kept and node.meta["val"].dtype in _WHOLE else None


def _joined(node: fx.Node) -> sympy.Expr | None:
    found = [every_entry(part) for part in arguments(node)["tensors"]]
    return found[0] if all(f is not None and f == found[0] for f in found) else None


def _sum(sign: int) -> Callable[[fx.Node], sympy.Expr | None]:
    def rule(node: fx.Node) -> sympy.Expr | None:
        given = arguments(node)
        one, other = every_entry(given["self"]), every_entry(given["other"])
        plain = given.get("alpha", 1) == 1 and node.meta["val"].dtype in _WHOLE
        return one + sign * other if plain and one is not None and other is not None else None

    return rule


def _total(node: fx.Node) -> sympy.Expr | None:
    """A sum along some axes; ones may be truth values."""
    given = arguments(node)
    source, dims = given["self"], given.get("dim")
    one = every_entry(source)
    shape = shape_of(source)
    axes = range(len(shape)) if not dims and dims != 0 else dims
    if one is None or node.meta["val"].dtype != torch.int64:
        return None
    for axis in [axes] if isinstance(axes, int) else axes:
        one = one * shape[axis]
    return one


_MOVES = (
    aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.alias, aten.detach, aten.detach_,
    aten.lift_fresh_copy, aten.expand, aten.expand_as, aten.broadcast_to, aten.view, aten.reshape,
    aten.unsqueeze, aten.squeeze, aten.repeat, aten.flatten,
)  # fmt: skip
_RULES: dict[Any, Callable[[fx.Node], sympy.Expr | None]] = {
    **dict.fromkeys(_MOVES, _same),
    **dict.fromkeys((aten.full, aten.new_full, aten.full_like), _filled("fill_value")),
    aten.scalar_tensor: _filled("s"),
    **dict.fromkeys((aten.ones, aten.ones_like, aten.new_ones), lambda node: sympy.Integer(1)),
    **dict.fromkeys((aten.zeros, aten.zeros_like, aten.new_zeros), lambda node: sympy.Integer(0)),
    **dict.fromkeys((aten.stack, aten.cat), _joined),
    aten.add: _sum(1),
    aten.sub: _sum(-1),
    aten.sum: _total,
}
