"""A mask on the weights that is the scores' own only makes rows without a key zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_graphs import Site, compare, rewrite, trace_directly
from torch import Tensor

LOW = torch.finfo(torch.float64).min
Masked = Callable[[Tensor, Tensor, float], Tensor]


def the_same(s: Tensor, hidden: Tensor, low: float) -> Tensor:
    return s.masked_fill(hidden, low).softmax(-1).masked_fill(hidden, 0.0)


def once_negated(s: Tensor, hidden: Tensor, low: float) -> Tensor:
    return torch.where(~hidden, s.masked_fill(hidden, low).softmax(-1), 0.0)


def negated_twice(s: Tensor, hidden: Tensor, low: float) -> Tensor:
    weights = torch.where(torch.logical_not(hidden), s, low).softmax(-1)
    return weights.masked_fill(~~hidden, 0.0)


def the_other_way_round(s: Tensor, hidden: Tensor, low: float) -> Tensor:
    return s.masked_fill(hidden, low).softmax(-1).masked_fill(~hidden, 0.0)


def rows_and_columns_swapped(s: Tensor, hidden: Tensor, low: float) -> Tensor:
    return s.masked_fill(hidden, low).softmax(-1).mT.masked_fill(hidden, 0.0).mT


def batch_and_heads_swapped(s: Tensor, hidden: Tensor, low: float) -> Tensor:
    weights = s.masked_fill(hidden, low).softmax(-1).transpose(0, 1)
    return weights.masked_fill(hidden, 0.0).transpose(0, 1)


def compared(function: Masked, mask: Tensor, low: float) -> int:
    def attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return function(q @ k.mT / 2, hidden, low) @ v

    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(3, 3, 7, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    module = Site(attention)
    found = rewrite(trace_directly(module, [*data, mask], dict.fromkeys(range(3), (2,))))
    compare(module, found.graph, [*data, mask])
    assert found.count or found.left() == ["unsupported-feature"]
    return found.count


def padding() -> Tensor:
    """The first row of the batch has no key at all."""
    return (torch.arange(7) >= torch.tensor([0, 3, 7])[:, None])[:, None, None]


def of_heads() -> Tensor:
    return torch.rand(3, 3, 1, 7, generator=torch.Generator().manual_seed(2)) < 0.4


@pytest.mark.parametrize("low", [LOW, -float("inf")])
@pytest.mark.parametrize("function", [the_same, once_negated, negated_twice])
def test_it_is_found(function: Masked, low: float) -> None:
    assert compared(function, padding(), low) == 1


@pytest.mark.parametrize("low", [LOW, -float("inf")])
@pytest.mark.parametrize(
    ("function", "mask"),
    [
        (the_other_way_round, padding()),
        (rows_and_columns_swapped, padding()),
        (batch_and_heads_swapped, of_heads()),
    ],
)
def test_another_one_is_left(function: Masked, mask: Tensor, low: float) -> None:
    """The same tensor may be another mask, if it meets other axes of the weights."""
    assert compared(function, mask, low) == 0
