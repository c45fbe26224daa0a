"""Rows without a key: zeros where all of their scores are -inf, weights where a number hides all.

SDPA, FlexAttention and softmaxes with a guarded maximum give zeros for the first and the softmax of
what is left for the second. The reference is the formula: the gradients of torch's CPU kernel are
as many times too large as there are keys where one number hides them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import Rewritten, Site, compare, rewrite, run_like, trace_directly
from attention_graphs import trace_training as trace
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

INF = float("inf")
LOW = -1e30
QUERIES, KEYS = 11, 7


def operands(queries: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = [(2, 4, queries, 6), (2, 4, keys, 6), (2, 4, keys, 6)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def from_the_end(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def window(queries: int, keys: int) -> Tensor:
    distance = torch.arange(queries)[:, None] - torch.arange(keys)
    return (distance >= 0) & (distance < 3)


def hidden(mask: Tensor, low: float) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, low)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.3


def safe(s: Tensor, v: Tensor) -> Tensor:
    empty = (s == -INF).all(-1, keepdim=True)
    return s.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) @ v


def guarded(s: Tensor, v: Tensor) -> Tensor:
    m = s.amax(-1, keepdim=True)
    e = (s - torch.where(torch.isfinite(m), m, 0.0)).exp()
    return e / e.sum(-1, keepdim=True).clamp(min=1e-12) @ v


def rewritten(function: Callable[..., Tensor], data: list[Tensor]) -> Rewritten:
    return rewrite(trace_directly(Site(function), data))


Mask = Callable[[int, int], Tensor]


@pytest.mark.parametrize("low", [-INF, LOW])
@pytest.mark.parametrize("mask", [from_the_end, window])
@pytest.mark.parametrize("lengths", [(QUERIES, KEYS), (KEYS, KEYS)])
def test_constant_masks_of_sdpa(mask: Mask, low: float, lengths: tuple[int, int]) -> None:
    """More queries than keys leave rows without any; then a number is a bias, no flag."""
    data = operands(*lengths)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, hidden(mask(*lengths), low), scale=0.3)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return safe(scores(q, k) + hidden(mask(*lengths), low), v)

    found = rewritten(call, data)
    assert found.count == 1
    flag = lengths[0] == lengths[1] or (mask is from_the_end and low == -INF)
    assert (found.result.sites[0].bias == "") == flag
    compare(Site(formula), found.graph, data)


@pytest.mark.parametrize(("low", "count"), [(-INF, 1), (LOW, 0)])
def test_constant_fills_before_a_guarded_maximum(low: float, count: int) -> None:
    data = operands(QUERIES, KEYS)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return guarded(scores(q, k).masked_fill(~from_the_end(QUERIES, KEYS), low), v)

    found = rewritten(function, data)
    assert found.count == count and (count or found.left() == ["fully-masked-row"])
    compare(Site(function), found.graph, data)


@pytest.mark.parametrize(("low", "count"), [(-INF, 1), (LOW, 0)])
def test_fills_from_the_data_before_a_guarded_maximum(low: float, count: int) -> None:
    """All keys of the second entry of the batch are hidden."""
    data = [*operands(KEYS, KEYS), torch.tensor([[1] * 4 + [0] * 3, [0] * 7])]

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return guarded(scores(q, k).masked_fill(keep[:, None, None] == 0, low), v)

    found = rewritten(function, data)
    assert found.count == count and (count or found.left() == ["fully-masked-row"])
    compare(Site(function), found.graph, data)


@pytest.mark.parametrize("low", [-INF, LOW])
def test_a_mask_from_the_data_and_a_causal_one_are_added(low: float) -> None:
    """The first keys are hidden: the first rows give weight to keys that come later."""
    data = [*operands(KEYS, KEYS), torch.tensor([[0] * 3 + [1] * 4, [1] * 7])]

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        s = scores(q, k) + hidden(keep[:, None, None] > 0, low)
        return guarded(s + hidden(from_the_end(KEYS, KEYS), low), v)

    found = rewritten(function, data)
    assert found.count == 1
    compare(Site(function), found.graph, data)


@pytest.mark.parametrize(("low", "count"), [(-INF, 1), (LOW, 0)])
def test_scores_of_flex_attention(low: float, count: int) -> None:
    """The first query sees nothing."""
    data = operands(KEYS, KEYS)

    def strict(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(j < i, s, low)

    module = Site(lambda q, k, v: flex_attention(q, k, v, strict, scale=0.3))
    found = rewrite(trace(module, data))
    assert found.count == count and (count or found.left() == ["fully-masked-row"])
    with torch.no_grad():
        torch.testing.assert_close(run_like(found.graph, module, data)[0], module(*data))


def added_then_padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *bias: Tensor) -> Tensor:
    """The first rows of the first entry have no key; what lies outside of the band is skipped."""
    s = scores(q, k) + sum(bias)
    s = s + hidden(window(s.size(-2), s.size(-1)), -INF)
    return s.masked_fill(keep[:, None, None] == 0, -INF).softmax(-1) @ v


@pytest.mark.parametrize("bias", [(), (4, 5, 330), (1, 330)])
def test_nan_of_rows_without_keys_reaches_all_that_scores_are_made_of(
    bias: tuple[int, ...],
) -> None:
    """Keys that no kernel looks at, too, and their entries of a learned bias."""
    data = [*operands(5, 330), (torch.arange(660).view(2, 330) > 1).long()]
    weights = (
        [torch.linspace(0, 1, math.prod(bias), dtype=torch.float64).view(bias)] if bias else []
    )
    module = Site(added_then_padded, weights)
    found = rewrite(trace_directly(module, data))
    assert found.count == 1 and "window 3" in found.result.decisions[0].detail
    compare(module, found.graph, data)


@pytest.mark.parametrize(("low", "count"), [(-INF, 1), (LOW, 0), (-LOW, 0)])
@pytest.mark.parametrize("added", [True, False])
def test_rows_that_lose_their_keys_after_the_softmax(low: float, count: int, added: bool) -> None:
    """0 / 0, not the mean of what a number forbids."""

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        future = ~from_the_end(q.size(-2), k.size(-2))
        s = scores(q, k)
        s = s + hidden(~future, low) if added else s.masked_fill(future, low)
        w = s.softmax(-1) * keep[:, None, None]
        return (w / w.sum(-1, keepdim=True)) @ v

    data = [*operands(7, 7), torch.arange(14).view(2, 7) > 1]
    module = Site(function)
    found = rewrite(trace_directly(module, data))
    assert found.count == count
    compare(module, found.graph, data, nan_spreads=True)
