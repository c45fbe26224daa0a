"""Positions counted from the last token: what the length adds to them, and where it matters not.

    p = arange(1 - T, 1)                    j, and 1 - T in every entry
    p[None] - p[:, None]                    it cancels: j - i
    p[None] >= p[:, None]                   the same on both sides
    scores + slopes * p                     one number for all keys of a head, which a softmax over
                                            these keys alone does not see
    scores + table[:, -T:]                  the same, if the table is linear

Followed through sums, differences and products with constants that do not grow with the length.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.views import CASTS, SCALES, moved_input, overload_packet
from fxport.passes.masks.slopes import FINE
from fxport.passes.masks.values import constant_value

__all__ = ["counts_from_end", "length_free", "without_constant"]

aten = torch.ops.aten

_SUMS = {aten.add, aten.sub, aten.rsub}
_CUTS = {aten.slice, aten.select, aten.narrow}
_COMPARISONS = {aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge}
_FOLLOWED = {*_SUMS, *_COMPARISONS, aten.arange, aten.slice}
# In these, the same number more in every entry rounds nothing away.
_WIDE = {torch.float64, torch.float32, torch.int64, torch.int32}
# A number for each head, which is not named.
_SOME = sympy.Symbol("some_number")
_NOTHING = sympy.Integer(0)


def length_free(
    nodes: Sequence[fx.Node], masks: Sequence[fx.Node], added: Collection[fx.Node]
) -> frozenset[fx.Node]:
    """Which of `nodes` are given lengths as numbers that do not matter; none if some may.

    Args:
        nodes: `masks` and all that they are made of.
        added: those to which a number may be added for each head.
    """
    parts: dict[fx.Node, sympy.Expr] = {}
    for node in sorted(nodes):
        part = _part(node, parts)
        if part is None or (part != 0 and node.meta["val"].dtype not in _WIDE):
            return frozenset()
        parts[node] = part
    if any(parts[mask] != 0 and mask not in added for mask in masks):
        return frozenset()
    return frozenset(n for n in nodes if overload_packet(n) in _FOLLOWED)


def counts_from_end(given: dict[str, Any]) -> bool:
    """Whether a cut with these arguments begins at a place that moves with the length: ``[-5:]``.

    ``[T - 5:]`` has a size for its place.
    """
    table, start = given["self"], given.get("start", given.get("index"))
    along = shape_of(table)[given["dim"]]
    if isinstance(start, fx.Node) and without_constant(start)[0] == 0:
        start = int(without_constant(start)[1])
    moves = isinstance(given.get("step"), fx.Node)
    return moves or (isinstance(start, int) and start < 0 and not isinstance(along, int))


def without_constant(size: fx.Node) -> tuple[sympy.Expr, float]:
    """A size as what varies in it, and the number that is added to that."""
    value = size.meta["val"]
    if isinstance(value, int | float):
        return _NOTHING, float(value)
    constant, rest = value.node.expr.as_coeff_Add()
    return rest, float(constant)


def _part(node: fx.Node, parts: dict[fx.Node, sympy.Expr]) -> sympy.Expr | None:
    """What the length adds to every entry; None when it does something else."""
    packet = overload_packet(node)
    given = {} if packet is None else arguments(node)
    if packet is aten.arange:
        return None if isinstance(given.get("step"), fx.Node) else _of(given.get("start"), parts)
    if packet in _CUTS and counts_from_end(given):
        return None
    if packet is aten.slice and _of(given["start"], parts) != 0:
        return _SOME if _is_linear(given) else None
    if packet in _SUMS or packet in _COMPARISONS:
        one, other = (_of(v, parts) for v in list(given.values())[:2])
        if packet in _SUMS and given.get("alpha", 1) != 1:
            return _NOTHING if one == other == 0 else None
        if packet is aten.rsub:
            one, other = other, one
        found = _sum(one, other, 1 if packet is aten.add else -1)
        return found if packet in _SUMS or found == 0 else None
    inside = [parts[n] for n in node.all_input_nodes if n in parts]
    if all(part == 0 for part in inside):
        return _NOTHING
    if packet is aten.neg or packet in SCALES:
        return _SOME if _is_scaled(node, parts) else None
    moved = packet in CASTS or moved_input(node) is not None
    return inside[0] if moved and len(inside) == 1 else None


def _of(value: Any, parts: dict[fx.Node, sympy.Expr]) -> sympy.Expr:
    """What varies with the length in an operand: a tensor, a size, or a number."""
    if not isinstance(value, fx.Node):
        return _NOTHING
    return parts[value] if value in parts else without_constant(value)[0]


def _sum(one: sympy.Expr, other: sympy.Expr, sign: int) -> sympy.Expr:
    return _SOME if _SOME in (one, other) else one + sign * other


def _is_scaled(node: fx.Node, parts: dict[fx.Node, sympy.Expr]) -> bool:
    """Whether the only operand with a part of the length meets numbers, or one for each head."""
    first, *others = node.args
    if overload_packet(node) is aten.mul and others and _of(others[0], parts) != 0:
        first, others = others[0], [first]
    return (
        all(
            isinstance(v, int | float)
            or (isinstance(v, fx.Node) and v in parts and parts[v] == 0 and _is_static(v))
            for v in others
        )
        and not node.kwargs
    )


def _is_static(node: fx.Node) -> bool:
    return all(isinstance(size, int) for size in shape_of(node))


def _is_linear(given: dict[str, Any]) -> bool:
    """Whether a stored table that is cut here grows by the same from entry to entry."""
    table = given["self"]
    if given["step"] != 1 or not _is_static(table):
        return False
    try:
        values = constant_value(table, {}).double().movedim(given["dim"], -1)
    except ValueError:  # a size enters it
        return False
    ends = values[..., :1], values[..., -1:]
    steps = torch.linspace(0, 1, values.shape[-1], dtype=torch.float64)
    off = (values - torch.lerp(*ends, steps)).abs().max()
    return bool(off <= 8 * FINE * values.abs().max())
