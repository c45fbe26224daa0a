"""Weights that are repeated before they meet the values: values of several heads, one map."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import Rewritten, Site, compare, rewrite, run_like, trace_directly
from torch import Tensor

BATCH, HEADS, LENGTH = 2, 4, 7


def weights(q: Tensor, k: Tensor) -> Tensor:
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return (q @ k.mT * 0.3).masked_fill(~mask, float("-inf")).softmax(-1)


def for_all_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weights(q[:, :1], k[:, :1]).expand(-1, HEADS, -1, -1) @ v


def repeated_for_all_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weights(q[:, :1], k[:, :1]).repeat(1, HEADS, 1, 1) @ v


def for_pairs_of_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weights(q[:, :2], k[:, :2]).repeat_interleave(2, 1) @ v


def for_the_whole_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weights(q[0], k[0]).expand(BATCH, -1, -1, -1) @ v


def of_one_head_for_everything(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weights(q[0, 0], k[0, 0]).expand(BATCH, HEADS, -1, -1) @ v


def values_repeated_as_well(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = weights(q[:, :1], k[:, :1]).expand(-1, HEADS, -1, -1)
    return w @ v[:, :1].expand(-1, HEADS, -1, -1)


def of_a_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:1, :1], k[:1, :1], v, is_causal=True, scale=0.3)


def operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(BATCH, HEADS, LENGTH, size) for size in (6, 6, 5)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def rewritten(function: Callable[..., Tensor], data: list[Tensor] | None = None) -> Rewritten:
    return rewrite(trace_directly(Site(function), data or operands()))


@pytest.mark.parametrize(
    "function",
    [
        for_all_heads,
        repeated_for_all_heads,
        for_pairs_of_heads,
        for_the_whole_batch,
        of_one_head_for_everything,
        values_repeated_as_well,
        of_a_call,
    ],
)
def test_copies_of_the_weights(function: Callable[..., Tensor]) -> None:
    found = rewritten(function)
    assert found.count == 1
    compare(Site(function), found.graph, operands())


def test_copies_share_what_is_dropped_before() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = F.dropout(weights(q[:, :1], k[:, :1]), 0.5)
        return w.expand(-1, HEADS, -1, -1) @ v

    q, k, _ = operands()
    data = [q, k, torch.eye(LENGTH, dtype=torch.float64).repeat(BATCH, HEADS, 1, 1)]
    found = rewritten(function, data)
    assert found.count == 1
    kept = run_like(found.graph, Site(function), data)
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    full = weights(q[:, :1], k[:, :1]).expand_as(kept)
    torch.testing.assert_close(kept, torch.where(kept == 0, 0.0, 2 * full))
    assert 0.3 < float((kept[full > 0] == 0).double().mean()) < 0.7


def test_copies_that_drop_others_are_refused() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(weights(q[:, :1], k[:, :1]).expand(-1, HEADS, -1, -1), 0.5) @ v

    found = rewritten(function)
    assert found.count == 0 and found.left() == ["unsupported-feature"]


@pytest.mark.parametrize("call", [True, False])
def test_dropout_of_everything_is_refused(call: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if call:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=1.0)
        return F.dropout(weights(q, k), 1.0) @ v

    found = rewritten(function)
    assert found.count == 0 and found.left() == ["unsupported-feature"]
