"""Proves what a constant mask is: its values are computed and compared with what they are called.

    masked_fill(s, buffer[:, :, :T, :T] == 0, -inf)          ->  causal
    s + full((T, T), -inf).triu(1)                           ->  causal
    where((i - j >= 0) & (i - j < 128), s, finfo.min)        ->  causal, window_left = 127
    s + slopes * (j - i), masked_fill(..., -inf)             ->  causal, ALiBi slopes

Several masks on one attention count by their joint effect. Which finite numbers forbid a key:

    up to `HARD`          as -inf does: float32 has no fractions left there, and scores that differ
                          by so much within a row are rounding errors
    up to `FORBIDDEN`     added: a bias like any other, since scores may differ by as much
                          filled in: as long as every row has a score well above it, which its
                          logsumexp tells when it runs (`Proof.ceiling`)
    above                 never
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from fxport.passes.masks.bands import FULL, Band, band_of
from fxport.passes.masks.keys import Keys
from fxport.passes.masks.scope import scope_of
from fxport.passes.masks.slopes import same_slopes, slopes_of
from fxport.passes.masks.values import constant_value

__all__ = ["FORBIDDEN", "Proof", "Prover", "hard_limit", "is_forbidding", "joint_effect"]

FORBIDDEN = -1e4
HARD = -(2.0**24)
MAX_ENTRIES = 2**27  # of a mask that is computed: 11,585 tokens square, 1 GiB as int64


@dataclass(frozen=True)
class Proof:
    """What is known of a constant mask for every length that can occur.

    Attributes:
        band: the allowed keys; None when they are no band, or nothing is known.
        slopes: ALiBi slopes, float ``[Hq]``, when a bias is that and nothing else.
        rest: a bias or pattern is left that `band` and `slopes` do not express.
        why: in words, why.
        known: whether the values could be looked at.
        finite: some key is forbidden by a finite number rather than by -inf.
        lowered: and by adding it, not by filling.
        ceiling: the highest number that a forbidden score is set to.
        likely: the band there is if numbers up to `FORBIDDEN` forbid by being added, too.
        spread: scores of a row must differ by less for that.
    """

    band: Band | None
    slopes: Tensor | None = None
    rest: bool = False
    why: str = ""
    known: bool = True
    finite: bool = False
    lowered: bool = False
    ceiling: float = -math.inf
    likely: Band | None = None
    spread: float = math.inf


def is_forbidding(value: float) -> bool:
    """Whether a score set to this number gets weight 0, scores being what they usually are."""
    return value <= FORBIDDEN


def hard_limit(scores: fx.Node) -> float:
    """A score that is set to this number, or lowered by it, gets weight 0."""
    return max(HARD, torch.finfo(scores.meta["val"].dtype).min / 2)


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
        rows, columns = (_number(size, sizes) for size in lengths)
        if max([rows * columns, *(_entries(t, sizes) for t in reachable(tensors))]) > MAX_ENTRIES:
            return Proof(None, rest=True, why="the mask is too large to look at", known=False)
        try:
            values = [
                None if s.tensor is None or r is None else _value(s.tensor, r, sizes)
                for s, r in zip(steps, recipes, strict=True)
            ]
            effect = joint_effect(steps, values, rows, columns, anchored)
            empties = effect is not None and effect.empties_rows(columns)
        # Running the user's operations at a length that they may not support.
        except (ValueError, RuntimeError, IndexError) as error:
            return Proof(None, rest=True, why=f"the mask has no value: {error}", known=False)
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


# -- what the values are ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """What masks do at given lengths.

    Attributes:
        allowed: bool ``[b, h, Tq, Tk]``, b and h may be 1.
        bias: what is added to allowed scores, broadcastable likewise; None: nothing.
        raw: the same, with what is added to forbidden ones.
        finite, lowered, ceiling: see `Proof`.
        rounding, eps: of what is added, see `slopes_of`.
        anchored: see `Prover.prove`.
    """

    allowed: Tensor
    bias: Tensor | None
    raw: Tensor | None
    finite: bool
    lowered: bool
    ceiling: float
    rounding: float
    eps: float
    anchored: bool

    def empties_rows(self, columns: int) -> bool:
        """Whether some row has no allowed key."""
        rows = self.allowed.expand(*self.allowed.shape[:-1], columns).any(-1)
        return not bool(rows.all())

    def proof(self) -> Proof:
        found = Proof(None, None, False, "", True, self.finite, self.lowered, self.ceiling)
        slopes = None
        if self.raw is not None:
            slopes = slopes_of(self.raw, self.allowed, self.rounding, self.eps, self.anchored)
        band = band_of(_only(self.allowed))
        if slopes is not None and band is not None:
            return replace(found, band=band, slopes=slopes)
        if self.bias is not None:
            likely, spread = self._likely()
            return replace(found, rest=True, why=self._added(), likely=likely, spread=spread)
        if band is None:
            why = "the allowed keys are no band around the diagonal"
            return replace(found, rest=True, why=why)
        return replace(found, band=band)

    def _likely(self) -> tuple[Band | None, float]:
        """See `Proof`; no band where something else is added, or a row is left without a key."""
        assert self.bias is not None
        low = self.bias <= FORBIDDEN
        seen = _only(self.allowed & ~low)
        if seen is None or not bool(seen.any(-1).all()):
            return None, math.inf
        if bool((self.bias.masked_fill(low | ~self.allowed, 0.0) != 0).any()):
            return None, math.inf
        highest = float(self.bias.masked_fill(~(low & self.allowed), -math.inf).max())
        return band_of(seen), -highest

    def _added(self) -> str:
        assert self.bias is not None
        lowest = float(self.bias.masked_fill(~self.allowed, 0.0).min())
        if is_forbidding(lowest):
            return (
                f"it adds {lowest:g}, which forbids nothing where scores differ by as much"
                f" (-inf does, and {HARD:g} or less)"
            )
        return "it adds a bias"

    def agrees(self, proof: Proof) -> bool:
        """Whether a proof made at another length says the truth here."""
        if proof.rest:
            return proof.likely is None or self._likely() == (proof.likely, proof.spread)
        assert proof.band is not None
        same_keys = proof.band.equals(self.allowed)
        if proof.slopes is None:
            return self.bias is None and same_keys
        same = self.raw is not None and same_slopes(
            proof.slopes, self.raw, self.allowed, self.rounding, self.eps, self.anchored
        )
        return same and same_keys


def joint_effect(
    steps: Sequence[MaskStep],
    values: Sequence[Tensor | None],
    rows: int,
    columns: int,
    anchored: bool,
) -> Effect | None:
    """The effect of masks one after the other; None for combinations without a rule.

    Args:
        values: per step its tensor, broadcastable to ``[b, h, rows, columns]``.
        anchored: see `Prover.prove`.
    """
    allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(1, 1, rows, columns)
    zeroed = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    bias: Tensor | None = None
    finite = lowered = False
    rounding, eps, ceiling = 0.0, torch.finfo(torch.float64).eps, -math.inf
    for step, value in zip(steps, values, strict=True):
        if step.kind is MaskKind.CAUSAL:
            allowed = allowed & Band(None, 0).matrix(rows, columns)
        elif step.kind is MaskKind.FLOOR:
            if not is_forbidding(step.number):
                return None
            finite, ceiling = True, max(ceiling, step.number)
        elif step.kind is MaskKind.FILL:
            assert value is not None
            mask = value.bool()
            if not is_forbidding(step.number):
                return None
            finite, ceiling = finite or step.number != -math.inf, max(ceiling, step.number)
            allowed = allowed & mask if step.inverted else allowed > mask  # makes no ~mask
        elif step.kind is MaskKind.KEEP:
            assert value is not None
            if not bool(((value == 0) | (value == 1)).all()):
                return None
            allowed = allowed & (value == 1)
        elif step.kind is MaskKind.MULTIPLY:
            assert value is not None
            if not bool(((value == 0) | (value == 1)).all()):
                return None
            zeroed = zeroed | (value == 0)
            if bool((zeroed & ~allowed).any()) or bias is not None:
                return None
        else:
            assert value is not None
            added = value.double() * step.number
            if bool(added.isnan().any()) or bool((added > -FORBIDDEN / 2).any()):
                return None  # a forbidden score might come back by it
            limit = hard_limit(step.node)
            lowered = lowered or bool(((added <= FORBIDDEN) & added.isfinite()).any())
            allowed = allowed & (added > limit)
            ceiling += max(float(added.max()), 0.0)
            bias = _sum(bias, added.masked_fill(added <= limit, 0.0))
            rounding, eps = max(rounding, _rounding(step)), max(eps, _eps(step))
    if bias is not None and bool(zeroed.any()):  # 0 + bias is the bias, filled in
        filled = zeroed & allowed & (bias <= FORBIDDEN)
        ceiling = max(ceiling, float(bias.masked_fill(~filled, -math.inf).max()))
        allowed, bias = allowed & ~filled, bias.masked_fill(filled, 0.0)
    if bool((zeroed & allowed).any()):
        return None
    nothing = bias is None or not bool(((bias != 0) & allowed).any())
    adds, finite = None if nothing else bias, finite or lowered
    return Effect(allowed, adds, bias, finite, lowered, ceiling, rounding, eps, anchored)


def _rounding(step: MaskStep) -> float:
    """Of the sum: a coarse table added to finer scores is not rounded by them."""
    dtype = step.node.meta["val"].dtype
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.finfo(dtype).eps / 2 if half else 0.0


def _eps(step: MaskStep) -> float:
    dtype = step.node.meta["val"].dtype
    return torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps


def _sum(left: Tensor | None, right: Tensor) -> Tensor:
    return right if left is None else left + right


def _only(allowed: Tensor) -> Tensor | None:
    """The ``[Tq, Tk]`` mask that all batch entries and heads share; None if they differ."""
    flat = allowed.reshape(-1, *allowed.shape[-2:])
    return flat[0] if len(flat) == 1 or bool((flat == flat[:1]).all()) else None
