"""Scores that meet values by a way that is not read: each is reported, none is slow in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import Site, compare, rewrite, trace_directly, trace_training
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fxport.capture.dynamo import lower
from fxport.passes.decisions import sites_of
from fxport.passes.pipeline import PipelineResult, training_pipeline
from fxport.report import Outcome


def scores(q: Tensor, k: Tensor) -> Tensor:
    future = torch.ones(q.size(-2), q.size(-2), dtype=torch.bool).triu(1)
    return (q @ k.mT / 2).masked_fill(future, float("-inf"))


def powers(q: Tensor, k: Tensor) -> Tensor:
    s = scores(q, k)
    return (s - s.amax(-1, keepdim=True)).exp()


def normalised(s: Tensor) -> Tensor:
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def example() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, 7, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


# -- gradients that end somewhere ------------------------------------------------------------------


def sum_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = powers(q, k)
    return (e / e.sum(-1, keepdim=True).detach()) @ v


def exponentials_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = powers(q, k).detach()
    return (e / e.sum(-1, keepdim=True)) @ v


def dividend_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = powers(q, k)
    return (e.detach() / e.sum(-1, keepdim=True)) @ v


def weights_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return normalised(scores(q, k)).detach() @ v


def logarithm_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).log_softmax(-1).detach().exp() @ v


def sum_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = powers(q, k)
    with torch.no_grad():
        total = e.sum(-1, keepdim=True)
    return (e / total) @ v


# -- no softmax ------------------------------------------------------------------------------------


def sigmoids(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).sigmoid() @ v


def rectified(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = (q @ k.mT).relu().tril()
    return (w / (w.sum(-1, keepdim=True) + 1e-6)) @ v


def squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT).tril()
    return (s * s) @ v


def sparse_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    ordered, _ = s.sort(-1, descending=True)
    count = torch.arange(1, s.size(-1) + 1, dtype=s.dtype)
    total = ordered.cumsum(-1)
    support = (1 + count * ordered > total).sum(-1, keepdim=True)
    return (s - (total.gather(-1, support - 1) - 1) / support).clamp(min=0) @ v


def last_of_running_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp().tril()
    return (e / e.cumsum(-1)[..., -1:]) @ v


def three_at_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = powers(q, k)
    return torch.einsum("bhts,bhsd,bht->bhtd", e, v, 1 / e.sum(-1).detach())


def scattered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    best, index = scores(q, k).topk(1, -1)
    s = scores(q, k)
    return torch.zeros_like(s).scatter(-1, index, (s - best).softmax(-1).gather(-1, index)) @ v


def small_weights_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1)
    return torch.where(w > 0.1, w, 0.0) @ v


def distances(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-(torch.cdist(q, k) ** 2)).softmax(-1) @ v


def distances_written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-((q[:, :, :, None] - k[:, :, None]) ** 2).sum(-1)).softmax(-1) @ v


def additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.tanh(q[:, :, :, None] + k[:, :, None]) @ torch.ones(4, dtype=q.dtype)
    return s.softmax(-1) @ v


def additive_by_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weight = torch.ones(1, 4, dtype=q.dtype)
    s = F.linear(torch.tanh(q[:, :, :, None] + k[:, :, None]), weight, weight[0, :1])
    return s.squeeze(-1).softmax(-1) @ v


def additive_by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pairs = torch.tanh(q[:, :, :, None] + k[:, :, None])
    s = torch.einsum("bhtsd,d->bhts", pairs, torch.ones(4, dtype=q.dtype))
    return s.softmax(-1) @ v


def graph_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = F.leaky_relu(q.sum(-1, keepdim=True) + k.sum(-1)[:, :, None], 0.2)
    return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -9e15).softmax(-1) @ v


def complex_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = (torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) for x in (q, k))
    return torch.einsum("bhid,bhjd->bhij", a, b.conj()).real.softmax(-1) @ v


def averaged_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).mean(1, keepdim=True).softmax(-1) @ v


def diagonals_of_all_heads_with_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    products = [torch.tensordot(a, b, dims=([2], [2])) for a, b in zip(q, k, strict=True)]
    diagonals = [p.diagonal(dim1=0, dim2=2).permute(2, 0, 1) for p in products]
    return torch.stack(diagonals).softmax(-1) @ v


@pytest.mark.parametrize(
    "function",
    [
        additive, additive_by_linear, additive_by_einsum, diagonals_of_all_heads_with_all,
        graph_attention, complex_products, averaged_over_heads,
        distances, distances_written_out, sum_detached, exponentials_detached,
        dividend_detached, weights_detached, logarithm_detached, sum_without_gradient,
        sigmoids, rectified, squared, sparse_maximum,
        last_of_running_sums, three_at_once, scattered, small_weights_dropped,
    ],
)  # fmt: skip
def test_it_is_reported_once_with_its_line(function: Callable[..., Tensor]) -> None:
    module = Site(function)
    found = rewrite(trace_training(module, example()))
    left = [s for s in sites_of(found.result.decisions) if s.outcome is Outcome.LEFT]
    assert found.count == 0 and len(left) == 1
    assert left[0].reason is not None and left[0].reason.location is not None
    assert left[0].reason.location.file == __file__
    compare(module, found.graph, example())


# -- nothing to report -----------------------------------------------------------------------------


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).tril() / q.size(-2)) @ v


def decaying(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    decay = (v.sum(-1).unsqueeze(-1) - v.sum(-1).unsqueeze(-2)).exp().tril()
    return (q @ k.mT * decay) @ v


def similar(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).sigmoid() + v @ v.mT


def own_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = (q @ k.mT @ v).relu()
    return x @ x.mT


def differences(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Made of pairs, and of no sum over features: what decays, say."""
    return (
        (q.sum(-1)[..., None, None] - k.sum(-1)[:, :, None, :, None]).exp() * v[:, :, None]
    ).sum(3)


