"""Decides for each mask of an attention: a flag of the op, ALiBi slopes, or a dense bias.

constant, proven a band           causal, window_left, window_right
constant, linear in the distance  alibi_slopes
constant, anything else           bias (reported: it costs memory)
learned, or from the data         bias
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxport.errors import ReasonCode
from fxport.passes.attention.bounds import Bounds
from fxport.passes.attention.empty_rows import (
    check_emptied,
    check_filled,
    check_kept,
    check_mended,
    check_shift,
)
from fxport.passes.attention.factors import is_finite
from fxport.passes.attention.frame import Frame
from fxport.passes.attention.layout import product
from fxport.passes.attention.learned import is_learned_product, lowest_of
from fxport.passes.attention.site import Left, MaskKind, MaskStep, Match
from fxport.passes.graph_facts import GraphFacts, Source
from fxport.passes.masks.bands import FULL, Band
from fxport.passes.masks.effects import Proof, hard_limit, is_forbidding
from fxport.passes.masks.prover import Prover

__all__ = ["MaskPlan", "plan_masks"]

aten = torch.ops.aten


@dataclass(frozen=True)
class MaskPlan:
    """How the masks of one attention are expressed.

    Attributes:
        band, slopes: proven, for every length.
        dense: steps that stay a tensor, in order.
        origin: of those: "constant", "learned" or "data".
        unproven: why constant steps are among them, or "".
        relied_on: buffers that the proof read.
        exact_rows: rows without an allowed key need care (see `bias`).
        adds: some mask, proven or not, is added to the scores rather than filled in.
        above: some score of every row must be, for the finite number that masked scores become
            to forbid them; None where it does in any case.
        spread: scores of a row must differ by less, for the number that is added to masked ones
            to forbid them; None where nothing is assumed.
    """

    band: Band
    slopes: Tensor | None
    dense: tuple[MaskStep, ...]
    origin: str
    unproven: str
    relied_on: tuple[str, ...]
    exact_rows: bool
    adds: bool
    above: float | None
    spread: float | None


# exp(-100) is nothing beside 1, in float64 too, and for any number of keys.
_MARGIN = 100.0


@dataclass(frozen=True)
class _Masks:
    """The masks of one attention, sorted by where they come from.

    Attributes:
        steps, sources: all of them, in order.
        fixed: constants, which can be proven.
        open: learned ones, and those from the data.
        from_data: one of `open` may leave a row without any key.
        low: a learned bias holds a mask as well.
    """

    steps: tuple[MaskStep, ...]
    sources: tuple[Source, ...]
    fixed: list[MaskStep]
    open: list[MaskStep]
    from_data: bool
    low: bool

    @classmethod
    def of(cls, facts: GraphFacts, match: Match) -> _Masks:
        sources = tuple(_source(facts, step) for step in match.steps)
        pairs = list(zip(match.steps, sources, strict=True))
        open_ = [(s, f) for s, f in pairs if f not in Source.BUFFER]
        return cls(
            steps=match.steps,
            sources=sources,
            fixed=[s for s, f in pairs if f in Source.BUFFER],
            open=[s for s, _ in open_],
            from_data=any(_may_empty(facts, s, f) for s, f in open_),
            low=any(s.adds and _is_low(f, s) for s, f in open_),
        )

    def never_low(self, facts: GraphFacts, lowering: bool) -> list[MaskStep]:
        """Those that are added and forbid no key."""
        pairs = zip(self.steps, self.sources, strict=True)
        return [s for s, f in pairs if s.adds and _never_low(facts, s, f, lowering)]

    def origin(self, dense: list[MaskStep]) -> str:
        """Where those that stay a tensor come from."""
        pairs = zip(self.steps, self.sources, strict=True)
        return _origin([f for s, f in pairs if s in dense])


@dataclass(frozen=True)
class _Form:
    """What becomes flags, and what stays a tensor; see `MaskPlan`."""

    dense: list[MaskStep]
    band: Band = FULL
    slopes: Tensor | None = None
    unproven: str = ""
    spread: float | None = None


def plan_masks(
    prover: Prover, facts: GraphFacts, match: Match, frame: Frame, *, assume_spread: bool
) -> MaskPlan:
    """Decides.

    Args:
        assume_spread: see `rewrite_attention`.

    Raises:
        Left: the masks cannot be expressed without changing the result.
    """
    masks = _Masks.of(facts, match)
    check_filled(match, masks.from_data)
    zero_rows = masks.from_data or (match.zero_rows and not match.infinite_rows)
    anchored = match.sinks is not None
    proof = prover.prove(masks.fixed, frame, zero_rows, anchored, match.infinite_rows)
    _check_again(prover, facts, match, frame, masks, proof)
    check_kept(masks.open, proof.finite or not proof.known)
    form = _form(match, masks, proof, frame, assume_spread)
    dense = form.dense
    _check_dense(dense, proof)
    _check_keys(match, dense)
    above = _above(match, proof, masks.open)
    exact_rows = not match.zero_rows and (masks.from_data or (proof.rest and not proof.known))
    sure = masks.never_low(facts, proof.lowered or not proof.known)
    if exact_rows:
        check_mended(match)
    bounds = Bounds(facts)
    if (masks.from_data or masks.low) and not match.zero_rows:
        check_emptied(dense, sure, bounds)
    if exact_rows:
        check_shift(match, sure)
    used = [s for s in masks.fixed if s not in dense]
    used += [match.again] if match.again is not None else []
    return MaskPlan(
        band=form.band,
        slopes=form.slopes,
        dense=tuple(dense),
        origin=masks.origin(dense),
        unproven=form.unproven if any(s in dense for s in masks.fixed) else "",
        relied_on=facts.buffers([*(s.tensor for s in used if s.tensor is not None), *bounds.read]),
        exact_rows=exact_rows,
        adds=any(s.adds for s in match.steps),
        above=above,
        spread=form.spread,
    )


def _form(match: Match, masks: _Masks, proof: Proof, frame: Frame, assume_spread: bool) -> _Form:
    """Flags where they are proven and say everything, tensors otherwise."""
    everything = list(match.steps)
    if proof.rest and proof.likely is not None and assume_spread and not masks.open:
        form = _Form([], proof.likely, spread=proof.spread - _MARGIN)
    elif proof.rest:
        form = _Form(everything, unproven=proof.why)
    elif (masks.from_data or masks.low) and _mixes_finite(proof, masks.open):
        form = _Form(everything)
    else:
        assert proof.band is not None
        form = _Form(masks.open, proof.band, proof.slopes)
    if _expressible(form, frame):
        return form
    return _Form(everything, unproven="no flag says which keys are allowed")


def _check_again(
    prover: Prover,
    facts: GraphFacts,
    match: Match,
    frame: Frame,
    masks: _Masks,
    proof: Proof,
) -> None:
    """Weights that are masked after the softmax must be 0 there already.

    Raises:
        Left: they may not be; or a row that the data empties would show the difference.
    """
    again = match.again
    if again is None:
        return
    constant = again.tensor is not None and _source(facts, again) in Source.BUFFER
    if constant and not masks.from_data and not proof.rest:
        both = prover.prove([*masks.fixed, again], frame, True, match.sinks is not None)
        if not both.rest and both.band == proof.band:
            return
    raise Left(
        ReasonCode.UNSUPPORTED_FEATURE,
        "the weights are masked after the softmax, with more than the scores are known to be"
        if constant or again.kind is MaskKind.FILL
        else "the weights are multiplied by something else for every key",
        again.node,
        "mask the scores with float('-inf') before the softmax",
    )


def _above(match: Match, proof: Proof, open_: list[MaskStep]) -> float | None:
    """Masked scores may be higher than others of their row, unless those are above this."""
    ceiling = proof.ceiling
    for index, step in enumerate(match.steps):
        if step.kind in (MaskKind.FILL, MaskKind.FLOOR):
            ceiling = max(ceiling, step.number)
        limit = hard_limit(step.node)
        later = match.steps[index + 1 :]
        if ceiling > limit and any(s.adds and s in open_ for s in later):
            raise Left(
                ReasonCode.ORDER_OF_OPS,
                f"a bias is added to scores that are masked with {ceiling:g}",
                step.node,
                "fill with float('-inf'), or mask last",
            )
    return ceiling + _MARGIN if match.steps and ceiling > limit else None


def _source(facts: GraphFacts, step: MaskStep) -> Source:
    if step.tensor is None:
        return Source.CONSTANT
    source = facts.source(step.tensor)
    if Source.MUTATED in source:
        raise Left(
            ReasonCode.MUTATED_IN_PLACE,
            "something may write into the mask in place, so its value cannot be told",
            step.tensor,
            "build the mask without in-place assignment (torch.where, tril, comparisons)",
        )
    return source


def _mixes_finite(proof: Proof, open_: list[MaskStep]) -> bool:
    """Rows that data may empty depend on every finite fill, constant ones included."""
    return proof.finite or any(s.kind is MaskKind.FILL and s.number != float("-inf") for s in open_)


def _expressible(form: _Form, frame: Frame) -> bool:
    """Whether flags of the op say it.

    Windows that do not contain the diagonal have none, and chunks have one only where there is no
    tensor beside it, and as many queries as keys.
    """
    band = form.band
    if band.chunk is not None and (form.dense or product(frame.query) != product(frame.key)):
        return False
    lower_fits = band.lower is None or band.lower <= 0
    upper_fits = band.upper is None or band.upper >= 0
    return lower_fits and upper_fits and (not band.from_end or band.upper == 0)


def _check_dense(dense: list[MaskStep], proof: Proof) -> None:
    for index, step in enumerate(dense):
        later = dense[index + 1 :]
        finite_fill = step.kind is MaskKind.FILL and step.number != float("-inf")
        if step.kind is MaskKind.KEEP and not step.logarithm:
            raise Left(
                ReasonCode.MASK_NOT_PROVEN,
                "the weights are multiplied by a mask that is not proven to be of zeros and ones"
                " or to be causal" + (f": {proof.why}" if proof.why else ""),
                step.node,
                "fill the scores with float('-inf') before the softmax",
            )
        if step.kind is MaskKind.FLOOR and not is_forbidding(step.number):
            raise Left(
                ReasonCode.UNSUPPORTED_FEATURE,
                f"the scores are clamped at {step.number:g}, which changes allowed ones",
                step.node,
                "drop the clamp: the softmax is computed without overflow",
            )
        if step.kind in (MaskKind.MULTIPLY, MaskKind.FLOOR):
            raise Left(
                ReasonCode.MASK_NOT_PROVEN,
                "scores are multiplied by, or clamped at, a mask that is not proven"
                + (f": {proof.why}" if proof.why else "")
                if proof.rest
                else "scores are multiplied by, or clamped at, a mask, and others from the data "
                "come on top: what rows without any key give depends on all of them",
                step.node,
                "use masked_fill with float('-inf')",
            )
        if step.kind is MaskKind.FILL and not is_forbidding(step.number):
            raise Left(
                ReasonCode.UNSUPPORTED_FEATURE,
                f"masked scores become {step.number:g}, which does not forbid them",
                step.node,
                "use float('-inf') or torch.finfo(dtype).min",
            )
        if finite_fill and any(s.adds for s in later):
            raise Left(
                ReasonCode.ORDER_OF_OPS,
                "a bias is added after a finite masked_fill",
                step.node,
                "fill with float('-inf'), or mask last",
            )
    fills = {s.number for s in dense if s.kind is MaskKind.FILL} - {float("-inf")}
    if len(fills) > 1:
        raise Left(
            ReasonCode.EMPTY_ROW,
            "scores are masked with several finite numbers",
            dense[-1].node,
            "use one number for all masks",
        )


def _check_keys(match: Match, dense: list[MaskStep]) -> None:
    """A key times infinity is NaN, which a fill hides from the softmax and a bias does not."""
    hidden = not all(step.adds for step in dense)
    for scale in match.key_scales if hidden else ():
        assert isinstance(scale.factor, fx.Node)
        if scale.divide or not is_finite(scale.factor):
            raise Left(
                ReasonCode.UNSUPPORTED_FEATURE,
                "the scores have a factor for each key that may be infinite, or are divided by one"
                " that may be 0, where a mask that is no flag hides the key",
                scale.factor,
                "normalise the keys themselves (F.normalize), which divides by no 0",
            )


def _may_empty(facts: GraphFacts, step: MaskStep, source: Source) -> bool:
    """Whether a step that is not constant may leave rows without any key."""
    if not step.adds or step.tensor is None:
        return True
    if Source.DATA in source:
        return not is_learned_product(facts, step.tensor)
    return lowest_of(step.tensor) == -math.inf


def _never_low(facts: GraphFacts, step: MaskStep, source: Source, lowering: bool) -> bool:
    """Whether adding this value forbids no key: learned, or a constant that was looked at."""
    if Source.DATA in source or step.tensor is None:
        return is_learned_product(facts, step.tensor)
    if Source.PARAMETER in source:
        return not _is_low(source, step)
    return not lowering


def _is_low(source: Source, step: MaskStep) -> bool:
    """Whether a learned bias holds a mask as well."""
    if Source.DATA in source or Source.PARAMETER not in source or step.tensor is None:
        return False
    return is_forbidding(min(lowest_of(step.tensor), -abs(step.number)))


def _origin(sources: list[Source]) -> str:
    if any(Source.DATA in s for s in sources):
        return "data"
    if any(Source.PARAMETER in s for s in sources):
        return "learned"
    return "constant" if sources else ""
