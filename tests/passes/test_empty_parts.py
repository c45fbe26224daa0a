"""An empty past goes; whatever holds something stays."""

from __future__ import annotations

import pytest
import torch
from attention_graphs import Site, compare, trace_directly
from torch import Tensor

from fxport.passes.attention.rewrite import rewrite_attention
from fxport.passes.empty_parts import drop_empty_parts

aten = torch.ops.aten


def heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = x.view(x.shape[0], x.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4)
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1) @ v


def made_empty(x: Tensor) -> Tensor:
    q, k, v = heads(x)
    past = torch.empty(x.shape[0], 2, 0, 8, dtype=x.dtype)
    return attend(q, torch.cat([past, k], dim=2), torch.cat((past, v), -2))


def cut_to_nothing(x: Tensor) -> Tensor:
    q, k, v = heads(x)
    return attend(q, torch.cat([k[:, :, :0], k, v[:, :, :0]], 2), torch.cat([v[:, :, :0], v], 2))


def no_tensor_at_all(x: Tensor) -> Tensor:
    q, k, v = heads(x)
    nothing = torch.tensor([], dtype=x.dtype)
    return attend(q, torch.cat([nothing, k], 2), torch.cat([nothing, v], 2))


def wider(x: Tensor) -> Tensor:
    """An empty part of another type makes the result that type."""
    q, k, v = heads(x.float())
    past = torch.zeros(x.shape[0], 2, 0, 8, dtype=torch.float64)
    return attend(q.double(), torch.cat([past, k], dim=2), torch.cat([past, v], dim=2))


def columns_and_rows_of_the_mask(x: Tensor) -> Tensor:
    q, k, v = heads(x)
    future = torch.full((q.shape[2], q.shape[2]), float("-inf"), dtype=x.dtype).triu(1)
    mask = torch.hstack([torch.zeros((q.shape[2], 0), dtype=x.dtype), future])
    mask = torch.vstack([mask[:0], mask, mask[:0]])
    return (q @ k.mT + mask).softmax(-1) @ v


def viewed_afterwards(x: Tensor) -> Tensor:
    """GPT-NeoX Japanese: what is left of the features after a rotation of all."""
    q, k, v = (torch.cat([y, y[..., 8:]], -1) for y in heads(x))
    q, k, v = (y.view(y.shape[0] * 2, y.shape[2], 8) for y in (q, k, v))
    mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    return (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1) @ v


EMPTY = [made_empty, cut_to_nothing, no_tensor_at_all, wider, columns_and_rows_of_the_mask,
         viewed_afterwards]  # fmt: skip


@pytest.mark.parametrize("function", EMPTY)
def test_an_empty_past_goes(function) -> None:
    module, data = Site(function), [torch.randn(2, 7, 48, dtype=torch.float64, requires_grad=True)]
    graph = trace_directly(module, data, {0: [0, 1]})
    assert drop_empty_parts(graph) >= 2
    joins = (aten.cat.default, aten.hstack.default, aten.vstack.default)
    assert not any(n.target in joins for n in graph.graph.nodes)
    compare(module, graph, data)
    assert len(rewrite_attention(graph).sites) == 1
    compare(module, graph, data, 1e-6 if function is wider else 1e-9)


def two_left(x: Tensor) -> Tensor:
    return torch.cat([x[:, :0], x, x.cos()], 1)


def two_columns_left(x: Tensor) -> Tensor:
    return torch.hstack([x[:, :0], x, x.cos()])


def two_rows_left(x: Tensor) -> Tensor:
    return torch.vstack([x, x[:0], x.cos()])


def nothing_decides(x: Tensor) -> Tensor:
    """The first has one dimension: all are joined along the first."""
    return torch.hstack([x.new_empty(0), x[0], x[1]])


@pytest.mark.parametrize("function", [two_left, two_columns_left, two_rows_left, nothing_decides])
def test_the_others_are_joined(function) -> None:
    module, data = Site(function), [torch.randn(2, 7, 48, dtype=torch.float64, requires_grad=True)]
    graph = trace_directly(module, data)
    assert drop_empty_parts(graph) == 1
    graph.graph.lint()
    compare(module, graph, data)


def something(x: Tensor) -> Tensor:
    return torch.cat([x[:, :1], x], 1)


def nothing_else(x: Tensor) -> Tensor:
    return torch.cat([x[:, :0], x[:, :0]], 1).sum() + x


def written(x: Tensor) -> Tensor:
    joined = torch.cat([x[:, :0], x], 1)
    joined.mul_(2.0)  # x is what it was
    return joined + x


def rows_made_a_matrix(x: Tensor) -> Tensor:
    return torch.vstack([x[0, 0], x[0, :0], x[0, 1]])


@pytest.mark.parametrize("function", [something, nothing_else, written, rows_made_a_matrix])
def test_what_is_no_empty_part_stays(function) -> None:
    module, data = Site(function), [torch.randn(2, 7, 48, dtype=torch.float64, requires_grad=True)]
    graph = trace_directly(module, data, {0: [0, 1]})
    assert drop_empty_parts(graph) == 0
    compare(module, graph, data)
