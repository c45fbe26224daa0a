"""Between weights and values: a factor, NaN replaced, the mask once more."""

from __future__ import annotations

import torch
from spellings_base import causal_bool, finish, heads_first, legal, parameter
from torch import Tensor

INF = float("-inf")


def causal_weights(qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(qkv)
    s = (q @ k.transpose(-1, -2) * 0.4).masked_fill(~causal_bool(q.size(2)), INF)
    return s.softmax(-1), v


@legal("causal", parameters=(parameter(4, 1, 1), parameter(4, 1, 1)))
def weights_times_a_factor_per_head(qkv: Tensor, up: Tensor, down: Tensor) -> Tensor:
    w, v = causal_weights(qkv)
    return finish(w * up / down, v)


@legal("causal")
def weights_times_a_gate_per_query(qkv: Tensor) -> Tensor:
    w, v = causal_weights(qkv)
    b, h, t, _ = w.shape
    w = (0.5 * w * torch.sigmoid(qkv[0, :, :, :, 0]).transpose(1, 2).unsqueeze(-1)).view(
        b * h, t, t
    )
    return torch.bmm(w, v.reshape(b * h, t, -1)).view(b, h, t, -1).transpose(1, 2).flatten(2)


@legal("causal")
def nan_to_number(qkv: Tensor) -> Tensor:
    w, v = causal_weights(qkv)
    return finish(torch.nan_to_num(w), v)


@legal("causal")
def number_where_nan(qkv: Tensor) -> Tensor:
    w, v = causal_weights(qkv)
    return finish(torch.where(torch.isnan(w), torch.zeros_like(w), w), v)


@legal("causal")
def nan_filled(qkv: Tensor) -> Tensor:
    w, v = causal_weights(qkv)
    return finish(w.masked_fill(w.isnan(), 0.0), v)


@legal("causal")
def multiplied_by_the_mask_again(qkv: Tensor) -> Tensor:
    w, v = causal_weights(qkv)
    return finish(w * causal_bool(w.size(-1)), v)


@legal("causal")
def filled_by_a_wider_mask(qkv: Tensor) -> Tensor:
    """Everything that it forbids is forbidden already."""
    w, v = causal_weights(qkv)
    t = w.size(-1)
    return finish(w.masked_fill(torch.ones(t, t).tril(2) == 0, 0.0), v)


@legal("causal")
def triangle_of_the_weights_renormalised(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = torch.tril((q @ k.transpose(-1, -2)).softmax(-1))
    return finish(w / w.sum(-1, keepdim=True), v)


@legal("causal")
def triangle_of_the_exponentials(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    e = torch.tril((q @ k.transpose(-1, -2) * 0.4).exp())
    return (e @ v / e.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)


@legal("causal, window 3")
def band_of_the_exponentials(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    e = (q @ k.transpose(-1, -2) * 0.4).exp().tril().triu(-2)
    return finish(e / e.sum(-1, keepdim=True), v)


@legal("causal")
def gate_of_the_query_repeated_for_every_key(qkv: Tensor) -> Tensor:
    w, v = causal_weights(qkv)
    gate = torch.sigmoid(qkv[0, :, :, :, 0]).transpose(1, 2).unsqueeze(-1)
    return finish(w * gate.repeat(1, 1, 1, w.size(-1)), v)


@legal("causal")
def factor_of_the_query_expanded_on_the_scores(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2)
    s = s / qkv[0, :, :, :, :1].transpose(1, 2).sigmoid().expand_as(s)
    return finish(s.masked_fill(~causal_bool(q.size(2)), INF).softmax(-1), v)
