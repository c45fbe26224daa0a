"""Proves what a constant mask is: its values are computed and compared with what they are called.

    masked_fill(s, buffer[:, :, :T, :T] == 0, -inf)          ->  causal
    s + full((T, T), -inf).triu(1)                           ->  causal
    where((i - j >= 0) & (i - j < 128), s, finfo.min)        ->  causal, window_left = 127
    s + slopes * (j - i), masked_fill(..., -inf)             ->  causal, ALiBi slopes

Several masks on one attention count by their joint effect. A finite number forbids a key if it is
at most `FORBIDDEN`: next to any score s that is allowed, ``exp(FORBIDDEN - s)`` is 0 in float32
and float64 as long as scores differ by less than 9000 within a row. Finite numbers above it do
not forbid: they are a bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fxport.capture.arguments import shape_of
from fxport.errors import ReasonCode
from fxport.passes.attention_frame import Frame, Recipe, recipe
from fxport.passes.attention_layout import Size, product
from fxport.passes.attention_site import Left, MaskKind, MaskStep
from fxport.passes.graph_facts import GraphFacts, reachable
from fxport.passes.mask_keys import Keys
from fxport.passes.mask_scope import scope_of
from fxport.passes.mask_slopes import same_slopes, slopes_of
from fxport.passes.mask_values import constant_value

__all__ = ["FORBIDDEN", "FULL", "Band", "Proof", "Prover", "band_of", "is_forbidding"]

FORBIDDEN = -1e4
HARD = -1e8
MAX_ENTRIES = 2**27  # of a mask that is computed: 11,585 tokens square, 1 GiB as int64


@dataclass(frozen=True)
class Band:
    """Row i sees column j iff ``lower <= j - i <= upper``; None: without limit.

    `from_end`: `upper` and `lower` count from ``Tk - Tq`` (the last row sees the last column).
    """

    lower: int | None
    upper: int | None
    from_end: bool = False

    def matrix(self, rows: int, columns: int) -> Tensor:
        """The mask itself, bool ``[rows, columns]``."""
        offset = columns - rows if self.from_end else 0
        distance = torch.arange(columns) - torch.arange(rows)[:, None] - offset
        allowed = torch.ones(rows, columns, dtype=torch.bool)
        if self.lower is not None:
            allowed &= distance >= self.lower
        if self.upper is not None:
            allowed &= distance <= self.upper
        return allowed

    def __str__(self) -> str:
        if self.upper == 0:
            words = "causal" if not self.from_end else "causal from the end"
            return words if self.lower is None else f"{words}, window {1 - self.lower}"
        if self.upper is None and self.lower is None:
            return "full"
        return f"window from {self.lower} to {self.upper}"


FULL = Band(None, None)


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
    """

    band: Band | None
    slopes: Tensor | None = None
    rest: bool = False
    why: str = ""
    known: bool = True
    finite: bool = False
    lowered: bool = False


def is_forbidding(value: float) -> bool:
    """Whether a score set to (or lowered by) this number gets weight 0."""
    return value <= FORBIDDEN


class Prover:
    """Proves the masks of one graph; layers with equal masks are looked at once."""

    def __init__(self, facts: GraphFacts) -> None:
        self._facts = facts
        self._keys = Keys(facts.gm)
        self._proofs: dict[Any, Proof | Left] = {}

    def prove(self, steps: Sequence[MaskStep], frame: Frame, zero_rows: bool) -> Proof:
        """The joint effect of constant steps.

        Raises:
            Left: some row has no allowed key, where the original gives NaN or a mean.
        """
        if not steps:
            return Proof(FULL)
        lengths = product(frame.query), product(frame.key)
        recipes = [_recipe(step, frame) for step in steps]
        key = (
            tuple(
                (s.kind, self._keys.of(s.tensor), s.number, s.inverted, r)
                for s, r in zip(steps, recipes, strict=True)
            ),
            lengths,
            zero_rows,
        )
        if key not in self._proofs:
            try:
                self._proofs[key] = _prove(steps, recipes, lengths, zero_rows)
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
) -> Proof:
    tensors = [s.tensor for s in steps if s.tensor is not None]
    points, why = _points(tensors, lengths)
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
            effect = joint_effect(steps, values, rows, columns)
        # Running the user's operations at a length that they may not support.
        except (ValueError, RuntimeError, IndexError) as error:
            return Proof(None, rest=True, why=f"the mask has no value: {error}", known=False)
        if effect is None:
            why = "masks are combined in a way that is not understood"
            return Proof(None, rest=True, why=why, known=False)
        if (
            not zero_rows
            and not effect.allowed.expand(*effect.allowed.shape[:-1], columns).any(-1).all()
        ):
            raise Left(
                ReasonCode.EMPTY_ROW,
                "the mask leaves some query without any key",
                None,
                "let every token see at least itself",
            )
        found = effect.proof() if found is None else found
        if not effect.agrees(found):
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


