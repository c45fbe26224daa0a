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
from fxport.passes.attention.checks import check_filled
from fxport.passes.attention.factors import is_finite
from fxport.passes.attention.frame import Frame
from fxport.passes.attention.learned import is_learned_product, lowest_of
from fxport.passes.attention.site import Left, MaskKind, MaskStep, Match, Shift
from fxport.passes.graph_facts import GraphFacts, Source
from fxport.passes.masks.bands import FULL, Band
from fxport.passes.masks.prover import Proof, Prover, hard_limit, is_forbidding

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


def plan_masks(
    prover: Prover, facts: GraphFacts, match: Match, frame: Frame, *, assume_spread: bool
) -> MaskPlan:
    """Decides.

    Args:
        assume_spread: see `rewrite_attention`.

    Raises:
        Left: the masks cannot be expressed without changing the result.
    """
    sources = [_source(facts, step) for step in match.steps]
    fixed = [s for s, f in zip(match.steps, sources, strict=True) if f in Source.BUFFER]
    open_ = [s for s, f in zip(match.steps, sources, strict=True) if f not in Source.BUFFER]
    from_data = any(
        _may_empty(facts, s, f) for s, f in zip(match.steps, sources, strict=True) if s in open_
    )
    low = any(
        s in open_ and s.adds and _is_low(f, s) for s, f in zip(match.steps, sources, strict=True)
    )
    anchored = match.sinks is not None
    check_filled(match, from_data)
    zero_rows = from_data or (match.zero_rows and not match.infinite_rows)
    proof = prover.prove(fixed, frame, zero_rows, anchored, match.infinite_rows)
    _check_again(prover, facts, match, frame, fixed, proof, from_data)
    dense = list(match.steps)
    band, slopes, unproven, spread = FULL, None, "", None
    if proof.rest and proof.likely is not None and assume_spread and not open_:
        band, dense, spread = proof.likely, [], proof.spread - _MARGIN
    elif proof.rest:
        unproven = proof.why
    elif not ((from_data or low) and _mixes_finite(proof, open_)):
        assert proof.band is not None
        band, slopes, dense = proof.band, proof.slopes, open_
    if not _expressible(band, match):
        band, slopes, dense, spread = FULL, None, list(match.steps), None
        unproven = "no flag says which keys are allowed"
    _check_dense(dense, proof)
    _check_keys(match, dense)
    above = _above(match, proof, open_)
    exact_rows = not match.zero_rows and (from_data or (proof.rest and not proof.known))
    if exact_rows and match.without_nan:
        raise Left(
            ReasonCode.EMPTY_ROW,
            "a mask that is not a fill with -inf may leave a row without any key, and what NaN "
            "weights give is replaced after the softmax",
            match.start,
            "use masked_fill with float('-inf') for every mask",
        )
    if exact_rows and match.finite is not None:
        raise Left(
            ReasonCode.EMPTY_ROW,
            "a mask may leave a row without any key, and scores that are NaN or infinite are "
            "replaced before: which of both it was cannot be told",
            match.finite,
            "drop nan_to_num from the scores",
        )
    if exact_rows and match.sinks is not None:
        raise Left(
            ReasonCode.EMPTY_ROW,
            "a mask may leave a row without any key, where this sink gives NaN",
            match.start,
            "add the sink as a column of the scores, or bound the maximum from below by 0",
        )
    lowering = proof.lowered or not proof.known
    sure = [
        s
        for s, f in zip(match.steps, sources, strict=True)
        if s.adds and _never_low(facts, s, f, lowering)
    ]
    if (from_data or low) and not match.zero_rows:
        _check_emptied(dense, sure)
    if exact_rows:
        _check_shift(match, sure)
    used = [s for s in fixed if s not in dense]
    used += [match.again] if match.again is not None else []
    return MaskPlan(
        band=band,
        slopes=slopes,
        dense=tuple(dense),
        origin=_origin([f for s, f in zip(match.steps, sources, strict=True) if s in dense]),
        unproven=unproven if any(s in dense for s in fixed) else "",
        relied_on=facts.buffers([s.tensor for s in used if s.tensor is not None]),
        exact_rows=exact_rows,
        adds=any(s.adds for s in match.steps),
        above=above,
        spread=spread,
    )


def _check_again(
    prover: Prover,
    facts: GraphFacts,
    match: Match,
    frame: Frame,
    fixed: list[MaskStep],
    proof: Proof,
    from_data: bool,
) -> None:
    """Weights that are masked after the softmax must be 0 there already.

    Raises:
        Left: they may not be; or a row that the data empties would show the difference.
    """
    again = match.again
    if again is None:
        return
    constant = again.tensor is not None and _source(facts, again) in Source.BUFFER
    if constant and not from_data and not proof.rest:
        both = prover.prove([*fixed, again], frame, True, match.sinks is not None)
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


def _expressible(band: Band, match: Match) -> bool:
    """Whether flags of the op say it; windows that do not contain the diagonal have none."""
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
    for scale in match.key_scales if dense else ():
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


def _check_emptied(dense: list[MaskStep], sure: list[MaskStep]) -> None:
    """Rows left without keys by an added finite number share their weight with filled keys."""
    fill = next((s for s in dense if s.kind is MaskKind.FILL and s.number != float("-inf")), None)
    if fill is not None and any(s.adds and s not in sure for s in dense):
        raise Left(
            ReasonCode.EMPTY_ROW,
            "one mask is added and another is filled in with a finite number: "
            "rows without any key come out as a mixture of both",
            fill.node,
            "use masked_fill with float('-inf'), or one mask for both",
        )


def _check_shift(match: Match, sure: list[MaskStep]) -> None:
    """Rows without a key give what a softmax gives, where all of their scores are -inf.

    Raises:
        Left: they may be finite, and nothing of the row is subtracted; or a NaN leaves its row.
    """
    finite = [
        s
        for s in match.steps
        if s not in sure and (s.kind is MaskKind.ADD or s.number != float("-inf"))
    ]
    if match.shift is Shift.WHOLE or (match.shift is Shift.NONE and finite):
        raise Left(
            ReasonCode.EMPTY_ROW,
            "a mask may leave a row without any key, and exponentials are taken without the row's "
            "maximum: their sum may be 0",
            finite[0].node if finite else match.start,
            "softmax(x), or subtract x.amax(-1, keepdim=True) first",
        )


def _origin(sources: list[Source]) -> str:
    if any(Source.DATA in s for s in sources):
        return "data"
    if any(Source.PARAMETER in s for s in sources):
        return "learned"
    return "constant" if sources else ""
