"""Along which lines a mask changes, where these are rows, columns and diagonals.

    (j <= i) & (i - j < 262144)          j - i = 0  and  j - i = -262144
    i // 8192 == j // 8192               every row and column that 8192 divides

Numbers made of positions are followed from ``arange`` to the comparisons, as in
`fxport.passes.masks.blocks`, but for their constants, which are kept. Whether an offset belongs to
a row, a column or a diagonal, and its sign, are forgotten: all of them are lines then.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.layout import Size
from fxport.passes.attention.made import filled_with
from fxport.passes.attention.views import CASTS, moved_input, overload_packet
from fxport.passes.graph_facts import value_inputs

__all__ = ["Lines", "lines_of"]

aten = torch.ops.aten

_COMPARISONS = {aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge}
_CLAMPS = {aten.clamp, aten.clamp_min, aten.clamp_max, aten.relu}
_EXACT = {torch.int64: 2**62, torch.int32: 2**30, torch.float64: 2**52, torch.float32: 2**23}
_MOST = 64  # offsets of one number
_QUOTIENTS = {aten.floor_divide, aten.div}
_EXPANDS = {aten.expand, aten.expand_as, aten.broadcast_to}
# What a line may be 0 of.
_STRAIGHT = {(1, 0), (-1, 0), (0, 1), (0, -1), (1, -1), (-1, 1)}


@dataclass(frozen=True)
class Lines:
    """``row = c``, ``column = c`` and ``row - column = c`` for every offset c and its negative.

    Attributes:
        offsets: 0 among them.
        block: and for each multiple of it added to them; 0: none.
    """

    offsets: frozenset[int]
    block: int = 0


@dataclass(frozen=True)
class _Number:
    """``row * i + column * j + offset``, and multiples of the block.

    Attributes:
        row, column: how often the position of the row and of the column are in it.
        offsets: what may be added.
        loose: one of the two signs, or an offset alone: it has been bent.
        block: it is made of numbers of blocks instead, whose factors are not kept; `offsets` says
            how many more they may be.
    """

    row: int = 0
    column: int = 0
    offsets: frozenset[int] = frozenset({0})
    loose: bool = False
    block: bool = False

    @property
    def is_constant(self) -> bool:
        """Within a block."""
        return self.row == self.column == 0 and not self.block


class _Unknown(Exception):
    """It is none of what this module follows."""


def lines_of(
    masks: Sequence[fx.Node], nodes: Sequence[fx.Node], length: Size, count: int
) -> Lines | None:
    """The lines of `masks`; None if there may be others.

    Args:
        nodes: what decides them; of a value that no position enters, nothing is asked.
        length: of both dimensions, which is `count`.
    """
    walk = _Walk(length, count)
    try:
        for node in sorted(nodes):
            walk.follow(node)
    except _Unknown:
        return None
    if any(mask in walk.numbers for mask in masks):
        return None  # what these numbers will be compared with, nobody has said
    return Lines(frozenset(walk.offsets), walk.block)


@dataclass
class _Walk:
    length: Size
    count: int
    numbers: dict[fx.Node, _Number] = field(default_factory=dict)
    offsets: set[int] = field(default_factory=lambda: {0})
    block: int = 0

    def follow(self, node: fx.Node) -> None:
        packet = overload_packet(node)
        if packet is aten.arange:
            if shape_of(node) == (self.length,):
                self._add(node, _Number(column=1, offsets=frozenset({_start(node)})))
        elif packet in (aten.tril, aten.triu):
            if node.all_input_nodes[0] in self.numbers:
                raise _Unknown
            self.offsets.update(_whole([arguments(node)["diagonal"]]))
        elif any(n in self.numbers for n in value_inputs(node)):
            if packet is None:
                raise _Unknown
            self._use(node, packet)

    def _use(self, node: fx.Node, packet: Any) -> None:
        """An operation that a number enters."""
        if packet in _COMPARISONS:
            compared = self._difference(node)
            first, second = list(arguments(node).values())[:2]
            self._is_exact(compared, torch.result_type(*map(_meta, (first, second))))
            self._lines(compared)
        elif node.meta["val"].dtype == torch.bool:
            if packet not in CASTS and packet is not aten.logical_not:
                raise _Unknown
            self._lines(self.numbers[node.all_input_nodes[0]])  # compared with 0
        else:
            self._add(node, self._number(node, packet))

    def _lines(self, compared: _Number) -> None:
        """Where it is 0."""
        if compared.block or compared.is_constant:
            return
        if (compared.row, compared.column) not in _STRAIGHT:
            raise _Unknown
        self.offsets |= compared.offsets

    def _add(self, node: fx.Node, number: _Number) -> None:
        if len(number.offsets) > _MOST:
            raise _Unknown
        self._is_exact(number, node.meta["val"].dtype)
        self.numbers[node] = number

    def _is_exact(self, number: _Number, dtype: torch.dtype) -> None:
        """Raises where neighbours might become one number in a dtype, or wrap around in it."""
        most = self.count * (abs(number.row) + abs(number.column) + number.block)
        if most + max(map(abs, number.offsets)) > _EXACT.get(dtype, 0):
            raise _Unknown

    def _number(self, node: fx.Node, packet: Any) -> _Number:
        given = arguments(node)
        if packet in (aten.add, aten.sub, aten.rsub):
            return self._difference(node, plus=packet is aten.add)
        first, second = [*list(given.values()), None][:2]
        if packet in (aten.minimum, aten.maximum, aten.mul) and first not in self.numbers:
            first, second = second, first
        known = self.numbers.get(first) if isinstance(first, fx.Node) else None
        if known is None:
            raise _Unknown
        if packet in CASTS or packet in _EXPANDS:
            return known
        if moved_input(node) is not None:
            return self._moved(node, known)
        if packet is aten.neg:
            return self._combined(_Number(), known, -1)
        if packet in _CLAMPS or packet in (aten.minimum, aten.maximum, aten.abs):
            return self._bent(known, [v for v in list(given.values()) if v is not first])
        return self._in_blocks(node, packet, known, second)

    def _moved(self, node: fx.Node, known: _Number) -> _Number:
        """What varied along rows may vary along columns now: it does where its length is."""
        if known.block or known.is_constant:
            return known
        axes = [i for i, size in enumerate(reversed(shape_of(node)), 1) if size == self.length]
        if axes not in ([1], [2]) or (known.row and known.column):
            raise _Unknown
        factor = known.row + known.column
        return replace(known, row=factor * (axes == [2]), column=factor * (axes == [1]))

    def _bent(self, known: _Number, limits: Sequence[Any]) -> _Number:
        """Where it is bent nothing jumps: what it is compared with says where that changes."""
        numbers = _whole([v for v in limits if v is not None])
        if known.block:
            return replace(known, offsets=known.offsets | numbers)
        return replace(known, offsets=_both(known.offsets | numbers), loose=True)

    def _in_blocks(self, node: fx.Node, packet: Any, known: _Number, second: Any) -> _Number:
        if packet is aten.mul and known.block and second == self.block:
            return self._first_positions(node, known)
        rounded = arguments(node).get("rounding_mode") == "floor" or packet is aten.floor_divide
        one = {abs(known.row), abs(known.column)} == {0, 1} and not known.block and not known.loose
        if not one or not isinstance(second, int) or second < 2 or self.block not in (0, second):
            raise _Unknown
        if packet is not aten.remainder and not (packet in _QUOTIENTS and rounded):
            raise _Unknown
        self.block = second
        self.offsets |= known.offsets
        return known if packet is aten.remainder else _Number(block=True)

    def _first_positions(self, node: fx.Node, blocks: _Number) -> _Number:
        """Of blocks: whole numbers of them, no halves, times their size."""
        if node.meta["val"].dtype.is_floating_point:
            raise _Unknown
        farthest = self.block * max(map(abs, blocks.offsets))
        self._is_exact(_Number(row=1, offsets=frozenset({farthest})), node.meta["val"].dtype)
        return _Number()

    def _difference(self, node: fx.Node, plus: bool = False) -> _Number:
        """Of two operands; of a comparison, what it compares with 0."""
        given = arguments(node)
        if given.get("alpha", 1) != 1:
            raise _Unknown
        one, other = (self._operand(v) for v in list(given.values())[:2])
        if overload_packet(node) is aten.rsub:
            one, other = other, one
        return self._combined(one, other, 1 if plus else -1)

    def _combined(self, one: _Number, other: _Number, sign: int) -> _Number:
        if one.block or other.block:
            if not all(n.block or n.is_constant for n in (one, other)):
                raise _Unknown
            return _Number(block=True, offsets=_sums(one.offsets, other.offsets))
        if (one.loose and not other.is_constant) or (other.loose and not one.is_constant):
            raise _Unknown
        return _Number(
            one.row + sign * other.row,
            one.column + sign * other.column,
            _sums(one.offsets, other.offsets),
            one.loose or other.loose,
        )

    def _operand(self, value: Any) -> _Number:
        if isinstance(value, fx.Node) and value in self.numbers:
            return self.numbers[value]
        filled = filled_with(value) if isinstance(value, fx.Node) else value
        return _Number(offsets=_whole([filled]))


def _meta(value: Any) -> Any:
    return value.meta["val"] if isinstance(value, fx.Node) else value


def _start(arange: fx.Node) -> int:
    given = arguments(arange)
    start = given.get("start", 0) or 0
    if given.get("step", 1) not in (1, None) or not isinstance(start, int):
        raise _Unknown
    return start


def _whole(values: Iterable[Any]) -> frozenset[int]:
    """Whole numbers next to given ones."""
    found: set[int] = set()
    for value in values:
        if not isinstance(value, int | float) or abs(value) > 2**40:
            raise _Unknown
        found |= {int(value // 1), -int(-value // 1)}
    return frozenset(found)


def _both(offsets: frozenset[int]) -> frozenset[int]:
    return offsets | {-n for n in offsets}


def _sums(one: frozenset[int], other: frozenset[int]) -> frozenset[int]:
    """Of any two, with any signs."""
    if len(one) * len(other) > _MOST * 4:
        raise _Unknown
    pairs = itertools.product(_both(one), _both(other))
    return frozenset(a + b for a, b in pairs)
