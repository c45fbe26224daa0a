"""Keys and values in several parts: one attention over all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import Site, compare, rewrite, trace_directly, trace_training
from torch import Tensor

INF = float("-inf")
Function = Callable[..., Tensor]


def data_of(batch: int, length: int, more: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch + 10 * length)
    lengths = [length, length, length, more, more]
    shapes = [(batch, 4, n, 6) for n in lengths]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def causal(s: Tensor) -> Tensor:
    return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), INF)


# -- one attention ---------------------------------------------------------------------------------


def two_products(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    w = torch.cat([q @ k.mT, q @ k2.mT], -1).softmax(-1)
    return w[..., : k.size(2)] @ v + w[..., k.size(2) :] @ v2


def second_part_first(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    w = torch.cat([q @ k2.mT * 0.3, q @ k.mT * 0.3], dim=3).softmax(dim=3)
    of_more, own = w.split([k2.size(2), k.size(2)], -1)
    return own @ v + of_more @ v2


def own_keys_masked(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    w = torch.cat([q @ k2.mT, causal(q @ k.mT)], -1).softmax(-1)
    return w @ torch.cat([v2, v], 2)


def values_apart_alone(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    w = (q @ torch.cat([k2, k], 2).mT).softmax(-1)
    w = F.dropout(w, 0.2, False)
    n = k2.size(2)
    return w.narrow(-1, n, k.size(2)) @ v + w.narrow(-1, 0, n) @ v2


def three_by_einsum(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    keys = (k, k2, k.sin())
    s = torch.cat([torch.einsum("bhid,bhjd->bhij", q, x) for x in keys], -1)
    parts = s.softmax(-1).split([x.size(2) for x in keys], -1)
    products = (
        torch.einsum("bhij,bhjd->bhid", w, x) for w, x in zip(parts, (v, v2, v), strict=True)
    )
    first, second, third = products
    return first + second + third


def one_memory_for_all(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    k2, v2 = k2[:1], v2[:1]
    w = torch.cat([q @ k2.mT, causal(q @ k.mT)], -1).softmax(-1)
    return w[..., : k2.size(2)] @ v2 + w[..., k2.size(2) :] @ v


WHOLE = [
    two_products, second_part_first, own_keys_masked, values_apart_alone, three_by_einsum,
    one_memory_for_all,
]  # fmt: skip


@pytest.mark.parametrize("function", WHOLE, ids=lambda f: f.__name__)
def test_parts_are_joined(function: Function) -> None:
    dynamic = dict.fromkeys(range(5), (0, 2))
    rewritten = rewrite(trace_training(Site(function), data_of(2, 7, 5), dynamic))
    assert rewritten.count == 1, rewritten.result.decisions
    for sizes in ((2, 7, 5), (3, 4, 9), (4, 4, 4)):
        compare(Site(function), rewritten.graph, data_of(*sizes))


@pytest.mark.parametrize("function", WHOLE, ids=lambda f: f.__name__)
def test_equal_sizes_confuse_nothing(function: Function) -> None:
    data = data_of(4, 4, 4)
    rewritten = rewrite(trace_directly(Site(function), data))
    assert rewritten.count == 1
    masked = function in (own_keys_masked, one_memory_for_all)
    assert rewritten.result.sites[0].mask == ("causal from the end" if masked else "full")
    compare(Site(function), rewritten.graph, data)


# -- no such thing ---------------------------------------------------------------------------------


def values_of_other_parts(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    w = torch.cat([q @ k.mT, q @ k.sin().mT], -1).softmax(-1)
    n = k.size(2)
    return w[..., :n] @ v + w[..., :n] @ v.sin()


def a_part_left_out(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    w = torch.cat([q @ k.mT, q @ k2.mT, q @ k2.sin().mT], -1).softmax(-1)
    n = k.size(2)
    return w[..., :n] @ v + w[..., n : n + k2.size(2)] @ v2


def parts_subtracted(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    w = torch.cat([q @ k.mT, q @ k2.mT], -1).softmax(-1)
    return torch.add(w[..., : k.size(2)] @ v, w[..., k.size(2) :] @ v2, alpha=2)


def scales_that_differ(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    w = torch.cat([q @ k.mT * 0.5, q @ k2.mT * 0.3], -1).softmax(-1)
    return w @ torch.cat([v, v2], 2)


def queries_that_differ(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    w = torch.cat([q @ k.mT, q.sin() @ k2.mT], -1).softmax(-1)
    return w @ torch.cat([v, v2], 2)


def fills_that_differ(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    few = k2[..., 0].unsqueeze(-2) > 2
    w = torch.cat([causal(q @ k.mT), (q @ k2.mT).masked_fill(few, -1e9)], -1).softmax(-1)
    return w @ torch.cat([v, v2], 2)


def weights_read_as_well(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    w = torch.cat([q @ k.mT, q @ k2.mT], -1).softmax(-1)
    own = w[..., : k.size(2)]
    return own @ v + w[..., k.size(2) :] @ v2 + own.norm(dim=-1, keepdim=True)


OTHERS = [
    values_of_other_parts, a_part_left_out, parts_subtracted, scales_that_differ,
    queries_that_differ, fills_that_differ, weights_read_as_well,
]  # fmt: skip


@pytest.mark.parametrize("function", OTHERS, ids=lambda f: f.__name__)
def test_what_is_no_whole_stays_as_it_was(function: Function) -> None:
    data = data_of(2, 7, 5)
    graph = trace_directly(Site(function), data)
    before = [n.target for n in graph.graph.nodes]
    rewritten = rewrite(graph)
    assert rewritten.count == 0 and rewritten.left(), rewritten.result.decisions
    after = [n.target for n in rewritten.graph.graph.nodes]
    assert before.count(torch.ops.aten.cat.default) == after.count(torch.ops.aten.cat.default)
    compare(Site(function), rewritten.graph, data)
