"""The weights are changed before the values in a way that no attention expresses."""

from __future__ import annotations

import torch
from spellings_base import causal_bool, finish, heads_first
from torch import Tensor
from tricky_spellings import DIRECT, tricky

INF = float("-inf")


def causal_weights(qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(qkv)
    s = (q @ k.transpose(-1, -2) * 0.4).masked_fill(~causal_bool(q.size(2)), INF)
    return s.softmax(-1), v


@tricky("unsupported-feature")
def masked_after_the_softmax_alone(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish((q @ k.transpose(-1, -2)).softmax(-1) * causal_bool(q.size(2)), v)


@tricky("unsupported-feature")
def masked_again_by_a_narrower_mask(qkv: Tensor) -> Tensor:
    w, v = causal_weights(qkv)
    return finish(w * causal_bool(w.size(-1)).tril(-1), v)


@tricky("unsupported-feature")
def multiplied_by_halves(qkv: Tensor) -> Tensor:
    w, v = causal_weights(qkv)
    return finish(w * (causal_bool(w.size(-1)) * 0.5), v)


@tricky("unsupported-feature")
def masked_again_where_padding_may_empty_a_row(qkv: Tensor) -> Tensor:
    """A row without any key is the mean of all values, of which the second mask keeps a part."""
    q, k, v = heads_first(qkv)
    mask = causal_bool(q.size(2))
    s = (q @ k.transpose(-1, -2)).masked_fill(~mask, -1e9)
    s = s.masked_fill(qkv[0, :, None, None, :, 0, 0] < 0.5, -1e9)
    return finish(s.softmax(-1) * mask, v)


@tricky("attention-weights-used-elsewhere")
def nan_becomes_one(qkv: Tensor) -> Tensor:
    w, v = causal_weights(qkv)
    return finish(torch.nan_to_num(w, 1.0), v)


@tricky("fully-masked-row")
def nan_replaced_where_a_mask_is_added(qkv: Tensor) -> Tensor:
    """The gradients of q and k are NaN there, and no fill keeps them out."""
    q, k, v = heads_first(qkv)
    few = qkv[0, :, None, None, :, 0, 0] < 0.5
    s = q @ k.transpose(-1, -2) + torch.zeros_like(few, dtype=q.dtype).masked_fill(few, INF)
    s = s.masked_fill(~causal_bool(q.size(2)), INF)
    return finish(torch.nan_to_num(s.softmax(-1)), v)


@tricky("attention-weights-used-elsewhere")
def nan_of_others_replaced(qkv: Tensor) -> Tensor:
    w, v = causal_weights(qkv)
    other = causal_weights(qkv.flip(2))[0]
    return finish(torch.where(torch.isnan(w), 0.0, other), v) + finish(w, v)


@tricky("fully-masked-row", among=DIRECT)
def masked_by_a_huge_product_and_again(qkv: Tensor) -> Tensor:
    """The second product is a mask of the data, not the scores that the first is added to."""
    q, k, v = heads_first(qkv)
    both = (q[..., :1] > 0).to(q.dtype) @ (k[..., :1] > 0).to(q.dtype).mT
    w = (q @ k.mT - both * 1e9).softmax(-1) * causal_bool(q.size(2))
    return finish(w / w.sum(-1, keepdim=True), v)
