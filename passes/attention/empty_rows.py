"""Refuses the attentions whose rows without any key would come out differently.

A softmax over scores that are all -inf is NaN, over scores that are all one finite number the mean
of the values; and people mend either before or after. One call gives one of these.
"""

from __future__ import annotations

import math

from fxport.errors import ReasonCode
from fxport.passes.attention.bounds import Bounds
from fxport.passes.attention.site import Left, MaskKind, MaskStep, Match, Shift
from fxport.passes.masks.effects import hard_limit

__all__ = ["check_emptied", "check_filled", "check_kept", "check_mended", "check_shift"]


def check_filled(match: Match, from_data: bool) -> None:
    """A row of one finite number gives the mean of all values, where one of -inf gives zeros.

    Raises:
        Left: data may leave rows of either kind.
    """
    if not match.infinite_rows or not from_data:
        return
    for step in match.steps:
        if step.kind in (MaskKind.FILL, MaskKind.FLOOR) and step.number != -math.inf:
            raise Left(
                ReasonCode.EMPTY_ROW,
                "scores are masked with a finite number, and a row without any key gives zeros "
                "only if all of its scores are -inf",
                step.node,
                "use float('-inf') for every mask",
            )


def check_kept(from_data: list[MaskStep], finite: bool) -> None:
    """Weights that data masks after the softmax, and that are divided by their sum then.

    Args:
        finite: some key may be forbidden by a finite number before: its weight is 0 already.

    Raises:
        Left: of a row without any other key the original makes 0 / 0.
    """
    kept = next((s for s in from_data if s.kind is MaskKind.KEEP), None)
    if finite and kept is not None:
        raise Left(
            ReasonCode.EMPTY_ROW,
            "scores are masked with a finite number, and weights by the data after the softmax: "
            "a row without any key gives NaN, not a mean of what the number forbids",
            kept.node,
            "use one mask, of float('-inf'), before the softmax",
        )


def check_mended(match: Match) -> None:
    """What is done about NaN beside the softmax must not meet rows without any key.

    Raises:
        Left: it may.
    """
    if match.without_nan:
        raise Left(
            ReasonCode.EMPTY_ROW,
            "a mask that is not a fill with -inf may leave a row without any key, and what NaN "
            "weights give is replaced after the softmax",
            match.start,
            "use masked_fill with float('-inf') for every mask",
        )
    if match.finite is not None:
        raise Left(
            ReasonCode.EMPTY_ROW,
            "a mask may leave a row without any key, and scores that are NaN or infinite are "
            "replaced before: which of both it was cannot be told",
            match.finite,
            "drop nan_to_num from the scores",
        )
    if match.sinks is not None:
        raise Left(
            ReasonCode.EMPTY_ROW,
            "a mask may leave a row without any key, where this sink gives NaN",
            match.start,
            "add the sink as a column of the scores, or bound the maximum from below by 0",
        )


def check_emptied(dense: list[MaskStep], sure: list[MaskStep], bounds: Bounds) -> None:
    """Rows left without keys by an added finite number share their weight with filled keys.

    Raises:
        Left: a number is filled in beside one that is added, and may be as low.
    """
    fill = next((s for s in dense if s.kind is MaskKind.FILL and s.number != -math.inf), None)
    added = [s for s in dense if s.adds and s not in sure]
    if fill is None or not added or _stays_above(fill, added, bounds):
        return
    raise Left(
        ReasonCode.EMPTY_ROW,
        "one mask is added and another is filled in with a finite number: "
        "rows without any key come out as a mixture of both",
        fill.node,
        "use masked_fill with float('-inf'), or one mask for both",
    )


def _stays_above(fill: MaskStep, added: list[MaskStep], bounds: Bounds) -> bool:
    """Whether no key that is not filled comes anywhere near the number that others become."""
    if fill.number > hard_limit(fill.node):
        return False
    total = 0.0
    for step in added:
        if step.kind is not MaskKind.ADD or step.tensor is None or step.number <= 0:
            return False
        total += bounds.lowest(step.tensor) * step.number
    return total > fill.number / 2


def check_shift(match: Match, sure: list[MaskStep]) -> None:
    """Rows without a key give what a softmax gives, where all of their scores are -inf.

    Raises:
        Left: they may be finite, and nothing of the row is subtracted; or a NaN leaves its row.
    """
    finite = [
        s
        for s in match.steps
        if s not in sure and (s.kind is MaskKind.ADD or s.number != -math.inf)
    ]
    if match.shift is Shift.WHOLE or (match.shift is Shift.NONE and finite):
        raise Left(
            ReasonCode.EMPTY_ROW,
            "a mask may leave a row without any key, and exponentials are taken without the row's "
            "maximum: their sum may be 0",
            finite[0].node if finite else match.start,
            "softmax(x), or subtract x.amax(-1, keepdim=True) first",
        )
