"""A mask too large to be made, looked at where the lines along which it changes meet.

    (j <= i) & (i - j < 262144)     at 131,072 tokens: 17e9 entries, of which 250 squared decide

Lines are rows, columns and diagonals at whole numbers (`lines_of`), the edges among them. What
lies between them is one piece with one value. In any row between two meeting points, stretches
between neighbouring lines keep their width or grow and shrink by one entry a row; so each piece
has an entry in a row at most two off a meeting point, next to a line there. Meeting points lie at
sums of two offsets, entries next to a line at sums of three: these, and three to either side, are
the places at which rows and columns are looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from fxport.capture.arguments import arguments, shape_of, takes_all
from fxport.passes.attention.layout import Size, is_one
from fxport.passes.attention.made import filled_with
from fxport.passes.attention.views import CASTS, overload_packet
from fxport.passes.constants import Sizes, is_symbolic
from fxport.passes.graph_facts import reachable, value_inputs
from fxport.passes.masks.bands import Band
from fxport.passes.masks.lines import Lines, lines_of
from fxport.passes.masks.scope import POINTWISE, RESHAPES, SHAPES
from fxport.passes.masks.values import constant_value

__all__ = ["Landmarks", "landmarks_of"]

aten = torch.ops.aten

_MOST = 6000  # places
_MOST_PLAIN = 2**20  # entries of what no position enters
_BESIDE = range(-3, 4)
_WITHOUT_VALUE = {aten.ones_like, aten.zeros_like, aten.full_like, aten.new_ones, aten.new_zeros,
                  aten.new_full, aten.ones, aten.zeros, aten.full}  # fmt: skip


@dataclass(frozen=True)
class Landmarks:
    """Where to look at masks of ``[length, length]``.

    Attributes:
        places: rows and columns that decide all, int64, sorted; the first and last among them.
        length: as a size of the graph.
        sizes: a number for every symbol.
    """

    places: Tensor
    length: Size
    sizes: Sizes
    _lines: Lines
    _known: dict[fx.Node, Tensor] = field(default_factory=dict)

    def value(self, mask: fx.Node) -> Tensor:
        """Its entries at the places: ``[.., n, n]``, or 1 in place of n where all are alike.

        Raises:
            ValueError: it is made by an operation that is not followed.
        """
        if self.length in shape_of(mask)[:-2]:
            raise ValueError("a dimension of a mask is as long as the sequence")
        with _disable_current_modes(), torch.no_grad():
            for node in sorted(reachable([mask], _inputs)):
                if node not in self._known:
                    self._known[node] = self._value(node)
        return self._known[mask]

    def tell(self, band: Band) -> bool:
        """Whether a band changes along the lines alone, so that the places decide about it."""
        edges = [(band.lower, -1), (band.upper, 1)]
        offsets = {s * n for n in self._lines.offsets for s in (-1, 1)}
        near = all(n is None or n in offsets or n + step in offsets for n, step in edges)
        return near and not band.from_end and band.chunk in (None, self._lines.block)

    def _value(self, node: fx.Node) -> Tensor:
        packet, shape = overload_packet(node), shape_of(node)
        inputs = [self._known[n] for n in _inputs(node) if n in self._known]
        if packet is aten.arange and shape == (self.length,):
            return (self.places + (arguments(node).get("start", 0) or 0)).to(node.meta["val"].dtype)
        if packet in _WITHOUT_VALUE:
            return self._alike(node)
        if not inputs or self._is_plain(node):
            return self._plain(node)
        if packet in (aten.tril, aten.triu):
            return self._triangle(node, inputs[0])
        if packet in SHAPES or packet in RESHAPES or (packet is aten.slice and takes_all(node)):
            return self._moved(node, inputs[0])
        if packet in CASTS:
            return inputs[0].to(node.meta["val"].dtype)
        if packet not in POINTWISE:
            raise ValueError(f"`{packet or node.target}` is not followed")
        return self._called(node)

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether no dimension of it, or of what it is made of, is as long as the sequence."""
        return not any(self._grows(n) for n in reachable([node], _inputs))

    def _grows(self, node: fx.Node) -> bool:
        if isinstance(self.length, int):
            return self.length in shape_of(node)
        return any(not isinstance(s, int) and s.has(self.length) for s in shape_of(node))

    def _plain(self, node: fx.Node) -> Tensor:
        if not self._is_plain(node) or node.meta["val"].numel() > _MOST_PLAIN:
            raise ValueError(f"`{node.format_node()}` has an entry for every position")
        value: Tensor = constant_value(node, self.sizes)
        return value.cpu()

    def _alike(self, node: fx.Node) -> Tensor:
        """What a factory fills, once."""
        fill = arguments(node).get("fill_value", filled_with(node))
        if not isinstance(fill, int | float):
            raise ValueError("the length enters as a number")
        return torch.full([1] * len(shape_of(node)), fill, dtype=node.meta["val"].dtype)

    def _number(self, node: fx.Node) -> int | float:
        if is_symbolic(node) and isinstance(self.length, int):
            return constant_value(node, self.sizes)  # type: ignore[no-any-return]
        raise ValueError("the length enters as a number")

    def _triangle(self, node: fx.Node, value: Tensor) -> Tensor:
        if shape_of(node)[-2:] != (self.length, self.length):
            raise ValueError("a triangle of another size")
        distance = self.places[None, :] - self.places[:, None]
        diagonal = arguments(node)["diagonal"]
        if not isinstance(diagonal, int):
            raise ValueError("the length enters as a number")
        keep = distance <= diagonal if overload_packet(node) is aten.tril else distance >= diagonal
        return torch.where(keep, value, torch.zeros((), dtype=value.dtype))

    def _moved(self, node: fx.Node, value: Tensor) -> Tensor:
        packet = overload_packet(node)
        before, after = shape_of(_inputs(node)[0]), shape_of(node)
        if packet in (aten.expand, aten.expand_as, aten.broadcast_to):
            return value.reshape((1,) * (len(after) - len(before)) + tuple(value.shape))
        if packet not in RESHAPES and packet not in (aten.squeeze, aten.unsqueeze, aten.slice):
            return self._called(node)
        sizes = [s for s in before if not is_one(s)]
        if sizes != [s for s in after if not is_one(s)]:
            raise ValueError("dimensions are split or merged")
        kept = iter([v for v, size in zip(value.shape, before, strict=True) if not is_one(size)])
        return value.reshape([1 if is_one(size) else next(kept) for size in after])

    def _called(self, node: fx.Node) -> Tensor:
        def value(given: fx.Node) -> Any:
            return self._known[given] if given in self._known else self._number(given)

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
        assert isinstance(node.target, torch._ops.OpOverload)
        found: Tensor = node.target(*args, **kwargs)
        return found


