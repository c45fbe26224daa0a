"""A stored mask too large to be computed with as a whole, read tile by tile.

    scores.masked_fill(buffer[:, :, :T, :T] == 0, -inf)       a buffer of 16,384 squared

Operations are followed at some rows and columns, as at landmarks (`fxport.passes.masks.landmarks`):
those of two stretches of positions at a time, until every pair of stretches has been seen. So all
entries are looked at, and nothing is asked about lines.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.layout import Size
from fxport.passes.attention.views import overload_packet
from fxport.passes.constants import Sizes
from fxport.passes.graph_facts import reachable, value_inputs
from fxport.passes.masks.bands import Band
from fxport.passes.masks.landmarks import Landmarks
from fxport.passes.masks.lines import Lines
from fxport.passes.masks.values import constant_value

__all__ = ["Edges", "tiles_of"]

aten = torch.ops.aten

_STRETCH = 2048
_ROWS = 256  # looked at together
_FAR = 2**30
_MOST = 2**30  # entries: 32,768 tokens square, some seconds


@dataclass(frozen=True)
class _Tile(Landmarks):
    """Two stretches of rows, and the same of columns; stored tables are read there."""

    def _value(self, node: fx.Node) -> Tensor:
        if node.op in ("placeholder", "get_attr"):
            along = [i for i, size in enumerate(shape_of(node)) if size == self.length]
            return self._read(constant_value(node, self.sizes), along)
        if overload_packet(node) is aten.select and self._selects(node):
            return self._called(node)
        if overload_packet(node) is aten.slice and _is_front(node, self.length):
            return self._read(self._known[value_inputs(node)[0]], [arguments(node)["dim"]])
        return super()._value(node)

    def _selects(self, node: fx.Node) -> bool:
        """Whether at a number along a dimension that no position counts."""
        given = arguments(node)
        return (
            isinstance(given["index"], int) and shape_of(given["self"])[given["dim"]] != self.length
        )

    def _read(self, table: Tensor, along: Sequence[int]) -> Tensor:
        for dim in along:
            table = table.index_select(dim, self.places.to(table.device)).cpu()
        return table


@dataclass
class Edges:
    """Of the band that some entries are, as distances of a column from its row.

    Attributes:
        lowest, highest: that are allowed.
        below, above: the nearest that are not, to either side of the diagonal.
    """

    lowest: int = 0
    highest: int = 0
    below: int = -_FAR
    above: int = _FAR

    def add(self, allowed: Tensor, places: Tensor) -> None:
        """Entries ``[.., n, n]`` at n rows and columns."""
        places = places.to(torch.int32)
        for start in range(0, len(places), _ROWS):
            distance = places - places[start : start + _ROWS, None]
            seen = allowed[..., start : start + _ROWS, :]
            at = torch.where(seen, distance, 0)
            self.lowest = min(self.lowest, int(at.min()))
            self.highest = max(self.highest, int(at.max()))
            self.below = max(
                self.below, int(distance.masked_fill(seen | (distance > 0), -_FAR).max())
            )
            self.above = min(
                self.above, int(distance.masked_fill(seen | (distance < 0), _FAR).min())
            )

    def band(self, count: int) -> Band | None:
        """Of `count` rows and columns; None if they are none in which row i sees column i."""
        if self.below >= self.lowest or self.above <= self.highest:
            return None
        lower = None if self.lowest <= 1 - count else self.lowest
        return Band(lower, None if self.highest >= count - 1 else self.highest)


def tiles_of(
    masks: Sequence[fx.Node], lengths: tuple[Size, Size], sizes: Sizes, large: int
) -> Iterator[Landmarks]:
    """Tiles that show every entry, or none.

    Args:
        large: entries of a stored table from which on it is worth it.
    """
    length = lengths[0]
    if length != lengths[1] or not (isinstance(length, int) or length.is_Symbol):
        return
    count = length if isinstance(length, int) else sizes[length]
    if count * count > _MOST or not any(_is_large(n, large) for n in reachable(masks)):
        return
    starts = range(0, count, _STRETCH)
    pairs = itertools.combinations_with_replacement(starts, 2)
    for first, second in pairs:
        ends = {n for s in (first, second) for n in range(s, min(s + _STRETCH, count))}
        with _disable_current_modes():
            places = torch.tensor(sorted(ends))
        yield _Tile(places, length, sizes, Lines(frozenset({0})))


def _is_large(node: fx.Node, entries: int) -> bool:
    value = node.meta.get("val")
    if node.op not in ("placeholder", "get_attr") or not isinstance(value, Tensor):
        return False
    return all(isinstance(n, int) for n in shape_of(node)) and value.numel() > entries


def _is_front(cut: fx.Node, length: Size) -> bool:
    """Whether it is as much of a longer table as there are positions."""
    given = arguments(cut)
    before, after = shape_of(given["self"]), shape_of(cut)
    changed = [i for i, (b, a) in enumerate(zip(before, after, strict=True)) if b != a]
    begins = given["start"] in (0, None) and given["step"] == 1
    return begins and changed == [given["dim"] % len(before)] and after[changed[0]] == length
