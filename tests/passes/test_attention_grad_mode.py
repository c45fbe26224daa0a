"""``torch.no_grad`` around a part of an attention: its gradients stay the original's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import Site, compare, rewrite, trace_training
from spellings_base import causal_bool, heads_first
from torch import Tensor

INF = float("-inf")


def example(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * batch + length)
    return torch.randn(3, batch, length, 4, 6, generator=generator, dtype=torch.float64)


def weights_without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        w = (q @ k.mT).softmax(-1)
    return w @ v


def scores_without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        s = q @ k.mT
    return s.softmax(-1) @ v


def transposed_without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        kt = k.transpose(-1, -2)
    return (q @ kt).softmax(-1) @ v


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    e = s.exp()
    with torch.no_grad():
        total = e.sum(-1, keepdim=True)
    return (e / total) @ v


def repeated_without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        k = k[:, ::2].repeat_interleave(2, dim=1)
    return F.scaled_dot_product_attention(q, k, v)


def sinks_without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        column = q[0, :, 0, 0].view(1, -1, 1, 1).expand(q.size(0), -1, q.size(2), 1)
    w = torch.cat([q @ k.mT, column], dim=-1).softmax(-1)
    return w[..., :-1] @ v


def mask_without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        future = ~causal_bool(q.size(2))
    return (q @ k.mT).masked_fill(future, INF).softmax(-1) @ v


def maximum_without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    with torch.no_grad():
        top = s.amax(-1, keepdim=True)
    return (s - top).softmax(-1) @ v


@pytest.mark.parametrize(
    "function",
    [
        weights_without,
        scores_without,
        transposed_without,
        written_out,
        repeated_without,
        sinks_without,
    ],
)
def test_a_part_without_gradients_is_left(function: Callable[..., Tensor]) -> None:
    module = Site(lambda qkv: function(*heads_first(qkv)).transpose(1, 2).flatten(2))
    found = rewrite(trace_training(module, [example(2, 9)]))
    assert found.count == 0
    assert found.left() == ["unsupported-feature"]
    compare(module, found.graph, [example(2, 9)])


@pytest.mark.parametrize("function", [mask_without, maximum_without])
def test_what_has_no_gradient_anyway(function: Callable[..., Tensor]) -> None:
    module = Site(lambda qkv: function(*heads_first(qkv)).transpose(1, 2).flatten(2))
    found = rewrite(trace_training(module, [example(2, 9)]))
    assert found.count == 1
    compare(module, found.graph, [example(2, 9)])
