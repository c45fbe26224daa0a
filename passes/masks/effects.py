"""What masks do to the scores, one after the other: which keys they leave, and what they add.

    masked_fill(.., ~(j <= i), -inf), then + slopes * (j - i)     ->  causal, ALiBi slopes

Which finite numbers forbid a key:

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

import torch
from torch import Tensor, fx

from fxport.passes.attention.site import MaskKind, MaskStep
from fxport.passes.masks.bands import Band, band_of
from fxport.passes.masks.landmarks import Landmarks
from fxport.passes.masks.slopes import same_slopes, slopes_of

__all__ = ["FORBIDDEN", "Effect", "Proof", "hard_limit", "is_forbidding", "joint_effect"]

FORBIDDEN = -1e4
HARD = -(2.0**24)


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
        marks: which rows and columns were looked at; None: all.
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
    marks: Landmarks | None = None

    def empties_rows(self) -> bool:
        """Whether some row has no allowed key."""
        return not bool(self.allowed.any(-1).all())

    @property
    def _places(self) -> Tensor | None:
        return None if self.marks is None else self.marks.places

    def proof(self) -> Proof:
        found = Proof(None, None, False, "", True, self.finite, self.lowered, self.ceiling)
        slopes = None
        if self.raw is not None and self.marks is None:
            slopes = slopes_of(self.raw, self.allowed, self.rounding, self.eps, self.anchored)
        band = band_of(_only(self.allowed), self._places)
        if band is not None and self.marks is not None and not self.marks.tell(band):
            band = None
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
        same_keys = proof.band.equals(self.allowed, self._places)
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
    marks: Landmarks | None = None,
) -> Effect | None:
    """The effect of masks one after the other; None for combinations without a rule.

    Args:
        values: per step its tensor, broadcastable to ``[b, h, rows, columns]``.
        anchored, marks: see `Effect`.
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
    return Effect(allowed, adds, bias, finite, lowered, ceiling, rounding, eps, anchored, marks)


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
