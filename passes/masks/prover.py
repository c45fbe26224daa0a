"""Proves what a constant mask is: its values are computed and compared with what they are called.

    masked_fill(s, buffer[:, :, :T, :T] == 0, -inf)          ->  causal
    s + full((T, T), -inf).triu(1)                           ->  causal
    where((i - j >= 0) & (i - j < 128), s, finfo.min)        ->  causal, window_left = 127
    s + slopes * (j - i), masked_fill(..., -inf)             ->  causal, ALiBi slopes

Larger ones are looked at where their lines meet (`landmarks`), stored ones in tiles (`tiles`).
Several masks on one attention count by their joint effect, `fxport.passes.masks.effects`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fxport.capture.arguments import shape_of
from fxport.errors import ReasonCode
from fxport.passes.attention.frame import Frame, Recipe, recipe
from fxport.passes.attention.layout import Size, product
from fxport.passes.attention.site import Left, MaskKind, MaskStep
from fxport.passes.graph_facts import GraphFacts, reachable
from fxport.passes.masks.bands import FULL
from fxport.passes.masks.effects import Effect, Proof, hard_limit, joint_effect
from fxport.passes.masks.keys import Keys
from fxport.passes.masks.landmarks import Landmarks, landmarks_of
from fxport.passes.masks.scope import scope_of
from fxport.passes.masks.tiles import Edges, tiles_of
from fxport.passes.masks.values import constant_value

__all__ = ["MAX_ENTRIES", "Prover"]

MAX_ENTRIES = 2**27  # of a mask that is computed: 11,585 tokens square, 1 GiB as int64


class Prover:
    """Proves the masks of one graph; layers with equal masks are looked at once."""

    def __init__(self, facts: GraphFacts) -> None:
        self._facts = facts
        self._keys = Keys(facts.gm)
        self._proofs: dict[Any, Proof | Left] = {}

    def prove(
        self,
        steps: Sequence[MaskStep],
        frame: Frame,
        zero_rows: bool,
        anchored: bool = False,
        infinite_rows: bool = False,
    ) -> Proof:
        """The joint effect of constant steps.

        Args:
            zero_rows: rows without a key may be.
            infinite_rows: they may be where all of their scores are -inf.
            anchored: scores are also compared with something else than those of their row (a
                sink, or a number that is filled in), so that a number added to a whole row matters.

        Raises:
            Left: some row has no allowed key, where the original gives NaN or a mean.
        """
        if not steps:
            return Proof(FULL)
        anchored = anchored or _meets_numbers(steps)
        lengths = product(frame.query), product(frame.key)
        recipes = [_recipe(step, frame) for step in steps]
        key = (
            tuple(
                (s.kind, self._keys.of(s.tensor), s.number, s.inverted, r, s.node.meta["val"].dtype)
                for s, r in zip(steps, recipes, strict=True)
            ),
            lengths,
            zero_rows,
            anchored,
            infinite_rows,
        )
        if key not in self._proofs:
            try:
                self._proofs[key] = _prove(
                    steps, recipes, lengths, zero_rows, anchored, infinite_rows
                )
            except Left as left:
                self._proofs[key] = left
        found = self._proofs[key]
        if isinstance(found, Left):
            raise Left(found.code, found.message, steps[-1].node, found.hint)
        return found


def _recipe(step: MaskStep, frame: Frame) -> Recipe | None:
    if step.tensor is None:
        return None
    return recipe(shape_of(step.tensor), step.dims, frame)


Lengths = tuple[Size, Size]


def _prove(
    steps: Sequence[MaskStep],
    recipes: Sequence[Recipe | None],
    lengths: Lengths,
    zero_rows: bool,
    anchored: bool,
    infinite_rows: bool,
) -> Proof:
    tensors = [s.tensor for s in steps if s.tensor is not None]
    added = [s.tensor for s in steps if s.kind is MaskKind.ADD and s.tensor is not None]
    points, why = _points(tensors, lengths, () if anchored else added)
    if not points:
        return Proof(None, rest=True, why=why, known=False)
    found: Proof | None = None
    for sizes in points:  # the largest first
        marks: Landmarks | None = None
        if _largest(tensors, lengths, sizes) > MAX_ENTRIES:
            tiles = tiles_of(tensors, lengths, sizes, MAX_ENTRIES) if len(points) == 1 else ()
            read = _read(steps, recipes, lengths, sizes, anchored, tiles)
            if read is not None:
                return read
            marks = landmarks_of(tensors, lengths, sizes) if len(points) == 1 else None
            if marks is None:
                return _too_large()
        try:
            effect = _effect(steps, recipes, lengths, sizes, anchored, marks)
            empties = effect is not None and effect.empties_rows()
        # Running the user's operations at a length that they may not support.
        except (ValueError, RuntimeError, IndexError) as error:
            return Proof(None, rest=True, why=f"the mask has no value: {error}", known=False)
        if marks is not None and (effect is None or effect.bias is not None):
            return _too_large()
        if effect is None:
            why = "masks are combined in a way that is not understood"
            return Proof(None, rest=True, why=why, known=False)
        excused = zero_rows or (infinite_rows and not effect.finite)
        if not excused and empties:
            if infinite_rows and all(s.kind is MaskKind.ADD for s in steps):
                why = "a finite number forbids all keys of a row, which come out with weights"
                return Proof(None, rest=True, why=why, finite=True, lowered=True)
            raise Left(
                ReasonCode.EMPTY_ROW,
                "the mask leaves some query without any key",
                None,
                "let every token see at least itself",
            )
        found = effect.proof() if found is None else found
        if not effect.agrees(found) and found.rest:
            found = replace(found, likely=None)
        elif not effect.agrees(found):
            why = "the mask is another one for other lengths"
            return Proof(None, rest=True, why=why, known=False)
    assert found is not None
    return found


def _read(
    steps: Sequence[MaskStep],
    recipes: Sequence[Recipe | None],
    lengths: Lengths,
    sizes: dict[sympy.Symbol, int],
    anchored: bool,
    tiles: Iterable[Landmarks],
) -> Proof | None:
    """What all tiles show, if that is a band in which every token sees itself; or None."""
    edges, found = Edges(), Proof(None)
    for tile in tiles:
        try:
            effect = _effect(steps, recipes, lengths, sizes, anchored, tile)
        except (ValueError, RuntimeError, IndexError):  # as in `_prove`
            return None
        if effect is None or effect.bias is not None:
            return None
        edges.add(effect.allowed, tile.places)
        found = replace(
            found,
            finite=found.finite or effect.finite,
            lowered=found.lowered or effect.lowered,
            ceiling=max(found.ceiling, effect.ceiling),
        )
        band = edges.band(_number(lengths[0], sizes))
        if band is None:
            return None
        found = replace(found, band=band)
    return found if found.band is not None else None


def _too_large() -> Proof:
    return Proof(None, rest=True, why="the mask is too large to look at", known=False)


def _largest(tensors: Sequence[fx.Node], lengths: Lengths, sizes: dict[sympy.Symbol, int]) -> int:
    """Entries of the largest tensor that the masks are made of."""
    rows, columns = (_number(size, sizes) for size in lengths)
    return max([rows * columns, *(_entries(t, sizes) for t in reachable(tensors))])


def _effect(
    steps: Sequence[MaskStep],
    recipes: Sequence[Recipe | None],
    lengths: Lengths,
    sizes: dict[sympy.Symbol, int],
    anchored: bool,
    marks: Landmarks | None,
) -> Effect | None:
    """What the masks do at these sizes.

    Raises:
        ValueError: some mask has no value.
        RuntimeError, IndexError: from the user's operations, at a length that they do not support.
    """
    values: list[Tensor | None] = []
    for step, how in zip(steps, recipes, strict=True):
        if step.tensor is None or how is None:
            values.append(None)
        elif marks is None:
            values.append(_value(step.tensor, how, sizes))
        elif how.split is None:
            value = marks.value(step.tensor)
            values.append(value.reshape((1,) * (4 - value.dim()) + tuple(value.shape)))
        else:
            raise ValueError("its dimensions are folded")
    rows, columns = (_number(size, sizes) for size in lengths)
    if marks is not None:
        rows = columns = len(marks.places)
    effect = joint_effect(steps, values, rows, columns, anchored, marks)
    if effect is not None and effect.allowed.shape[-2:] != (rows, columns):
        raise ValueError("it is larger than the scores")
    return effect


def _value(tensor: fx.Node, how: Recipe, sizes: dict[sympy.Symbol, int]) -> Tensor:
    value: Tensor = constant_value(tensor, sizes)
    if how.split is not None:
        value = value.reshape([_number(s, sizes) for s in how.split]).permute(how.order)
        value = value.expand([_number(s, sizes) for s in how.expand])
        value = value.reshape([_number(s, sizes) for s in how.merged])
    return value.reshape((1,) * (4 - value.dim()) + tuple(value.shape)).cpu()


def _entries(node: fx.Node, sizes: dict[sympy.Symbol, int]) -> int:
    if not isinstance(node.meta.get("val"), Tensor):
        return 0
    return math.prod(_number(size, sizes) for size in shape_of(node))


def _number(size: Size, sizes: dict[sympy.Symbol, int]) -> int:
    return size if isinstance(size, int) else int(size.subs(sizes))


# -- which sizes to look at ------------------------------------------------------------------------


def _meets_numbers(steps: Sequence[MaskStep]) -> bool:
    """Whether a number that is filled in is compared with scores to which others are added."""
    filled = (MaskKind.FILL, MaskKind.FLOOR)
    low = all(s.number <= hard_limit(s.node) for s in steps if s.kind in filled)
    return not low or any(s.kind is MaskKind.MULTIPLY for s in steps)


def _points(
    tensors: Sequence[fx.Node], lengths: Lengths, added: Sequence[fx.Node]
) -> tuple[list[dict[sympy.Symbol, int]], str]:
    """Sizes that decide all, largest first; or none, and why."""
    symbols = _symbols(tensors, lengths)
    of_length = sorted(
        {s for size in lengths if not isinstance(size, int) for s in size.free_symbols}, key=str
    )
    others = {s: 2 for s in symbols if s not in of_length}
    if not of_length:
        return [others], ""
    scope = scope_of(tensors, of_length, added)
    return [others | point for point in scope.points], scope.why


def _symbols(tensors: Sequence[fx.Node], lengths: Lengths) -> set[sympy.Symbol]:
    found: set[sympy.Symbol] = set()
    for size in lengths:
        found |= set() if isinstance(size, int) else size.free_symbols
    for node in reachable(tensors):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else [value]
        for size in sizes:
            if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
                found |= size.node.expr.free_symbols
    return found