def decay_of_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in state space models: exponentials of pairs, and yet linear in q.k."""
    steps = F.logsigmoid(q.sum(-1)).cumsum(-1)
    decay = (steps[..., None] - steps[..., None, :]).tril().exp().tril()
    return (q @ k.mT * decay) @ v


def learned_after(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (q @ k.mT).relu() @ w


@pytest.mark.parametrize(
    "function", [linear, decaying, decay_of_pairs, similar, own_products, differences]
)
def test_products_that_are_no_attention(function: Callable[..., Tensor]) -> None:
    assert not rewrite(trace_directly(Site(function), example())).result.decisions


def test_what_is_learned_is_no_value() -> None:
    module = Site(learned_after, [torch.randn(7, 5, dtype=torch.float64)])
    assert not rewrite(trace_directly(module, example()[:2])).result.decisions


def test_a_gate_beside_a_softmax_is_a_part_of_its_attention() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = scores(q, k)
        return (s.softmax(-1) * s.sigmoid()) @ v

    assert len(rewrite(trace_directly(Site(function), example())).result.decisions) == 1


# -- a part in the body of another operation -------------------------------------------------------


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor) -> Tensor:
        weights = normalised(s)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        result: Tensor = weights * (grad - (grad * weights).sum(-1, keepdim=True))
        return result


def again(function: Callable[..., Tensor], *given: Tensor) -> Tensor:
    result: Tensor = checkpoint(function, *given, use_reentrant=False)
    return result


def by_a_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _Softmax.apply(scores(q, k)) @ v  # type: ignore[no-any-return]


def softmax_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return again(lambda s: F.softmax(s, -1), scores(q, k)) @ v


def exponentials_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = again(torch.exp, scores(q, k))
    return (e / e.sum(-1, keepdim=True)) @ v


def scores_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return again(scores, q, k).softmax(-1) @ v


def weights_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return again(lambda q, k: scores(q, k).softmax(-1), q, k) @ v


def values_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return again(lambda w, v: w @ v, scores(q, k).softmax(-1), v)


def all_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return again(lambda q, k, v: scores(q, k).softmax(-1) @ v, q, k, v)


def decided(function: Callable[..., Tensor]) -> PipelineResult:
    results = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        results.append(training_pipeline(lower(gm).graph))
        return gm.forward

    torch._dynamo.reset()
    given = [x.requires_grad_() for x in example()]
    torch.compile(function, backend=keep, fullgraph=True)(*given)
    (result,) = results
    return result


@pytest.mark.parametrize(
    "function",
    [by_a_function, softmax_again, exponentials_again, scores_again, weights_again, values_again],
)
def test_an_attention_across_the_border_of_a_body(function: Callable[..., Tensor]) -> None:
    result = decided(function)
    (site,) = sites_of(result.decisions)
    assert site.outcome is Outcome.LEFT and not result.sites
    assert site.reason is not None and "a part of this attention runs in" in site.reason.message
    assert site.reason.location is not None and site.reason.location.file == __file__


def test_a_whole_attention_in_a_body_is_rewritten() -> None:
    result = decided(all_again)
    assert len(result.sites) == len(result.decisions) == 1
