"""Factors on scores and weights that are none of the keys alone, or might hide a NaN."""

from __future__ import annotations

import torch
from spellings_base import finish, heads_first
from spellings_factors import gate
from spellings_spread import causal
from torch import Tensor
from tricky_spellings import DIRECT, tricky


@tricky("unsupported-feature")
def lengths_made_a_little_larger(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    lengths = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1, keepdim=True).mT
    return finish(causal(q @ k.mT / (lengths + 1e-6)).softmax(-1), v)


@tricky("unsupported-feature", among=DIRECT)
def factor_for_each_pair(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    pairs = torch.tanh(qkv[0, :, :, None, :, 0] + qkv[1, :, None, :, :, 0]).permute(0, 3, 1, 2)
    return finish(causal(q @ k.mT * pairs).softmax(-1), v)


@tricky("order-of-operations", among=DIRECT)
def gated_after_the_mask(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = causal(q @ k.mT) * torch.sigmoid(gate(qkv))
    return finish(s.softmax(-1), v)


@tricky("order-of-operations", among=DIRECT)
def gated_after_the_maximum(qkv: Tensor) -> Tensor:
    """What was subtracted is another number for each key then."""
    q, k, v = heads_first(qkv)
    s = q @ k.mT
    return finish(((s - s.amax(-1, keepdim=True)) * torch.sigmoid(gate(qkv))).softmax(-1), v)


@tricky("order-of-operations", among=DIRECT)
def gated_after_the_softcap(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish(causal(torch.tanh(q @ k.mT) * torch.sigmoid(gate(qkv))).softmax(-1), v)


@tricky("unsupported-feature", among=DIRECT)
def cosines_of_padded_keys(qkv: Tensor) -> Tensor:
    """A key of zeros is hidden by the padding, and would be NaN divided by its length."""
    q, k, v = heads_first(qkv)
    padded = torch.arange(k.size(2)) % 5 == qkv[0, :, :1, 0, 0].mul(9).long().abs() % 5
    k = k.masked_fill(padded[:, None, :, None], 0.0)
    s = q @ k.mT / k.norm(dim=-1)[:, :, None].detach()
    return finish(s.masked_fill(padded[:, None, None], -torch.inf).softmax(-1), v)


@tricky("unsupported-feature", among=DIRECT)
def weights_gated_by_the_pair(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = causal(q @ k.mT).softmax(-1)
    return finish(w * torch.sigmoid(v @ k.mT), v)


@tricky(among=DIRECT)
def number_from_the_data_in_the_sum(qkv: Tensor) -> Tensor:
    """One for each head; found since sinks are, whatever makes them."""
    q, k, v = heads_first(qkv)
    s, sink = causal(q @ k.mT), qkv[2, 0, 0, :, 0].view(-1, 1, 1)
    total = torch.logaddexp(torch.logsumexp(s, -1, keepdim=True), sink)
    return finish(torch.exp(s - total), v)


@tricky("mask-not-proven", among=DIRECT)
def exponentials_times_what_may_be_negative(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    e = torch.exp(causal(q @ k.mT)) * (gate(qkv) + 9)
    return finish(e / e.sum(-1, keepdim=True), v)


@tricky("attention-weights-used-elsewhere", among=DIRECT)
def gated_and_renormalised_with_a_small_number(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = causal(q @ k.mT).softmax(-1) * torch.sigmoid(gate(qkv))
    return finish(w / (w.sum(-1, keepdim=True) + 1e-3), v)


@tricky("mask-not-proven", among=DIRECT)
def exponentials_times_a_scaled_gate(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    e = torch.exp(causal(q @ k.mT)) * (torch.sigmoid(gate(qkv)) * -0.5)
    return finish(e / e.sum(-1, keepdim=True), v)


@tricky(among=DIRECT)
def truth_that_empties_rows(qkv: Tensor) -> Tensor:
    """NaN there, which a product lets through to the gradients of all queries and keys."""
    q, k, v = heads_first(qkv)
    e = torch.exp(q @ k.mT * 0.4) * (qkv[0, :, None, None, :1, 0, 0] > 0).to(q.dtype)
    return finish(e / e.sum(-1, keepdim=True), v)
