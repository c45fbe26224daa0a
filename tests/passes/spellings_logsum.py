"""Sums of exponentials in other words: by their logarithm, by a product with ones, with a sink."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spellings_base import DIRECT, causal_bool, finish, heads_first, legal, parameter
from torch import Tensor

INF = float("-inf")


def causal_scores(qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(qkv)
    s = q @ k.mT * 0.4
    return s.masked_fill(~causal_bool(q.size(2)), INF), v


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


# -- logarithms ------------------------------------------------------------------------------------


@legal("causal", "scale 0.4")
def logarithm_of_the_sum_and_the_maximum(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    m = s.amax(-1, keepdim=True)
    lse = m + torch.log(torch.exp(s - m).sum(-1, keepdim=True))
    return finish(torch.exp(s - lse), v)


@legal("causal", among=DIRECT)
def logarithm_with_unkept_maximum(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    m = s.detach().max(dim=-1).values
    lse = (s - m[..., None]).exp().sum(-1).log() + m
    return finish((s - lse.unsqueeze(-1)).exp(), v)


@legal("causal", among=DIRECT)
def logarithm_of_shifted_scores(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    s = s - s.amax(-1, keepdim=True)
    return finish(torch.exp(s - s.exp().sum(-1, keepdim=True).log()), v)


@legal("causal", among=DIRECT)
def logarithm_of_the_plain_sum(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    return finish(torch.exp(s - torch.log(torch.exp(s).sum(-1))[..., None]), v)


@legal("causal", "sinks", parameters=(parameter(4),), among=DIRECT)
def sink_in_the_logsumexp(qkv: Tensor, sink: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    total = torch.logaddexp(torch.logsumexp(s, -1, keepdim=True), sink.view(1, -1, 1, 1))
    return finish(torch.exp(s - total), v)


# -- sinks in the denominator ----------------------------------------------------------------------


@legal("causal", "sinks", parameters=(parameter(4),))
def sink_under_the_maximum(qkv: Tensor, sink: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    sink = sink.view(1, -1, 1, 1)
    m = torch.maximum(s.amax(-1, keepdim=True), sink)
    e = torch.exp(s - m)
    return finish(e / (e.sum(-1, keepdim=True) + torch.exp(sink - m)), v)


@legal("causal", "sinks", parameters=(parameter(4, 1, 1),), among=DIRECT)
def sink_beside_the_plain_sum_divided_late(qkv: Tensor, sink: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = torch.exp(s)
    return merged((e @ v) / (torch.exp(sink) + e.sum(-1, keepdim=True)))


@legal("causal", "sinks", parameters=(parameter(4, 1),), among=DIRECT)
def sink_beside_the_sum_without_kept_dimension(qkv: Tensor, sink: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = torch.exp(s)
    return finish(e / (e.sum(-1) + torch.exp(sink)).unsqueeze(-1), v)


@legal("causal", "sinks", parameters=(parameter(4),))
def sink_laid_out_after_its_exponential(qkv: Tensor, sink: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = torch.exp(s)
    return finish(e / (e.sum(-1, keepdim=True) + sink.exp().view(1, -1, 1, 1)), v)


@legal("causal", "sinks", parameters=(parameter(1, 4),), among=DIRECT)
def sink_expanded_after_its_exponential(qkv: Tensor, sink: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = torch.exp(s)
    beside = sink.exp().mT[..., None].expand(e.size(0), -1, e.size(2), 1)
    return merged((e @ v) / (beside + e.sum(-1, keepdim=True)))


# -- ones ------------------------------------------------------------------------------------------


@legal("causal")
def ones_beside_the_values(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    o = e @ torch.cat([v, torch.ones_like(v[..., :1])], -1)
    return merged(o[..., :-1] / o[..., -1:])


@legal("causal", among=DIRECT)
def values_padded_with_ones(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    o = torch.exp(s) @ F.pad(v, (0, 1), value=1.0)
    return merged(o[..., :6] / o[..., 6, None])


@legal("causal", among=DIRECT)
def summed_by_a_column_of_ones(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return merged((e @ v) / (e @ torch.ones(v.size(-2), 1, dtype=v.dtype)))


# -- a buffer after the mask -----------------------------------------------------------------------


@legal(
    "causal",
    buffers=(lambda: torch.tensor(math.sqrt(6.0), dtype=torch.float64),),
    among=DIRECT,
)
def divided_by_a_buffer_after_the_mask(qkv: Tensor, scale: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.mT
    low = torch.tensor(torch.finfo(s.dtype).min, dtype=s.dtype)
    s = torch.where(causal_bool(q.size(2)), s, low) / scale
    return finish(s.softmax(-1), v)