def _points(
    tensors: Sequence[fx.Node], lengths: Lengths
) -> tuple[list[dict[sympy.Symbol, int]], str]:
    """Sizes that decide all, largest first; or none, and why."""
    symbols = _symbols(tensors, lengths)
    of_length = sorted(
        {s for size in lengths if not isinstance(size, int) for s in size.free_symbols}, key=str
    )
    others = {s: 2 for s in symbols if s not in of_length}
    if not of_length:
        return [others], ""
    scope = scope_of(tensors, of_length)
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
        hard: like `allowed`, but biases down to `HARD` forbid nothing: far keys under ALiBi.
        raw: the sum of those biases, wherever they are.
        finite, lowered: see `Proof`.
        rounding: unit roundoff of what is added, 0 where it is float32's or finer.
    """

    allowed: Tensor
    bias: Tensor | None
    hard: Tensor
    raw: Tensor | None
    finite: bool
    lowered: bool
    rounding: float

    def proof(self) -> Proof:
        slopes = None if self.raw is None else slopes_of(self.raw, self.hard, self.rounding)
        if slopes is not None:
            band = band_of(_only(self.hard))
            if band is not None:
                return Proof(band, slopes, finite=self.finite, lowered=self.lowered)
        allowed = _only(self.allowed)
        band = None if allowed is None else band_of(allowed)
        if self.bias is not None:
            return Proof(
                None, rest=True, why="it adds a bias", finite=self.finite, lowered=self.lowered
            )
        if band is None:
            why = "the allowed keys are no band around the diagonal"
            return Proof(None, rest=True, why=why, finite=self.finite, lowered=self.lowered)
        return Proof(band, finite=self.finite, lowered=self.lowered)

    def agrees(self, proof: Proof) -> bool:
        """Whether a proof made at another length says the truth here."""
        if proof.rest:
            return True
        assert proof.band is not None
        expected = proof.band.matrix(*self.allowed.shape[-2:])
        if proof.slopes is None:
            return self.bias is None and bool((self.allowed == expected).all())
        same = self.raw is not None and same_slopes(
            proof.slopes, self.raw, self.hard, self.rounding
        )
        return same and bool((self.hard == expected).all())


def joint_effect(
    steps: Sequence[MaskStep], values: Sequence[Tensor | None], rows: int, columns: int
) -> Effect | None:
    """The effect of masks one after the other; None for combinations without a rule.

    Args:
        values: per step its tensor, broadcastable to ``[b, h, rows, columns]``.
    """
    allowed = torch.ones(1, 1, rows, columns, dtype=torch.bool)
    zeroed = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    bias: Tensor | None = None
    finite = lowered = False
    rounding = 0.0
    for step, value in zip(steps, values, strict=True):
        if step.kind is MaskKind.CAUSAL:
            allowed = allowed & Band(None, 0).matrix(rows, columns)
        elif step.kind is MaskKind.FLOOR:
            if not is_forbidding(step.number):
                return None
            finite = True
        elif step.kind is MaskKind.FILL:
            assert value is not None
            mask = ~value.bool() if step.inverted else value.bool()
            if not is_forbidding(step.number):
                return None
            finite = finite or step.number != float("-inf")
            allowed = allowed & ~mask
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
        elif value is not None and value.dtype == torch.bool:  # SDPA's: True may be seen
            allowed = allowed & value
        else:
            assert value is not None
            added = value.double() * step.number
            if bool(added.isnan().any()) or bool((added > -FORBIDDEN / 2).any()):
                return None  # a forbidden score might come back by it
            lowered = lowered or bool(((added <= FORBIDDEN) & added.isfinite()).any())
            allowed = allowed & (added > HARD)
            bias = _sum(bias, added.masked_fill(added <= HARD, 0.0))
            rounding = max(rounding, _rounding(step))
    hard = allowed
    if bias is not None:
        allowed = allowed & (bias > FORBIDDEN)
    if bool((zeroed & allowed).any()):
        return None
    nothing = bias is None or not bool(((bias != 0) & allowed).any())
    return Effect(
        allowed, None if nothing else bias, hard, bias, finite or lowered, lowered, rounding
    )


def _rounding(step: MaskStep) -> float:
    """Of the sum: a coarse table added to finer scores is not rounded by them."""
    dtype = step.node.meta["val"].dtype
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.finfo(dtype).eps / 2 if half else 0.0


def _sum(left: Tensor | None, right: Tensor) -> Tensor:
    return right if left is None else left + right


def _only(allowed: Tensor) -> Tensor | None:
    """The ``[Tq, Tk]`` mask that all batch entries and heads share; None if they differ."""
    flat = allowed.reshape(-1, *allowed.shape[-2:])
    return flat[0] if len(flat) == 1 or bool((flat == flat[:1]).all()) else None


def band_of(allowed: Tensor | None) -> Band | None:
    """The band that a bool ``[Tq, Tk]`` mask is, or None."""
    if allowed is None or not bool(allowed.any()):
        return None
    rows, columns = allowed.shape
    # The last row shows the lower edge, the first row the upper one.
    seen = [(i, allowed[i].nonzero().flatten()) for i in range(0, rows, max(rows - 1, 1))]
    low = min((int(c[0]) - i for i, c in seen if len(c)), default=0)
    high = max((int(c[-1]) - i for i, c in seen if len(c)), default=0)
    lower = None if low <= 1 - rows else low
    upper = None if high >= columns - 1 else high
    for band in _readings(lower, upper, rows, columns):
        if bool((band.matrix(rows, columns) == allowed).all()):
            return band
    return None


def _readings(lower: int | None, upper: int | None, rows: int, columns: int) -> list[Band]:
    readings = [Band(lower, upper)]
    if rows != columns:
        offset = columns - rows
        readings.append(
            Band(
                None if lower is None else lower - offset,
                None if upper is None else upper - offset,
                from_end=True,
            )
        )
    return sorted(readings, key=lambda b: b.upper != 0)  # causal, if one of them is
