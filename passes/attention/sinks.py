"""Attention sinks: a column of its own beside the scores, dropped again after the softmax."""

from __future__ import annotations

import torch
from torch import fx

from fxport.errors import ReasonCode
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.frame import Frame, sink_steps
from fxport.passes.attention.layout import Dims, LayoutError, axes_of
from fxport.passes.attention.site import Left

__all__ = ["emit_sinks"]

aten = torch.ops.aten


def emit_sinks(emitter: Emitter, sinks: tuple[fx.Node, Dims] | float, frame: Frame) -> fx.Node:
    """The sinks as ``[Hq]``.

    Args:
        sinks: the number, or the column that was concatenated, and the scores' dimensions with
            size 1 in place of the key axis.

    Raises:
        Left: they vary by more than the head.
    """
    if isinstance(sinks, float):
        anchor = emitter.anchor.meta["val"]
        dtype = torch.promote_types(anchor.dtype, torch.float32)
        one = torch.full((1,), sinks, dtype=dtype, device=anchor.device)
        return emitter.for_each_head("sinks", one, frame)
    column, dims = sinks
    try:
        steps = sink_steps(column, dims)
    except (LayoutError, ValueError):
        raise _left(column) from None
    if not set(axes_of(steps[-1].dims, repeated=False)) <= set(frame.heads):
        raise _left(column)
    dtype = steps[0].node.meta["val"].dtype
    found, factor = emitter.operand(steps, (frame.heads,), dtype)
    return found if factor == 1 else emitter.call(aten.mul.Tensor, found, factor)


def _left(column: fx.Node) -> Left:
    return Left(
        ReasonCode.UNSUPPORTED_FEATURE,
        "the sinks are not one number per head",
        column,
        "use a parameter of shape [heads], expanded to the scores",
    )
