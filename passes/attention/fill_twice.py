"""Whether two fills are of the same entries, as of scores before the softmax and of weights after.

masked_fill(s, m, -inf)   masked_fill(w, m, 0)               the same
masked_fill(s, ~m, -inf)  where(m, w, 0)                     the same
masked_fill(s, m, -inf)   masked_fill(w.mT, m, 0)            of rows, not of keys
"""

from __future__ import annotations

import torch
from torch import fx

from fxport.capture.arguments import shape_of
from fxport.passes.attention.layout import Axis, is_one, resolve
from fxport.passes.attention.site import MaskKind, MaskStep
from fxport.passes.attention.views import overload_packet

__all__ = ["same_fill"]

aten = torch.ops.aten

_NEGATIONS = {aten.bitwise_not, aten.logical_not}


def same_fill(one: MaskStep, other: MaskStep) -> bool:
    """Whether both are fills that choose alike: by one tensor, meeting the same axes in each."""
    fills = one.kind is other.kind is MaskKind.FILL
    return fills and _chosen(one) == _chosen(other) and _met(one) == _met(other)


def _chosen(step: MaskStep) -> tuple[fx.Node | None, bool]:
    """The mask without negations, and whether it says which entries stay."""
    tensor, keeps = step.tensor, step.inverted
    while tensor is not None and overload_packet(tensor) in _NEGATIONS:
        before = tensor.all_input_nodes[0]
        if before.meta["val"].dtype != torch.bool:
            break
        tensor, keeps = before, not keeps
    return tensor, keeps


def _met(step: MaskStep) -> list[list[Axis]]:
    """The axes that each dimension of the mask tells apart, the last first."""
    shape = shape_of(step.tensor) if step.tensor is not None else ()
    pairs = zip(shape[::-1], step.dims[::-1], strict=False)
    return [[] if is_one(size) else [f.axis for f in resolve(dim)] for size, dim in pairs]
