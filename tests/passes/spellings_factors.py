"""Factors for each key: cosines, gates on scores, on exponentials and on weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spellings_base import DIRECT, finish, heads_first, legal, parameter
from spellings_spread import causal
from torch import Tensor


def gate(qkv: Tensor) -> Tensor:
    """``[B, H, 1, S]``"""
    return (qkv[1, ..., 0] + qkv[2, ..., 1]).transpose(1, 2).unsqueeze(-2)


# -- cosines ---------------------------------------------------------------------------------------


@legal("causal", "scale 4")
def cosines_by_one_division(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    lengths = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1, keepdim=True).mT
    return finish(causal(q @ k.mT / lengths * 4).softmax(-1), v)


@legal("causal", among=DIRECT)
def cosines_by_an_outer_product(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    lengths = q.norm(dim=-1, keepdim=True) @ k.norm(dim=-1, keepdim=True).mT
    return finish(causal(q @ k.mT / lengths).softmax(-1), v)


@legal("causal", parameters=(parameter(4, 1, 1),), among=DIRECT)
def cosines_by_two_divisions(qkv: Tensor, temperature: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.mT / q.norm(dim=-1)[..., None] / k.norm(dim=-1)[:, :, None]
    return finish(causal(s * temperature).softmax(-1), v)


@legal("causal", among=DIRECT)
def cosines_by_one_call(qkv: Tensor) -> Tensor:
    """A short query, a zero one: torch bounds the norm, and hides that from autograd."""
    q, k, v = heads_first(qkv)
    q = q * torch.tensor([0.0, 1e-10, 1.0, 1.0], dtype=q.dtype).view(4, 1, 1)
    s = F.cosine_similarity(q.unsqueeze(-2), k.unsqueeze(-3), dim=-1) * 7
    return finish(causal(s).softmax(-1), v)


@legal("causal", among=DIRECT)
def cosines_with_shared_keys(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = k[:, :2], v[:, :2]
    s = q @ k.repeat_interleave(2, 1).mT / k.norm(dim=-1).unsqueeze(2).repeat_interleave(2, 1)
    return finish(causal(s).softmax(-1), v.repeat_interleave(2, 1))


@legal("causal", parameters=(parameter(4, 1, 1),), among=DIRECT)
def cosines_of_normalised(qkv: Tensor, scale: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return finish(causal(s * scale.clamp(max=4.6)).softmax(-1), v)


# -- gates -----------------------------------------------------------------------------------------


@legal("causal", among=DIRECT)
def scores_gated_by_the_key(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish(causal(torch.sigmoid(gate(qkv)) * (q @ k.mT)).softmax(-1), v)


@legal("full", "dense data bias", among=DIRECT)
def scores_gated_by_the_key_and_padded(qkv: Tensor) -> Tensor:
    """A sigmoid is finite, so no key becomes NaN that the padding hides."""
    q, k, v = heads_first(qkv)
    s = q @ k.mT * torch.sigmoid(gate(qkv))
    return finish(s.masked_fill(qkv[0, :, None, None, :, 0, 0] < -9, -torch.inf).softmax(-1), v)


@legal("causal", among=DIRECT)
def weights_gated_by_the_key(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish(causal(q @ k.mT).softmax(-1) * gate(qkv), v)


@legal("causal", "dense data bias")
def weights_gated_and_renormalised(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = causal(q @ k.mT).softmax(-1) * torch.sigmoid(gate(qkv))
    return finish(w / w.sum(-1, keepdim=True), v)


@legal("causal", "dense data bias")
def weights_of_two_products_gated_and_renormalised(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.mT * 0.5 + q.sin() @ k[:, :1].cos().mT
    w = causal(s).softmax(-1) * torch.sigmoid(gate(qkv))
    return finish(w / w.sum(-1, keepdim=True), v)


@legal("causal", "dense data bias", among=DIRECT)
def exponentials_times_powers(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    e = torch.exp(causal(q @ k.mT)) * torch.exp2(qkv[2, ..., 0]).transpose(1, 2)[:, :, None]
    return (e @ v) / e.sum(-1, keepdim=True)


@legal("full", "dense data bias", among=DIRECT)
def exponentials_times_a_mask_from_the_data(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.mT
    e = torch.exp(s - s.amax(-1, keepdim=True)) * (gate(qkv) > -1.5).to(s.dtype)
    return finish(e / e.sum(-1, keepdim=True), v)


# -- softmax and all that --------------------------------------------------------------------------


@legal("causal", parameters=(parameter(4),), among=DIRECT)
def temperature_by_head(qkv: Tensor, temperature: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish(causal(q @ k.mT / temperature.view(4, 1, 1)).softmax(-1), v)


@legal("causal", among=DIRECT)
def weights_multiplied_by_a_number_for_each_key(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish(causal(q @ k.mT).softmax(-1) * torch.linspace(0.5, 1.5, 40)[: k.size(2)], v)


@legal("causal", "dense data bias", among=DIRECT)
def written_out_gated_and_renormalised(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = causal(q @ k.mT)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    w = e / e.sum(-1, keepdim=True) * torch.sigmoid(gate(qkv))
    return finish(w / w.sum(-1, keepdim=True), v)


@legal("causal", "dense data bias", among=DIRECT)
def log_softmax_gated_and_renormalised(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = torch.sigmoid(gate(qkv)) * torch.log_softmax(causal(q @ k.mT), -1).exp()
    return finish(w / w.sum(-1, keepdim=True), v)
