"""Tensors of whole numbers whose entries are ``offset + sum_k slope_k * index_k``, for every size.

    p = arange(T)[None] + 3        offset 3, slopes (0, 1)
    p[:, 1:] - p[:, :-1]           offset 1, slopes (0, 0): one number

Nothing is evaluated. A rule says of an operation what it makes of such values, or nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.attention.views import overload_packet
from fxport.passes.size_bounds import decided

__all__ = ["FACTORIES", "Affine", "affine_value", "stored_value"]

aten = torch.ops.aten

_INTEGERS = (torch.int64, torch.int32, torch.bool)
_EXACT = 256  # whole numbers up to here are exact in every floating dtype
# What is counted stays exact in these: below 2**24 with such slopes, for 2**20 tokens.
_WIDE, _STEEP, _FAR = (torch.float32, torch.float64), 8, 2**20


@dataclass(frozen=True)
class Affine:
    """A tensor of whole numbers: entry ``[i_0, i_1, ..]`` is ``offset + sum(slope_k * i_k)``.

    Attributes:
        counted: a running sum has made it.
    """

    offset: int
    slopes: tuple[int, ...]
    counted: bool = False

    @property
    def number(self) -> int | None:
        """What every entry is, if they are all the same."""
        return self.offset if not any(self.slopes) else None

    @property
    def is_replaced(self) -> bool:
        """Plain positions stay: only counted ones are made plain."""
        return self.number is not None or (self.counted and sum(map(bool, self.slopes)) == 1)


def stored_value(node: fx.Node) -> Affine | None:
    """What a placeholder holds, if that is a buffer of such whole numbers."""
    source = graph_input(node)
    table = source.value
    if source.kind is not InputKind.BUFFER or table is None or table.is_meta:
        return None
    if table.dtype not in (torch.int64, torch.int32) or not 0 < table.numel() <= _FAR:
        return None
    with _disable_current_modes():
        first = table[(0,) * table.dim()]
        slopes = [
            int(table.movedim(dim, 0)[(1, *(0,) * (table.dim() - 1))] - first) if size > 1 else 0
            for dim, size in enumerate(table.shape)
        ]
        expected = first
        for slope, size in zip(slopes, table.shape, strict=True):
            expected = expected[..., None] + slope * torch.arange(size, device=table.device)
        return Affine(int(first), tuple(slopes)) if bool((table == expected).all()) else None


def affine_value(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    """What a tensor holds, by what is known of its inputs; None: something else.

    Args:
        known: by node; of what is written to in place, nothing may be known.
    """
    rule = _RULES.get(overload_packet(node))
    found = None if rule is None else rule(node, known)
    if found is None:
        return None
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        return None if found.number is None else replace(found, offset=int(bool(found.number)))
    if dtype in _INTEGERS:
        return found
    if dtype in _WIDE and found.counted:
        small = abs(found.offset) <= _FAR and max(map(abs, found.slopes)) <= _STEEP
        return found if small else None
    # Else floating point is passed on, and nothing computed; bytes wrap around.
    passed_on = overload_packet(node) in FACTORIES or rule in _PASSING_ON
    exact = found.number is not None and abs(found.number) <= _EXACT
    return found if passed_on and exact and dtype.is_floating_point else None


def _operand(given: Any, node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    """A number or a known tensor, broadcast to the shape of `node`."""
    rank = len(shape_of(node))
    if isinstance(given, int):
        return Affine(int(given), (0,) * rank)
    value = known.get(given) if isinstance(given, fx.Node) else None
    if value is None:
        return None
    shape = shape_of(given)
    # A dimension of size 1 has no second entry: its slope says nothing, and must not be spread.
    own = tuple(0 if size == 1 else slope for size, slope in zip(shape, value.slopes, strict=True))
    return replace(value, slopes=(0,) * (rank - len(own)) + own)


def _arange(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    given = arguments(node)
    start, step = given.get("start", 0), given.get("step", 1)
    return Affine(start, (step,)) if isinstance(start, int) and isinstance(step, int) else None


def _factory(fill: str | int) -> Callable[[fx.Node, dict[fx.Node, Affine]], Affine | None]:
    def rule(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
        number = arguments(node)[fill] if isinstance(fill, str) else fill
        whole = isinstance(number, int) or (isinstance(number, float) and number.is_integer())
        return Affine(int(number), (0,) * len(shape_of(node))) if whole else None

    return rule


def _sum(sign: int) -> Callable[[fx.Node, dict[fx.Node, Affine]], Affine | None]:
    def rule(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
        given = arguments(node)
        left = _operand(given["self"], node, known)
        right = _operand(given["other"], node, known)
        if left is None or right is None or given.get("alpha", 1) != 1:
            return None
        slopes = tuple(a + sign * b for a, b in zip(left.slopes, right.slopes, strict=True))
        counted = left.counted or right.counted
        return Affine(left.offset + sign * right.offset, slopes, counted)

    return rule


def _product(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    """A number, not zero, times a value."""
    given = arguments(node)
    sides = [_operand(given[name], node, known) for name in ("self", "other")]
    for one, other in (sides, sides[::-1]):
        if one is not None and other is not None and one.number:
            slopes = tuple(one.number * slope for slope in other.slopes)
            return Affine(one.number * other.offset, slopes, other.counted)
    return None


def _comparison(
    compare: Callable[[int, int], bool],
) -> Callable[[fx.Node, dict[fx.Node, Affine]], Affine | None]:
    def rule(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
        given = arguments(node)
        left = _operand(given["self"], node, known)
        right = _operand(given["other"], node, known)
        below = right is not None and right.number is not None and right.number < 0
        if left is None and below and _is_looked_up(given["self"]):
            left = _operand(0, node, known)  # as good as any id
        if left is None:
            return None
        if right is None or left.slopes != right.slopes:
            holds = _at_every_size(compare, left, given["other"], right, node)
        else:
            holds = compare(left.offset, right.offset)
        return None if holds is None else Affine(int(holds), (0,) * len(left.slopes))

    return rule


def _at_every_size(
    compare: Callable[[int, int], bool],
    left: Affine,
    other: Any,
    right: Affine | None,
    node: fx.Node,
) -> bool | None:
    """What it says of whole numbers, in every entry alike; the other side may be a size."""
    size = other.meta.get("val") if isinstance(other, fx.Node) else None
    if right is None and isinstance(size, torch.SymInt):
        right = Affine(0, (0,) * len(left.slopes))
        offset = left.offset - size.node.expr
    elif right is not None:
        offset = sympy.Integer(left.offset - right.offset)
    inputs = [n.meta["val"] for n in node.all_input_nodes]
    whole = all(v.dtype in _INTEGERS for v in inputs if isinstance(v, torch.Tensor))
    if right is None or not whole:
        return None
    slopes = [a - b for a, b in zip(left.slopes, right.slopes, strict=True)]
    return decided(compare, offset, slopes, shape_of(node))


def _is_looked_up(ids: Any) -> bool:
    """Whether these are the rows that are taken from a table: torch fails where one is below 0."""
    embeddings = [u for u in ids.users if u.target is aten.embedding.default]
    return any(arguments(u)["indices"] is ids for u in embeddings)


def _diff(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    """First differences, before which one entry may stand that continues them."""
    given = arguments(node)
    value, before = known.get(given["self"]), given["prepend"]
    if value is None or given["n"] != 1 or given["append"] is not None:
        return None
    dim = given["dim"] % len(value.slopes)
    step = value.slopes[dim]
    if before is not None:
        first = known.get(before)
        others = [k for k in range(len(value.slopes)) if k != dim]
        if first is None or shape_of(before)[dim] != 1:
            return None
        if first.offset != value.offset - step:
            return None
        if any(first.slopes[k] != value.slopes[k] for k in others):
            return None
    return Affine(step, (0,) * len(value.slopes))


def _cumsum(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    given = arguments(node)
    value = known.get(given["self"])
    if value is None or value.number is None:
        return None
    slopes = [0] * len(value.slopes)
    slopes[given["dim"] % len(slopes)] = value.number
    return Affine(value.number, tuple(slopes), counted=True)


def _index(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    """Whatever is taken out of a value of one number."""
    value = known.get(arguments(node)["self"])
    if value is None or value.number is None:
        return None
    return Affine(value.number, (0,) * len(shape_of(node)))


def _same(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    """Copies and conversions between integer types; to bool only of numbers."""
    source = arguments(node)["self"]
    value = known.get(source)
    if value is None or shape_of(source) != shape_of(node):
        return None
    if node.meta["val"].dtype != torch.bool or source.meta["val"].dtype == torch.bool:
        return value
    return None if value.number is None else Affine(int(bool(value.number)), value.slopes)


def _repeat(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    """Along what does not grow, or once."""
    source = arguments(node)["self"]
    value, before, after = known.get(source), shape_of(source), shape_of(node)
    if value is None:
        return None
    added = len(after) - len(before)
    for slope, size, repeated in zip(value.slopes, before, after[added:], strict=True):
        if slope and size not in (1, repeated):
            return None
    return _operand(source, node, known)


def _select(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    given = arguments(node)
    value, index = known.get(given["self"]), given["index"]
    if value is None:
        return None
    dim = given["dim"] % len(value.slopes)
    slopes = value.slopes[:dim] + value.slopes[dim + 1 :]
    if not value.slopes[dim]:
        return replace(value, slopes=slopes)
    if not isinstance(index, int) or index < 0:
        return None
    return replace(value, offset=value.offset + index * value.slopes[dim], slopes=slopes)


def _where(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    """One side, where it is always the same one."""
    given = arguments(node)
    condition = known.get(given["condition"])
    if condition is None or condition.number is None or "other" not in given:
        return None
    return _operand(given["self" if condition.number else "other"], node, known)


def _expand(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    return _operand(arguments(node)["self"], node, known)


def _unsqueeze(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    given = arguments(node)
    value = known.get(given["self"])
    if value is None:
        return None
    dim = given["dim"] % len(shape_of(node))
    return replace(value, slopes=(*value.slopes[:dim], 0, *value.slopes[dim:]))


def _slice(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    given = arguments(node)
    value, start = known.get(given["self"]), given["start"] or 0
    if value is None:
        return None
    if value.number is not None:
        return value
    if not isinstance(start, int) or start < 0 or given["step"] != 1:
        return None
    return replace(value, offset=value.offset + start * value.slopes[given["dim"]])


def _not(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    value = known.get(arguments(node)["self"])
    if value is None or value.number is None or node.meta["val"].dtype != torch.bool:
        return None
    return replace(value, offset=int(not value.number))


def _clamp(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
    """From below, by a number that no entry is below."""
    given = arguments(node)
    value, least = known.get(given["self"]), given["min"]
    rises = value is not None and min(value.slopes, default=0) >= 0
    if value is None or not rises or not isinstance(least, int) or given.get("max") is not None:
        return None
    return value if value.offset >= least else None


def _logical(
    combine: Callable[[int, int], int],
) -> Callable[[fx.Node, dict[fx.Node, Affine]], Affine | None]:
    def rule(node: fx.Node, known: dict[fx.Node, Affine]) -> Affine | None:
        given = arguments(node)
        if node.meta["val"].dtype != torch.bool:
            return None
        sides = [_operand(given[name], node, known) for name in ("self", "other")]
        numbers = [None if side is None else side.number for side in sides]
        if numbers[0] is None or numbers[1] is None:
            return None
        return Affine(int(combine(numbers[0], numbers[1])), (0,) * len(shape_of(node)))

    return rule


def _table(pairs: Sequence[tuple[Sequence[Any], Any]]) -> dict[Any, Any]:
    return {packet: rule for packets, rule in pairs for packet in packets}


FACTORIES = {aten.full, aten.zeros, aten.ones, aten.new_full, aten.new_zeros, aten.new_ones,
              aten.full_like, aten.zeros_like, aten.ones_like}  # fmt: skip
_PASSING_ON = (_same, _expand, _repeat, _unsqueeze, _slice, _select, _index)
_RULES: dict[Any, Callable[[fx.Node, dict[fx.Node, Affine]], Affine | None]] = _table(
    (
        ((aten.arange,), _arange),
        ((aten.zeros, aten.new_zeros, aten.zeros_like), _factory(0)),
        ((aten.ones, aten.new_ones, aten.ones_like), _factory(1)),
        ((aten.full, aten.new_full, aten.full_like), _factory("fill_value")),
        ((aten.add,), _sum(1)),
        ((aten.sub,), _sum(-1)),
        ((aten.mul,), _product),
        ((aten.eq,), _comparison(operator.eq)),
        ((aten.ne,), _comparison(operator.ne)),
        ((aten.lt,), _comparison(operator.lt)),
        ((aten.le,), _comparison(operator.le)),
        ((aten.gt,), _comparison(operator.gt)),
        ((aten.ge,), _comparison(operator.ge)),
        ((aten.logical_not, aten.bitwise_not), _not),
        ((aten.clamp, aten.clamp_min), _clamp),
        ((aten.diff,), _diff),
        ((aten.cumsum,), _cumsum),
        ((aten.index,), _index),
        ((aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.alias, aten.detach), _same),
        ((aten.expand,), _expand),
        ((aten.repeat,), _repeat),
        ((aten.select,), _select),
        ((aten.where,), _where),
        ((aten.unsqueeze,), _unsqueeze),
        ((aten.slice,), _slice),
        ((aten.__and__, aten.logical_and, aten.bitwise_and), _logical(operator.and_)),
        ((aten.__or__, aten.logical_or, aten.bitwise_or), _logical(operator.or_)),
    )
)
