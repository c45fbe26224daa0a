"""Look-alikes of other bases and divisions: a bound that is reached, a sum in another layout."""

from __future__ import annotations

import torch
from spellings_base import causal_bool, finish, heads_first
from torch import Tensor
from tricky_spellings import tricky

INF = float("-inf")
UNREAD = "unsupported-feature"


def causal_scores(qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) * 0.4
    return s.masked_fill(~causal_bool(q.size(2)), INF), v


@tricky(UNREAD)
def bound_that_is_reached(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return finish(e / e.sum(-1, keepdim=True).clamp(min=2.0), v)


@tricky(UNREAD)
def bound_beside_plain_exponentials(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = torch.exp(s)
    return finish(e / e.sum(-1, keepdim=True).clamp(min=0.9), v)


@tricky(UNREAD)
def bound_beside_a_clamped_maximum(qkv: Tensor) -> Tensor:
    """All exponentials of a row may be small then."""
    s, v = causal_scores(qkv)
    e = torch.exp(s - s.amax(-1, keepdim=True).clamp(min=0.5))
    return finish(e / e.sum(-1, keepdim=True).clamp(min=0.9), v)


@tricky(UNREAD)
def bound_beside_a_maximum_over_the_queries(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2)
    e = torch.exp(s - s.amax(-2, keepdim=True))
    return finish(e / e.sum(-1, keepdim=True).clamp(min=0.9), v)


@tricky(UNREAD)
def bound_after_masking(qkv: Tensor) -> Tensor:
    """The largest exponential may be masked."""
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2)
    e = torch.exp(s - s.amax(-1, keepdim=True)) * causal_bool(s.size(-1))
    return finish(e / e.sum(-1, keepdim=True).clamp(min=0.9), v)


@tricky(UNREAD)
def sum_of_other_powers(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    return finish(torch.exp2(s) / torch.exp(s).sum(-1, keepdim=True), v)


@tricky(UNREAD)
def maximum_given_back_in_another_base(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    m = s.amax(-1, keepdim=True)
    e = torch.exp2(s - m)
    return finish(e / (torch.exp(-m) + e.sum(-1, keepdim=True)), v)


@tricky(UNREAD)
def divided_by_the_sums_of_other_heads(qkv: Tensor) -> Tensor:
    """Right where as many heads as queries are there, if shapes were all that counts."""
    s, v = causal_scores(qkv)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return finish(e / e.sum(-1).flip(1)[..., None], v)


@tricky("order-of-operations")
def negated_after_a_floor(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.transpose(-1, -2)).clamp(min=-1e9)
    return finish((-s).masked_fill(~causal_bool(q.size(2)), INF).softmax(-1), v)


@tricky(UNREAD)
def bound_beside_more_masking_afterwards(qkv: Tensor) -> Tensor:
    """The largest exponential may be masked: the second mask is not the first."""
    s, v = causal_scores(qkv)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    e = e.masked_fill(~causal_bool(s.size(-1)).tril(-1), 0.0)
    return finish(e / e.sum(-1, keepdim=True).clamp(min=0.9), v)


@tricky(UNREAD)
def maximum_but_one_where_infinite(qkv: Tensor) -> Tensor:
    """Not read: another number than 0 may stand for more than a row without keys."""
    s, v = causal_scores(qkv)
    m = s.amax(-1, keepdim=True)
    e = torch.exp(s - torch.where(torch.isfinite(m), m, torch.ones_like(m)))
    return finish(e / e.sum(-1, keepdim=True).clamp(min=1e-9), v)


@tricky(UNREAD)
def sum_of_other_exponentials(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    return finish(torch.exp(s * 2.0) / torch.exp(s * 3.0).sum(-1, keepdim=True), v)


@tricky(UNREAD)
def sum_that_is_rounded(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = torch.exp(s)
    return finish(e / e.sum(-1, keepdim=True, dtype=torch.float32), v)


@tricky("order-of-operations")
def number_that_counts_beside_the_largest(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return finish(e / (e.sum(-1, keepdim=True) + 1e-15), v)


@tricky("order-of-operations")
def lost_number_beside_a_clamped_maximum(qkv: Tensor) -> Tensor:
    """All exponentials of a row may be small then, and the number counts."""
    s, v = causal_scores(qkv)
    e = torch.exp(s - s.amax(-1, keepdim=True).clamp(min=0.5))
    return finish(e / (e.sum(-1, keepdim=True) + 1e-20), v)


@tricky("order-of-operations")
def lost_number_after_masking(qkv: Tensor) -> Tensor:
    """The largest exponential may be masked."""
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2)
    e = torch.exp(s - s.amax(-1, keepdim=True)) * causal_bool(s.size(-1))
    return finish(e / (e.sum(-1, keepdim=True) + 1e-20), v)
