"""How far out pieces of a mask begin that tells positions apart by blocks of one size C.

    i // C == j // C       j >= i // C * C       i - j <= i % C       (i - j < 128) & (i // C == 0)

With ``i = C a + r`` and ``j = C b + s``, what is compared is, for each of the C * C pairs (r, s),
linear in the block numbers a and b: ``k`` times them at most, and a number of blocks ``c``. Two
such lines meet no farther out than ``2 k c``, and what lies between lines holds whole blocks within
another ``2 k k`` (``k = 1``: differences, whose corners are whole once c is rounded). So a few
blocks decide all, where `reach`, which knows C as a factor only, would ask for C of them.

Numbers are followed from ``arange`` to the comparisons; anything that is none of the above (another
factor, blocks compared with positions, an operation that moves entries) has no such bound.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.made import filled_with
from fxport.passes.attention.views import CASTS, moved_input, overload_packet

__all__ = ["reach_in_blocks"]

aten = torch.ops.aten

_QUOTIENTS = {aten.floor_divide, aten.div, aten.true_divide}
_REMAINDERS = {aten.remainder, aten.fmod}
_ROUNDS = {aten.floor, aten.ceil, aten.trunc}
_SUMS = {aten.add, aten.sub, aten.rsub}
_COMPARISONS = {aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge}
_TRIANGLES = {aten.tril, aten.triu}
_BENDS = {aten.abs, aten.clamp, aten.clamp_min, aten.clamp_max, aten.relu}


class _Unit(enum.Enum):
    POSITION = enum.auto()
    BLOCK = enum.auto()


@dataclass(frozen=True)
class _Linear:
    """A number that grows with positions.

    Attributes:
        unit: what it counts.
        factor: of a position or a block number in it, at most; 1 only if that is 1 for rows and
            columns, or minus 1 for one of them where it varies along both.
        blocks: everything else in it, at most, as a number of blocks; but for where in its block
            a position is.
    """

    unit: _Unit
    factor: int
    blocks: float


class _Unknown(Exception):
    """It is none of what this module follows."""


def reach_in_blocks(nodes: Sequence[fx.Node], indices: set[fx.Node], size: int) -> int | None:
    """A bound on row and column at which a piece begins, or None.

    Args:
        nodes: operations that decide an entry, and what enters them.
        indices: those of them that grow with the position.
        size: of a block; the only number by which positions are divided.
    """
    known: dict[fx.Node, _Linear] = {}
    lines: list[_Linear] = []
    try:
        for node in sorted(nodes):
            packet = overload_packet(node)
            if all(isinstance(n, int) for n in shape_of(node)) or filled_with(node) is not None:
                continue  # `_number` takes what is a number
            if node in indices:
                known[node] = _linear(node, known, size)
            elif packet in _COMPARISONS:
                line = _sum(node, known, size)
                within = line.factor * (size - 1) / size if line.unit is _Unit.POSITION else 0
                lines.append(_Linear(line.unit, line.factor, line.blocks + within))
            elif packet in _TRIANGLES:
                diagonal = _number(arguments(node)["diagonal"])
                lines.append(_Linear(_Unit.POSITION, 1, (abs(diagonal) + size - 1) / size))
            else:
                return None
    except _Unknown:
        return None
    factor = max((line.factor for line in lines), default=1)
    farthest = math.floor(max((line.blocks for line in lines), default=0.0)) + 1
    between = 1 if factor <= 1 else 2 * factor * factor + 1
    return size * (2 * max(factor, 1) * farthest + between)


def _linear(node: fx.Node, known: dict[fx.Node, _Linear], size: int) -> _Linear:
    packet, given = overload_packet(node), arguments(node)
    if packet is aten.arange:
        start, step = given.get("start", 0) or 0, given.get("step", 1)
        if step not in (1, None) or not isinstance(start, int):
            raise _Unknown
        return _Linear(_Unit.POSITION, 1, abs(start) / size)
    first, second = [*list(given.values()), None][:2]
    if packet in _SUMS:
        return _sum(node, known, size)
    if packet in _BENDS:
        numbers = [v for v in list(given.values())[1:] if isinstance(v, int | float)]
        if len(numbers) != sum(v is not None for v in list(given.values())[1:]):
            raise _Unknown
        inner = _of(first, known)
        more = max((_blocks(number, inner.unit, size) for number in numbers), default=0.0)
        return _Linear(inner.unit, inner.factor, inner.blocks + more)
    if packet in _QUOTIENTS and second == size:
        inner = _of(first, known, _Unit.POSITION)
        rounded = packet is aten.floor_divide or given.get("rounding_mode") == "floor"
        exact = rounded and inner.factor == 1 and inner.blocks == 0
        return _Linear(_Unit.BLOCK, inner.factor, 0 if exact else inner.blocks + inner.factor + 1)
    if packet in _REMAINDERS and second == size:
        _of(first, known, _Unit.POSITION)
        return _Linear(_Unit.POSITION, 0, 1.0)
    if packet is aten.mul and size in (first, second):
        inner = _of(first if second == size else second, known, _Unit.BLOCK)
        return _Linear(_Unit.POSITION, inner.factor, inner.blocks)
    if packet in _ROUNDS or packet in CASTS or moved_input(node) is not None:
        inner = _of(first, known)
        rounds = first.meta["val"].dtype.is_floating_point
        return _Linear(inner.unit, inner.factor, inner.blocks + rounds)
    raise _Unknown


def _sum(node: fx.Node, known: dict[fx.Node, _Linear], size: int) -> _Linear:
    """Of two operands, or what a comparison of them compares with 0."""
    given = arguments(node)
    if given.get("alpha", 1) != 1:
        raise _Unknown
    operands = list(given.values())[:2]
    terms = [known[v] for v in operands if isinstance(v, fx.Node) and v in known]
    units = {term.unit for term in terms}
    if len(units) != 1:
        raise _Unknown
    (unit,) = units
    constants = [_blocks(_number(v), unit, size) for v in operands if v not in known]
    subtracted = overload_packet(node) is not aten.add
    factor = sum(term.factor for term in terms)
    if len(terms) == 2 and subtracted and _vary_apart(*operands):
        factor = max(term.factor for term in terms)
    elif overload_packet(node) is aten.rsub:
        factor *= 2  # the sign is another one
    return _Linear(unit, factor, sum(term.blocks for term in terms) + sum(constants))


def _vary_apart(one: fx.Node, other: fx.Node) -> bool:
    """Whether one varies along rows and the other along columns."""
    shapes = [tuple(reversed(shape_of(n))) for n in (one, other)]
    return all(1 in pair for pair in zip(*shapes, strict=False))


def _of(value: Any, known: dict[fx.Node, _Linear], unit: _Unit | None = None) -> _Linear:
    found = known.get(value) if isinstance(value, fx.Node) else None
    if found is None or (unit is not None and found.unit is not unit):
        raise _Unknown
    return found


def _number(value: Any) -> float:
    value = filled_with(value) if isinstance(value, fx.Node) else value
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise _Unknown


def _blocks(number: float, unit: _Unit, size: int) -> float:
    return abs(number) / (size if unit is _Unit.POSITION else 1)
