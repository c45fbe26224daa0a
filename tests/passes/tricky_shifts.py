"""Scores shifted as a whole: nothing to a softmax alone, but not beside a sink or a softcap."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spellings_base import causal_bool, finish, heads_first, parameter
from torch import Tensor
from tricky_spellings import DIRECT, tricky

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


# -- numbers that shifted scores are compared with -------------------------------------------------


@tricky("order-of-operations", among=DIRECT)
def number_before_a_fill(qkv: Tensor) -> Tensor:
    """The masked keys have all the weight."""
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) - 2e4
    return finish(s.masked_fill(~causal_bool(q.size(2)), -1e4).softmax(-1), v)


@tricky("order-of-operations", among=DIRECT)
def number_before_a_lower_fill(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) - 2e9
    return finish(s.masked_fill(~causal_bool(q.size(2)), -1e9).softmax(-1), v)


@tricky("order-of-operations", among=DIRECT)
def maximum_before_a_fill(qkv: Tensor) -> Tensor:
    """The maximum may be that of a masked key, and the rest far below it."""
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) * 1e5
    s = s - s.amax(-1, keepdim=True)
    return finish(s.masked_fill(~causal_bool(q.size(2)), -1e4).softmax(-1), v)


@tricky("order-of-operations", among=DIRECT)
def bounded_maximum_before_a_fill(qkv: Tensor) -> Tensor:
    """The bound is what is subtracted."""
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2)
    s = s - s.amax(-1, keepdim=True).clamp(min=2e9)
    return finish(s.masked_fill(~causal_bool(q.size(2)), -1e9).softmax(-1), v)


@tricky(found="causal", among=DIRECT)
def maximum_before_a_fill_that_forbids(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2)
    s = s - s.amax(-1, keepdim=True)
    return finish(s.masked_fill(~causal_bool(q.size(2)), -1e9).softmax(-1), v)


@tricky("order-of-operations", among=DIRECT)
def number_before_a_clamp(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish((q @ k.transpose(-1, -2) - 2e4).clamp(min=-1e4).softmax(-1), v)


@tricky("order-of-operations", among=DIRECT)
def number_before_a_factor_of_zeros(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    keep = causal_bool(q.size(2)).to(q.dtype)
    s = (q @ k.transpose(-1, -2) - 2e4) * keep - 1e4 * (1 - keep)
    return finish(s.softmax(-1), v)


@tricky("order-of-operations", among=DIRECT)
def number_before_nan_to_num(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    return finish((s - 2e4).nan_to_num(neginf=-1e4).softmax(-1), v)


def slopes_and_a_fill(qkv: Tensor, slopes: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    q, k, v = heads_first(qkv)
    i, j = torch.arange(q.size(2))[:, None], torch.arange(q.size(2))
    s = q @ k.transpose(-1, -2) + slopes(i, j).to(q.dtype)
    return finish(s.masked_fill(j > i, -1e4).softmax(-1), v)


@tricky(found="bias", among=DIRECT)
def slopes_less_a_number_before_a_fill(qkv: Tensor) -> Tensor:
    """ALiBi up to a number, which moves the scores below what masked ones are."""
    return slopes_and_a_fill(qkv, lambda i, j: 0.5 * (j - i) - 9950)


@tricky(found="bias", among=DIRECT)
def slopes_from_the_first_key_before_a_fill(qkv: Tensor) -> Tensor:
    """Up to a number for each row, which moves the last ones below what masked ones are."""
    return slopes_and_a_fill(qkv, lambda i, j: -500.0 * j)


@tricky(found="ALiBi", among=DIRECT)
def slopes_from_each_rows_own_key_before_a_fill(qkv: Tensor) -> Tensor:
    return slopes_and_a_fill(qkv, lambda i, j: 0.5 * (j - i))


@tricky("unsupported-feature", among=DIRECT)
def scaled_by_a_negative_number(qkv: Tensor) -> Tensor:
    """NaN, or the attention of -q, as torch picks its kernel."""
    q, k, v = heads_first(qkv)
    return F.scaled_dot_product_attention(q, k, v, scale=-0.3).transpose(1, 2)


@tricky("unsupported-feature", among=DIRECT)
def scaled_by_nothing(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return F.scaled_dot_product_attention(q, k, v, scale=0.0, is_causal=True).transpose(1, 2)
