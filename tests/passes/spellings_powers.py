"""Other bases, signs and divisions: ``2 ** x``, ``softmax(-x)``, ``e * (1 / sum(e))``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spellings_base import causal_bool, finish, heads_first, legal
from torch import Tensor

INF = float("-inf")


def causal_scores(qkv: Tensor, scale: float = 0.4) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) * scale
    return s.masked_fill(~causal_bool(s.size(-1)), INF), v


def shifted(s: Tensor) -> Tensor:
    return s - s.amax(-1, keepdim=True)


# -- bases and signs -------------------------------------------------------------------------------


@legal("causal", "scale 0.4")
def powers_of_two(qkv: Tensor) -> Tensor:
    """As flash attention kernels have it."""
    s, v = causal_scores(qkv, 0.4 * math.log2(math.e))
    e = torch.exp2(shifted(s))
    return finish(e / e.sum(-1, keepdim=True), v)


@legal("causal", "scale 0.4")
def powers_of_two_divided_late(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv, 0.4 * math.log2(math.e))
    e = torch.exp2(s - s.max(-1, keepdim=True)[0])
    return ((e @ v) / e.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)


@legal("causal", "scale 0.4")
def powers_of_e(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = math.e ** shifted(s)
    return finish(e / e.sum(-1, keepdim=True), v)


@legal("causal")
def powers_of_two_plus_one(qkv: Tensor) -> Tensor:
    """The one is e to the power of 0 in any base."""
    s, v = causal_scores(qkv)
    e = 2**s
    return finish(e / (e.sum(-1, keepdim=True) + 1), v)


@legal("causal", "scale -1")
def softmin(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(q.size(2)), -INF)
    return finish(F.softmin(s, dim=-1), v)


@legal("causal", "scale 0.4")
def added_and_negated_twice(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = -(q @ k.transpose(-1, -2)) * 0.4
    s = s + torch.full_like(s[0, 0], -INF).triu(1)
    return finish((-s).softmax(-1), v)


# -- divisions -------------------------------------------------------------------------------------


@legal("causal")
def times_the_reciprocal(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = shifted(s).exp()
    return finish(e * e.sum(-1, keepdim=True).reciprocal(), v)


@legal("causal")
def times_one_over_the_sum_late(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = shifted(s).exp()
    return ((e @ v) * (1.0 / e.sum(-1, keepdim=True))).transpose(1, 2).flatten(2)


@legal("causal")
def sum_bounded_from_below(qkv: Tensor) -> Tensor:
    """It is never below 1: the largest exponential is."""
    s, v = causal_scores(qkv)
    e = shifted(s).exp()
    return finish(e / e.sum(-1, keepdim=True).clamp(min=1e-9), v)


@legal("causal")
def normalised_by_one_norm(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    return finish(F.normalize(shifted(s).exp(), p=1, dim=-1), v)


@legal("causal")
def divided_in_another_layout(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = shifted(s).exp()
    top = torch.einsum("bhij,bhjd->bihd", e, v)
    return (top / e.sum(-1).transpose(1, 2).unsqueeze(-1)).flatten(2)


@legal("causal")
def maximum_of_what_is_there(qkv: Tensor) -> Tensor:
    """Rows without a key would be zeros: no row of a causal mask is."""
    q, k, v = heads_first(qkv)
    mask = ~causal_bool(q.size(2))
    s = (q @ k.transpose(-1, -2) * 0.4).masked_fill(mask, INF)
    m = s.amax(dim=-1, keepdim=True)
    m = torch.where(torch.isfinite(m), m, torch.zeros_like(m))
    e = torch.exp(s - m).masked_fill(mask, 0.0)
    return finish(e / e.sum(-1, keepdim=True).clamp(min=torch.finfo(e.dtype).tiny), v)


@legal("causal")
def maximum_filled_where_infinite(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    m = s.amax(-1, keepdim=True)
    e = torch.exp(s - m.masked_fill(torch.isinf(m), 0.0))
    return finish(e / e.sum(-1, keepdim=True).clamp(min=1e-9), v)


# -- the same computed twice -----------------------------------------------------------------------


@legal("causal", "scale 0.4")
def exponentials_computed_twice(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    return finish(s.exp() / s.exp().sum(-1, keepdim=True, dtype=s.dtype), v)


@legal("causal", "scale 0.4")
def maxima_and_exponentials_computed_twice(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = torch.exp(s - s.max(-1, keepdim=True).values)
    total = torch.exp(s - s.max(-1, keepdim=True).values).sum(-1, keepdim=True)
    return finish(e / total, v)


@legal("causal", "scale 0.4")
def exponentials_set_to_zero_twice(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) * 0.4
    gone = ~causal_bool(s.size(-1))
    total = s.exp().masked_fill(gone, 0.0).sum(-1, keepdim=True)
    return finish(s.exp().masked_fill(gone, 0.0) / total, v)


# -- numbers lost in a sum -------------------------------------------------------------------------


@legal("causal", "scale 0.4")
def number_lost_beside_the_largest(qkv: Tensor) -> Tensor:
    """As 1e-9 is in single precision."""
    s, v = causal_scores(qkv)
    e = torch.exp(shifted(s))
    return finish(e / (e.sum(-1, keepdim=True) + 1e-20), v)


@legal("causal", "scale 0.4")
def number_lost_beside_a_softmax(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    p = s.softmax(-1)
    return finish(p / (p.sum(-1, keepdim=True) + 1e-20), v)


@legal("causal", "scale 0.4")
def filled_with_a_number(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) * 0.4
    low = torch.fill(torch.empty_like(s), INF)
    return finish(torch.where(causal_bool(s.size(-1)), s, low).softmax(-1), v)
