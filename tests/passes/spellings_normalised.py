"""Normalisations by hand: less the logsumexp, masked after the exponential, one beside the sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spellings_base import causal_bool, finish, heads_first, legal, tril_buffer
from torch import Tensor

INF = float("-inf")


def plain_scores(qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(qkv)
    return q @ k.transpose(-1, -2) * 0.4, v


def causal_scores(qkv: Tensor) -> tuple[Tensor, Tensor]:
    s, v = plain_scores(qkv)
    return s.masked_fill(~causal_bool(s.size(-1)), INF), v


# -- the logarithm of the sum ----------------------------------------------------------------------


@legal("causal", "scale 0.4")
def less_the_logsumexp(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    return finish(torch.exp(s - torch.logsumexp(s, -1, keepdim=True)), v)


@legal("causal")
def less_the_logsumexp_by_einsum(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    w = (s - s.logsumexp(dim=3).unsqueeze(3)).exp()
    out: Tensor = torch.einsum("bhij,bhjd->bihd", w, v)
    return out


@legal("causal")
def exponential_of_log_softmax(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    return finish(F.log_softmax(s, dim=-1).exp(), v)


# -- masked after the exponential ------------------------------------------------------------------


@legal("causal", buffers=(tril_buffer,))
def exponentials_times_mask(qkv: Tensor, tril: Tensor) -> Tensor:
    s, v = plain_scores(qkv)
    t = s.size(-1)
    e = torch.exp(s - s.amax(-1, keepdim=True)) * tril[:, :, :t, :t]
    return finish(e / e.sum(-1, keepdim=True), v)


@legal("causal", buffers=(tril_buffer,))
def mask_times_exponentials_divided_late(qkv: Tensor, tril: Tensor) -> Tensor:
    s, v = plain_scores(qkv)
    t = s.size(-1)
    e = tril[0, 0, :t, :t] * torch.exp(s - s.amax(-1, keepdim=True).detach())
    return ((e @ v) / e.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)


@legal("causal")
def softmax_masked_and_renormalised(qkv: Tensor) -> Tensor:
    s, v = plain_scores(qkv)
    w = s.softmax(-1) * causal_bool(s.size(-1))
    return finish(w / w.sum(-1, keepdim=True), v)


@legal("causal")
def exponentials_filled_with_zero(qkv: Tensor) -> Tensor:
    s, v = plain_scores(qkv)
    e = torch.exp(s - s.amax(-1, keepdim=True)).masked_fill(~causal_bool(s.size(-1)), 0.0)
    return finish(e / e.sum(-1, keepdim=True), v)


@legal("causal")
def exponentials_or_zero(qkv: Tensor) -> Tensor:
    s, v = plain_scores(qkv)
    e = torch.where(causal_bool(s.size(-1)), s.exp(), torch.zeros_like(s))
    return finish(e / e.sum(-1, keepdim=True), v)


@legal("causal, window 3")
def masked_before_and_after(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    near = torch.ones(s.size(-1), s.size(-1), dtype=s.dtype).triu(-2)
    e = (s - s.amax(-1, keepdim=True)).exp() * near
    return finish(e / e.sum(-1, keepdim=True), v)


# -- one more than the sum -------------------------------------------------------------------------


@legal("causal", "sinks")
def quiet_attention(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    m = s.amax(-1, keepdim=True)
    e = torch.exp(s - m)
    return finish(e / (torch.exp(-m) + e.sum(-1, keepdim=True)), v)


@legal("causal", "sinks")
def quiet_attention_maximum_not_negative(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    m = s.max(dim=-1, keepdim=True).values.clamp(min=0).detach()
    e = torch.exp(s - m)
    return finish(e / (e.sum(dim=-1, keepdim=True) + torch.exp(-m)), v)


@legal("causal", "sinks")
def softmax_plus_one(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = torch.exp(s)
    return finish(e / (1 + e.sum(dim=-1, keepdim=True)), v)


@legal("causal", "sinks")
def small_number_beside_the_plain_sum(qkv: Tensor) -> Tensor:
    """Without a maximum subtracted it is a sink of log(1e-6)."""
    s, v = causal_scores(qkv)
    e = torch.exp(s)
    return finish(e / (e.sum(dim=-1, keepdim=True) + 1e-6), v)


@legal("causal", "sinks")
def padded_with_a_zero(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    return finish(F.pad(s, (0, 1)).softmax(-1)[..., :-1], v)


@legal("causal", "sinks")
def padded_in_front_with_a_number(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    return finish(F.pad(s, (1, 0), value=0.5).softmax(-1)[..., 1:], v)


@legal("causal", "sinks")
def column_of_zeros(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    zeros = s.new_zeros(s.size(0), s.size(1), s.size(2), 1)
    return finish(torch.cat([zeros, s], dim=-1).softmax(-1)[..., 1:], v)


@legal("causal", "sinks")
def column_like_the_scores(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    return finish(torch.cat([s, torch.zeros_like(s[..., :1])], dim=-1).softmax(-1)[..., :-1], v)


@legal("causal", "sinks")
def one_more_and_masked_after(qkv: Tensor) -> Tensor:
    s, v = plain_scores(qkv)
    e = s.exp() * causal_bool(s.size(-1))
    return finish(e / (e.sum(-1, keepdim=True) + 1.0), v)
