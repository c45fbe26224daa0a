"""What each op does to feature positions, for labelling and emission."""

from __future__ import annotations

import enum
from typing import Any

import torch

import fxport.ops.attention
import fxport.ops.experts  # noqa: F401

__all__ = ["KINDS", "Kind"]

aten = torch.ops.aten


class Kind(enum.Enum):
    STRUCTURE = "moves positions, computes nothing"
    POINTWISE = "position by position, operands broadcast"
    LINEAR = "contracts the last dimension with a weight"
    CONTRACTION = "a product with a weight, or of two activations"
    EMBEDDING = "looks rows up"
    NORM = "normalises over the last dimensions"
    MEAN = "mean, sum or length over dimensions"
    CAST = "takes the dtype of another value"
    HALVES = "combines the two halves of a dimension"
    COMPLEX = "pairs of real numbers as complex ones, and back"
    ATTENTION = "fxport::attention"


_STRUCTURE = (
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default,
    aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default,
    aten.chunk.default, aten.unbind.int, aten.cat.default, aten.stack.default,
    aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints,
    aten.unflatten.int, aten.t.default, aten.movedim.int, aten.view_as.default,
    aten.expand_as.default,
    aten.movedim.intlist, aten.squeeze.dims, aten.mH.default,
    aten.mT.default, aten.narrow.default, aten.repeat.default, aten.repeat_interleave.self_int,
)  # fmt: skip
# Pointwise ops that do not carry the tag: they are compositions, or keep the dtype only.
_POINTWISE = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device,
    aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.square.default,
    aten.float_power.Tensor_Scalar, aten.alias.default, aten.detach.default,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.softplus.default,
)  # fmt: skip
_OTHERS = {
    aten.linear.default: Kind.LINEAR,
    aten.einsum.default: Kind.CONTRACTION,
    aten.matmul.default: Kind.CONTRACTION,
    aten.bmm.default: Kind.CONTRACTION,
    aten.mm.default: Kind.CONTRACTION,
    torch.ops.fxport.expert_linear.default: Kind.CONTRACTION,
    aten.embedding.default: Kind.EMBEDDING,
    aten.layer_norm.default: Kind.NORM,
    aten.rms_norm.default: Kind.NORM,
    aten.glu.default: Kind.HALVES,
    aten.mean.dim: Kind.MEAN,
    aten.linalg_vector_norm.default: Kind.MEAN,
    aten.sum.dim_IntList: Kind.MEAN,
    aten.type_as.default: Kind.CAST,
    aten.to.other: Kind.CAST,
    aten.view_as_complex.default: Kind.COMPLEX,
    aten.view_as_real.default: Kind.COMPLEX,
    torch.ops.fxport.attention.default: Kind.ATTENTION,
}


class _Kinds:
    """Op -> kind; pointwise ops are known by their tag."""

    def __init__(self) -> None:
        self._known: dict[Any, Kind] = dict.fromkeys(_STRUCTURE, Kind.STRUCTURE)
        self._known.update(dict.fromkeys(_POINTWISE, Kind.POINTWISE))
        self._known.update(_OTHERS)

    def get(self, target: Any) -> Kind | None:
        if target in self._known:
            return self._known[target]
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
            return Kind.POINTWISE
        return None


KINDS = _Kinds()
