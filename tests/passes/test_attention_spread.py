"""What is done to the weights moves to the outputs only where attention takes their place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_graphs import (
    ATTENTION,
    Site,
    compare,
    rewrite,
    trace_directly,
    trace_training,
)
from spellings_base import finish, heads_first
from spellings_spread import causal, two_weights
from torch import Tensor

Function = Callable[..., Tensor]


def example() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(3, 2, 7, 4, 6, generator=generator, dtype=torch.float64)


def read_by_a_norm(qkv: Tensor) -> Tensor:
    """Whatever happens to the weights, these scores are used elsewhere."""
    q, k, v = heads_first(qkv)
    s = q @ k.mT
    w1, w2 = causal(s).softmax(-1).chunk(2, dim=1)
    w3 = causal(s * 2).softmax(-1)
    out = finish(w1, v[:, :2]) - 0.3 * finish(w2, v[:, 2:])
    return torch.cat([out, finish(w3, v), finish(w3, k)], -1) * s.square().mean()


def differences_read_by_a_norm(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.mT
    w = torch.stack([s, s * 2], 2).softmax(-1)
    return finish((w[:, :, 0] - 0.3 * w[:, :, 1]) * 0.5, v)


@pytest.mark.parametrize("function", [read_by_a_norm, differences_read_by_a_norm])
def test_what_is_left_is_as_it_was(function: Function) -> None:
    module = Site(function)
    graph = trace_directly(module, [example()])
    before = [n.target for n in graph.graph.nodes]
    rewritten = rewrite(graph)
    assert rewritten.count == 0 and rewritten.left()
    assert sorted(map(str, before)) == sorted(str(n.target) for n in graph.graph.nodes)
    compare(module, graph, [example()])


def test_one_of_two_is_better_than_none() -> None:
    def function(qkv: Tensor) -> Tensor:
        w1, w2, v = two_weights(qkv)
        return finish(w1 - 0.3 * w2, v) * w1.sum()

    module = Site(function)
    rewritten = rewrite(trace_directly(module, [example()]))
    assert rewritten.count == 1
    assert rewritten.left() == ["attention-weights-used-elsewhere"]
    compare(module, rewritten.graph, [example()])


def test_values_share_one_call_and_one_dropout() -> None:
    def function(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        w = torch.dropout(causal(q @ k.mT).softmax(-1), 0.25, True)
        return torch.cat([finish(w, v), finish(w, v)], -1)

    module = Site(function)
    rewritten = rewrite(trace_directly(module, [example()]))
    (call,) = [n for n in rewritten.graph.graph.nodes if n.target is ATTENTION]
    assert call.args[2].meta["val"].shape[-1] == 12
    (out,) = (rewritten.graph(example()),)
    first, second = out.chunk(2, -1)
    assert torch.equal(first, second) and not torch.equal(out, rewritten.graph(example()))


def test_products_far_apart_stay_where_randomness_lies_between() -> None:
    """Moved, a dropout would draw other numbers."""

    def function(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        w = causal(q @ k.mT).softmax(-1)
        first = torch.dropout(w @ v, 0.5, True)
        return first + w @ (k * 2)

    rewritten = rewrite(trace_directly(Site(function), [example()]))
    assert rewritten.left() == ["attention-weights-used-elsewhere"]


def test_the_output_may_be_viewed_after_elementwise_operations() -> None:
    """They keep the layout of attention's result, which is not the product's."""

    def function(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        out = causal(q @ k.mT).softmax(-1) @ v
        return torch.tanh(out * 2).view(q.shape[0], -1)

    module = Site(function)
    rewritten = rewrite(trace_directly(module, [example()]))
    assert rewritten.count == 1
    compare(module, rewritten.graph, [example()])


def test_halves_of_the_keys_are_no_heads() -> None:
    def function(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        w = (q @ k.mT).softmax(-1)
        return finish(w[..., :4] - 0.5 * w[..., 4:], v[:, :, :4])

    module, data = Site(function), torch.cat([example(), example()[:, :, :1]], 2)
    rewritten = rewrite(trace_directly(module, [data]))
    assert rewritten.count == 0
    compare(module, rewritten.graph, [data])


class Tripled(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * grad


def test_what_an_autograd_function_gives_is_no_part_of_weights() -> None:
    """Its results are items of a tuple, as pieces of a tensor are. The pass ended with an error."""

    def function(qkv: Tensor, learned: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        v = Tripled.apply(v * learned)  # type: ignore[no-untyped-call]
        return finish(causal(q @ k.mT).softmax(-1), v)

    module = Site(function, [torch.tensor(0.7, dtype=torch.float64)])
    rewritten = rewrite(trace_training(module, [example()]))
    assert rewritten.count == 1, rewritten.result.decisions
    compare(module, rewritten.graph, [example()])
