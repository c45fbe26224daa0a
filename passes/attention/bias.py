"""Emits what no flag expresses: dense biases, factors on q, and rows without an allowed key.

The op gives zeros where a row allows no key. The original gives NaN after a fill with -inf and
the mean of all filled values after a finite fill; both are kept:

    -inf     where(lse == -inf, nan * sum(v), out)       NaN there, and in the gradient of v; a
             fill keeps it from q and k. Where something is added they get it as well:
             out * where(lse == -inf, nan, 1) + where(lse == -inf, nan * sum(v), 0)
    finite   empty = every key of the row is filled
             q = q.masked_fill(empty, 0), and all filled keys are allowed in empty rows:
             equal weights, and no gradient to q and k, as with the fill
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.location import user_location
from fxport.errors import ReasonCode
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.factors import emit_logarithm
from fxport.passes.attention.frame import Frame, recipe
from fxport.passes.attention.layout import divides
from fxport.passes.attention.masks import MaskPlan
from fxport.passes.attention.site import Left, MaskKind, MaskStep, Match, RowScale

__all__ = ["Dense", "emit_checks", "emit_dense", "emit_row_scales", "restore_nan"]

aten = torch.ops.aten

_MINUS_INF = float("-inf")


@dataclass(frozen=True)
class Dense:
    """Nodes of the dense part.

    Attributes:
        bias: for the op, or None.
        empty: bool, rows of q to set to zero, broadcastable to ``[B, Hq, Tq, 1]``; or None.
        nan_rows: whether rows without an allowed key give NaN in the original.
        nan_in_scores: and that NaN may reach what the scores are made of.
    """

    bias: fx.Node | None
    empty: fx.Node | None
    nan_rows: bool
    nan_in_scores: bool


def emit_dense(emitter: Emitter, plan: MaskPlan, frame: Frame, dtype: torch.dtype) -> Dense:
    """Emits the dense steps of a plan; `dtype` is q's."""
    added: fx.Node | None = None
    infinite: fx.Node | None = None  # where the score is -inf by a fill
    filled: fx.Node | None = None  # where it is the finite number
    may_be_infinite = False
    for given in plan.dense:
        step = emit_logarithm(emitter, given)
        tensor = _aligned(emitter, step, frame)
        if step.kind is MaskKind.ADD:
            added = _plus(emitter, added, _term(emitter, tensor, step.number, dtype))
            may_be_infinite = True
            continue
        if tensor.meta["val"].dtype != torch.bool:
            tensor = emitter.call(aten.to.dtype, tensor, torch.bool)
        mask = emitter.call(aten.logical_not.default, tensor) if step.inverted else tensor
        if step.number == _MINUS_INF:
            infinite = _or(emitter, infinite, mask)
            filled = _and_not(emitter, filled, mask)
        else:
            filled = _or(emitter, filled, mask)
            infinite = _and_not(emitter, infinite, mask)
    nan_rows = plan.exact_rows and (infinite is not None or may_be_infinite)
    blocked = _or(emitter, infinite, filled) if filled is not None else infinite
    if blocked is None:
        return Dense(added, None, nan_rows, plan.adds)
    empty: fx.Node | None = None
    if filled is not None and plan.exact_rows:
        empty, blocked, added = _open_empty_rows(emitter, blocked, filled, added)
    if added is None:
        bias = emitter.call(aten.logical_not.default, blocked)
    else:
        bias = emitter.call(aten.masked_fill.Scalar, added, blocked, _MINUS_INF)
    return Dense(bias, empty, nan_rows, plan.adds)


def _open_empty_rows(
    emitter: Emitter, blocked: fx.Node, filled: fx.Node, added: fx.Node | None
) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    empty = emitter.call(aten.all.dim, blocked, -1, True)
    opened = emitter.call(aten.logical_and.default, empty, filled)
    blocked = _and_not(emitter, blocked, opened) or blocked
    if added is not None:
        added = emitter.call(aten.masked_fill.Scalar, added, empty, 0.0)
    return empty, blocked, added


def _aligned(emitter: Emitter, step: MaskStep, frame: Frame) -> fx.Node:
    assert step.tensor is not None
    return emitter.follow(step.tensor, recipe(shape_of(step.tensor), step.dims, frame))


