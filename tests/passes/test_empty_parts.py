"""An empty past goes; whatever holds something stays."""

from __future__ import annotations

import pytest
import torch
from attention_graphs import Site, compare, trace_directly, trace_training
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


EMPTY = [made_empty, cut_to_nothing, no_tensor_at_all, wider]


@pytest.mark.parametrize("function", EMPTY)
def test_an_empty_past_goes(function) -> None:
    module, data = Site(function), [torch.randn(2, 7, 48, dtype=torch.float64, requires_grad=True)]
    graph = trace_directly(module, data, {0: [0, 1]})
    assert drop_empty_parts(graph) >= 2
    assert aten.cat.default not in [n.target for n in graph.graph.nodes]
    compare(module, graph, data)
    assert len(rewrite_attention(graph).sites) == 1
    compare(module, graph, data, 1e-6 if function is wider else 1e-9)


def two_left(x: Tensor) -> Tensor:
    return torch.cat([x[:, :0], x, x.cos()], 1)


def test_the_others_are_joined() -> None:
    module, data = Site(two_left), [torch.randn(2, 7, 48, dtype=torch.float64, requires_grad=True)]
    graph = trace_training(module, data)
    assert drop_empty_parts(graph) == 1
    compare(module, graph, data)


def something(x: Tensor) -> Tensor:
    return torch.cat([x[:, :1], x], 1)


def nothing_else(x: Tensor) -> Tensor:
    return torch.cat([x[:, :0], x[:, :0]], 1).sum() + x


def written(x: Tensor) -> Tensor:
    joined = torch.cat([x[:, :0], x], 1)
    joined.mul_(2.0)  # x is what it was
    return joined + x


@pytest.mark.parametrize("function", [something, nothing_else, written])
def test_what_is_no_empty_part_stays(function) -> None:
    module, data = Site(function), [torch.randn(2, 7, 48, dtype=torch.float64, requires_grad=True)]
    graph = trace_directly(module, data, {0: [0, 1]})
    assert drop_empty_parts(graph) == 0
    compare(module, graph, data)
