"""A learned bias that holds a mask as well: rows that it leaves without a key are as in eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_graphs import Rewritten, Site, compare, rewrite, trace_directly
from torch import Tensor

INF = float("inf")
HEADS, LENGTH = 4, 7


def lower(diagonal: int) -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(diagonal)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.3


def operands() -> list[Tensor]:
    """The first keys of the first entry of the batch are padding."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, HEADS, LENGTH, 6)
    qkv = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [*qkv, torch.tensor([[0] * 3 + [1] * 4, [1] * LENGTH])]


def module(function: Callable[..., Tensor]) -> Site:
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(HEADS, LENGTH, LENGTH, generator=generator, dtype=torch.float64)
    low = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~lower(-1), -INF)
    return Site(function, [table], [low])


def rewritten(function: Callable[..., Tensor]) -> Rewritten:
    return rewrite(trace_directly(module(function), operands()))


def filled(table: Tensor, low: Tensor) -> Tensor:
    return table.masked_fill(~lower(-1), -INF)


def chosen(table: Tensor, low: Tensor) -> Tensor:
    return torch.where(lower(-1), table, -INF)


def summed(table: Tensor, low: Tensor) -> Tensor:
    return table + low


def logarithm(table: Tensor, low: Tensor) -> Tensor:
    return (table.sigmoid() * lower(-1)).log()


@pytest.mark.parametrize("bias", [filled, chosen, summed, logarithm])
def test_rows_of_minus_infinity_stay_nan(bias: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The first query sees nothing."""

    def function(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, t: Tensor, low: Tensor) -> Tensor:
        return (scores(q, k) + bias(t, low)).softmax(-1) @ v

    found = rewritten(function)
    assert found.count == 1 and found.result.sites[0].bias == "learned"
    assert module(function)(*operands()).isnan().any()
    compare(module(function), found.graph, operands(), nan_spreads=True)


Low = Callable[[Tensor], Tensor]


@pytest.mark.parametrize(
    "bias",
    [lambda t: t.masked_fill(~lower(0), -1e9), lambda t: t - 1e9 * (~lower(0)).double()],
    ids=["filled", "subtracted"],
)
@pytest.mark.parametrize(("low", "count"), [(-1e9, 0), (-INF, 1)])
def test_a_number_in_the_bias_and_padding(bias: Low, low: float, count: int) -> None:
    """Rows of padding alone share their weight among all keys that are not in both masks."""

    def function(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, t: Tensor, _: Tensor) -> Tensor:
        s = (scores(q, k) + bias(t)).masked_fill(pad[:, None, None] == 0, low)
        return s.softmax(-1) @ v

    found = rewritten(function)
    assert found.count == count and (count or found.left() == ["fully-masked-row"])
    compare(module(function), found.graph, operands())


@pytest.mark.parametrize(("low", "count"), [(-1e9, 0), (-INF, 1)])
def test_a_number_in_the_bias_and_a_constant_mask(low: float, count: int) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, t: Tensor, _: Tensor) -> Tensor:
        s = scores(q, k) + t.masked_fill(~lower(-1), -1e9)
        return s.masked_fill(~lower(0), low).softmax(-1) @ v

    found = rewritten(function)
    assert found.count == count and (count or found.left() == ["fully-masked-row"])
    compare(module(function), found.graph, operands())


def test_a_bias_without_a_mask_keeps_the_flag() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, t: Tensor, _: Tensor) -> Tensor:
        return (scores(q, k) + t * 2.0).masked_fill(~lower(0), -1e9).softmax(-1) @ v

    found = rewritten(function)
    assert found.count == 1 and found.result.sites[0].mask == "causal"
    compare(module(function), found.graph, operands())