def _term(emitter: Emitter, bias: fx.Node, factor: float, dtype: torch.dtype) -> fx.Node:
    found = bias.meta["val"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if not found.is_floating_point or found.itemsize > wide.itemsize:
        bias = emitter.call(aten.to.dtype, bias, wide)
    return bias if factor == 1 else emitter.call(aten.mul.Tensor, bias, factor)


def _plus(emitter: Emitter, left: fx.Node | None, right: fx.Node) -> fx.Node:
    return right if left is None else emitter.call(aten.add.Tensor, left, right)


def _or(emitter: Emitter, left: fx.Node | None, right: fx.Node) -> fx.Node:
    return right if left is None else emitter.call(aten.logical_or.default, left, right)


def _and_not(emitter: Emitter, left: fx.Node | None, right: fx.Node) -> fx.Node | None:
    if left is None:
        return None
    rest = emitter.call(aten.logical_not.default, right)
    return emitter.call(aten.logical_and.default, left, rest)


def emit_row_scales(
    emitter: Emitter, value: fx.Node, scales: Sequence[RowScale], frame: Frame
) -> fx.Node:
    """Moves factors that do not vary along the keys onto q, or onto the output."""
    dtype = value.meta["val"].dtype
    for scale in scales:
        factor = scale.factor
        if isinstance(factor, fx.Node) and isinstance(factor.meta["val"], torch.Tensor):
            factor = emitter.follow(factor, recipe(shape_of(factor), scale.dims, frame))
        value = emitter.call(aten.div.Tensor if scale.divide else aten.mul.Tensor, value, factor)
    if value.meta["val"].dtype != dtype:
        value = emitter.call(aten.to.dtype, value, dtype)
    return value


def emit_checks(emitter: Emitter, lse: fx.Node, plan: MaskPlan, match: Match) -> None:
    """Raises while it runs if scores are not what the rewriting took them for.

    So low that masked keys would get weight; or NaN or infinite, where those would be replaced.
    """
    if plan.above is not None:
        low = emitter.call(aten.le.Scalar, lse, plan.above)
        some = emitter.call(aten.gt.Scalar, lse, _MINUS_INF)  # no key at all is another matter
        failed = emitter.call(aten.any.default, emitter.call(aten.logical_and.default, low, some))
        passed = emitter.call(aten.logical_not.default, failed)
        text = f"scores below {plan.above:g} reach the number that they are masked with"
        _assert(emitter, passed, text, match.steps[-1].node, "mask with minus infinity instead")
    if match.finite is not None:
        sizes = emitter.call(aten.abs.default, lse)
        finite = emitter.call(aten.all.default, emitter.call(aten.lt.Scalar, sizes, math.inf))
        _assert(emitter, finite, "scores are NaN or infinite", match.finite, "drop nan_to_num")


def _assert(emitter: Emitter, passed: fx.Node, text: str, at: fx.Node, hint: str) -> None:
    place = user_location(at)
    text = f"fxport: attention {text}{f' ({place})' if place else ''}; {hint}"
    emitter.call(aten._assert_async.msg, passed, text.replace('"', "'"))


def restore_nan(
    emitter: Emitter, out: fx.Node, lse: fx.Node, call: fx.Node, in_scores: bool
) -> fx.Node:
    """NaN for rows without an allowed key, and in the gradients that the original spoils.

    Args:
        out, lse: of the op, ``[B, Hq, Tq, Dv]`` and ``[B, Hq, Tq]``.
        call: the op, with k ``[B, Hkv, Tk, D]``, v ``[B, Hkv, Tk, Dv]`` and a bias or None.
        in_scores: the NaN reaches what the scores are made of, too.
    """
    k, v, bias = (arguments(call)[name] for name in ("k", "v", "bias"))
    empty = emitter.call(aten.eq.Scalar, lse, _MINUS_INF)
    nothing = _nan_where(emitter, empty, lse, 0.0, out)
    total = _total(emitter, out, v, [2])
    rows = emitter.call(aten.unsqueeze.default, empty, -1)
    if not in_scores:
        spoilt = emitter.call(aten.mul.Tensor, nothing, total)
        return emitter.call(aten.where.self, rows, spoilt, out)
    # A kernel lets no NaN through to the keys that it skips: only both ways reach everything.
    total = emitter.call(aten.add.Tensor, total, _total(emitter, out, k, [2, 3]))
    if isinstance(bias, fx.Node) and bias.meta["val"].is_floating_point():
        total = emitter.call(aten.add.Tensor, total, _total(emitter, out, bias, [-1]))
    spoilt = emitter.call(aten.mul.Tensor, nothing, total)
    spoilt = emitter.call(aten.where.ScalarOther, rows, spoilt, 0.0)
    through = emitter.call(aten.mul.Tensor, out, _nan_where(emitter, empty, lse, 1.0, out))
    return emitter.call(aten.add.Tensor, through, spoilt)


def _nan_where(
    emitter: Emitter, empty: fx.Node, lse: fx.Node, elsewhere: float, out: fx.Node
) -> fx.Node:
    factor = emitter.call(aten.full_like.default, lse, elsewhere)
    factor = emitter.call(aten.masked_fill.Scalar, factor, empty, math.nan)
    factor = emitter.call(aten.unsqueeze.default, factor, -1)
    return emitter.call(aten.to.dtype, factor, out.meta["val"].dtype)


def _total(emitter: Emitter, out: fx.Node, value: object, over: list[int]) -> fx.Node:
    """A sum of what an operand holds, in `out`'s precision, broadcastable to it."""
    total = emitter.call(aten.sum.dim_IntList, value, over, True)
    heads, own = shape_of(out)[1], ((1,) * 4 + shape_of(total))[-3]
    if own not in (1, heads):
        group = divides(own, heads)
        if not isinstance(group, int):
            message = "how many heads share a key is not known, where rows may have none"
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, message, emitter.anchor)
        total = emitter.call(aten.repeat_interleave.self_int, total, group, 1)
    dtype = out.meta["val"].dtype
    return total if total.meta["val"].dtype == dtype else emitter.call(aten.to.dtype, total, dtype)