def landmarks_of(
    masks: Sequence[fx.Node], lengths: tuple[Size, Size], sizes: Sizes
) -> Landmarks | None:
    """Where to look at `masks`; None if that is not known."""
    length = lengths[0]
    if length != lengths[1] or not (isinstance(length, int) or length.is_Symbol):
        return None
    count = length if isinstance(length, int) else sizes[length]
    lines = lines_of(masks, reachable(masks, _inputs), length, count)
    if lines is None:
        return None
    lines = replace(lines, offsets=lines.offsets | {count - 1})
    places = _places(lines, count)
    if places is None:
        return None
    with _disable_current_modes():
        return Landmarks(torch.tensor(places), length, sizes, lines)


def _places(lines: Lines, count: int) -> list[int] | None:
    """Sums of three offsets with any signs, and three to either side; None: too many."""
    offsets = {s * n for n in lines.offsets for s in (-1, 1)}
    sums = {a + b + c for a, b, c in itertools.combinations_with_replacement(offsets, 3)}
    if lines.block:
        reach = 3 * (count // lines.block + 1)
        if len(sums) * reach > _MOST * lines.block:
            return None
        shifts = range(-reach * lines.block, reach * lines.block + 1, lines.block)
        sums = {n + shift for n in sums for shift in shifts}
    found = sorted({n + step for n in sums for step in _BESIDE if 0 <= n + step < count})
    return found if len(found) <= _MOST else None


def _inputs(node: fx.Node) -> list[fx.Node]:
    return [n for n in value_inputs(node) if not is_symbolic(n)]
