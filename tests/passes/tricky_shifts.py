"""Scores shifted as a whole: nothing to a softmax alone, but not beside a sink or a softcap."""

from __future__ import annotations

import torch
from spellings_base import causal_bool, finish, heads_first, parameter
from torch import Tensor
from tricky_spellings import tricky

INF = float("-inf")


def causal_scores(qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) * 0.4
    return s.masked_fill(~causal_bool(q.size(2)), INF), v


def with_sinks(s: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    column = sinks.view(1, -1, 1, 1).expand(s.size(0), -1, s.size(2), 1)
    return finish(torch.cat([s, column], -1).softmax(-1)[..., :-1], v)


@tricky("order-of-operations", parameters=(parameter(4),))
def number_before_the_sinks(qkv: Tensor, sinks: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    return with_sinks(s + 5.0, v, sinks)


@tricky("order-of-operations", parameters=(parameter(4),))
def maximum_before_the_sinks(qkv: Tensor, sinks: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    return with_sinks(s - s.amax(-1, keepdim=True), v, sinks)


@tricky("order-of-operations", parameters=(parameter(4),))
def detached_maximum_before_the_sinks(qkv: Tensor, sinks: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    return with_sinks(s - s.amax(-1, keepdim=True).detach(), v, sinks)


@tricky(found="sinks", parameters=(parameter(4),))
def maximum_after_the_sinks(qkv: Tensor, sinks: Tensor) -> Tensor:
    """The shift moves the sink as well: the attention stays the same."""
    s, v = causal_scores(qkv)
    column = sinks.view(1, -1, 1, 1).expand(s.size(0), -1, s.size(2), 1)
    s = torch.cat([s, column], -1)
    return finish((s - s.amax(-1, keepdim=True)).softmax(-1)[..., :-1], v)


@tricky("order-of-operations")
def number_before_the_softcap(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) + 1.5
    return finish((2.0 * torch.tanh(s / 2.0)).softmax(-1), v)


@tricky("order-of-operations")
def maximum_before_the_softcap(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2)
    s = s - s.amax(-1, keepdim=True)
    return finish((2.0 * torch.tanh(s / 2.0)).softmax(-1), v)


@tricky(found="softcap 2")
def number_after_the_softcap(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = 2.0 * torch.tanh(q @ k.transpose(-1, -2) / 2.0)
    return finish((s + 1.5).softmax(-1), v)


@tricky(found="sinks", parameters=(parameter(4),))
def zero_before_the_sinks(qkv: Tensor, sinks: Tensor) -> Tensor:
    """A copy by ``+ 0`` moves nothing. Found by the fuzzer."""
    s, v = causal_scores(qkv)
    return with_sinks(s + 0, v, sinks)
