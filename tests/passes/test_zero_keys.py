"""Keys of zeros with values of zeros beside the others: sinks that are numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import Site, compare, rewrite, trace_directly, trace_training
from torch import Tensor, nn

INF = float("-inf")
Function = Callable[..., Tensor]
DYNAMIC = {0: (0, 2)}


def data_of(batch: int, length: int, kv_heads: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch + 10 * length)
    shape = (batch, 4 + 2 * kv_heads, length, 6)
    return [torch.randn(shape, generator=generator, dtype=torch.float64)]


def of_one(function: Function) -> Site:
    """Queries, keys and values are as many."""

    def attention(x: Tensor) -> Tensor:
        heads = (x.size(1) - 4) // 2
        return function(*x.split([4, heads, heads], 1))

    return Site(attention)


def future(rows: int, columns: int, seen: int = 0) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool).triu(seen + 1)


def in_front(x: Tensor, count: int = 1) -> Tensor:
    return F.pad(x, (0, 0, count, 0), value=0.0)


def behind(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(x.size(0), x.size(1), 1, x.size(3))], 2)


# -- one attention with sinks ------------------------------------------------------------------


def mask_of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = in_front(k), in_front(v)
    s = torch.einsum("bhid,bhjd->bhij", q, k) * 0.4
    s = s.masked_fill(future(*s.shape[-2:], seen=1), -torch.finfo(s.dtype).max)
    return torch.einsum("bhij,bhjd->bhid", s.softmax(-1), v)


def mask_padded_too(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = behind(k), behind(v)
    mask = torch.zeros(q.size(2), q.size(2)).masked_fill_(future(q.size(2), q.size(2)), INF)
    s = q @ k.mT + F.pad(mask[None].double(), (0, 1))[:, None]
    return s.softmax(-1) @ v


def several(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = 5 * torch.tanh(q @ in_front(k, 3).mT / 5)
    s = s.masked_fill(future(*s.shape[-2:], seen=3), INF)
    return F.dropout(s.softmax(-1), 0.3, False) @ in_front(v, 3)


def of_the_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = F.pad(~future(q.size(2), q.size(2)), (1, 0), value=True)
    return F.scaled_dot_product_attention(q, in_front(k), in_front(v), attn_mask=seen)


def everything_seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, behind(k), behind(v), scale=0.3)


def on_both_sides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (F.pad(x, (0, 0, 1, 2)) for x in (k, v))
    return (q @ k.mT).softmax(-1) @ v


def distances(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = torch.arange(q.size(2))
    bias = F.pad(-(n[:, None] - n).abs().double(), (1, 0))
    s = q @ in_front(k).mT + bias
    return s.masked_fill(future(*s.shape[-2:], seen=1), INF).softmax(-1) @ in_front(v)


ONE = [
    mask_of_all, mask_padded_too, several, of_the_call, everything_seen, on_both_sides, distances,
]  # fmt: skip


@pytest.mark.parametrize("function", ONE, ids=lambda f: f.__name__)
def test_they_are_a_sink(function: Function) -> None:
    rewritten = rewrite(trace_training(of_one(function), data_of(2, 7), DYNAMIC))
    assert rewritten.count == 1, rewritten.result.decisions
    (site,) = rewritten.result.sites
    assert site.sinks
    assert site.bias == ("constant" if function is distances and site.bias else "")
    assert not rewritten.graph.graph.find_nodes(
        op="call_function", target=torch.ops.aten.pad.default
    )
    for sizes in ((2, 7), (3, 4), (4, 4)):
        compare(of_one(function), rewritten.graph, data_of(*sizes))


@pytest.mark.parametrize("function", ONE, ids=lambda f: f.__name__)
def test_equal_sizes_confuse_nothing(function: Function) -> None:
    rewritten = rewrite(trace_directly(of_one(function), data_of(4, 4)))
    assert rewritten.result.sites[0].sinks
    compare(of_one(function), rewritten.graph, data_of(4, 4))


def test_three_are_one_of_their_logarithm() -> None:
    graph = rewrite(trace_directly(of_one(several), data_of(2, 5))).graph
    (sinks,) = [b for name, b in graph.named_buffers() if "sinks" in name]
    torch.testing.assert_close(sinks, torch.full((4,), math.log(3), dtype=torch.float64))


def test_heads_that_share_keys_go_on_sharing_them() -> None:
    def shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (in_front(x.repeat_interleave(2, 1)) for x in (k, v))
        return mask(q @ k.mT).softmax(-1) @ v

    def mask(s: Tensor) -> Tensor:
        return s.masked_fill(future(*s.shape[-2:], seen=1), INF)

    rewritten = rewrite(trace_training(of_one(shared), data_of(2, 7, 2), DYNAMIC))
    (site,) = rewritten.result.sites
    assert site.sinks
    assert site.kv_heads == 2
    compare(of_one(shared), rewritten.graph, data_of(3, 5, 2))


@pytest.mark.parametrize("weights", [True, False])
def test_torch_s_own_attention(weights: bool) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = nn.MultiheadAttention(12, 2, batch_first=True, add_zero_attn=True)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            mask = future(x.size(1), x.size(1))
            found: Tensor = self.of(x, x, x, attn_mask=mask, need_weights=weights)[0]
            return found

    model = Own()
    data = [torch.randn(2, 7, 12, dtype=torch.float64)]
    rewritten = rewrite(trace_training(model, data, {0: (0, 1)}))
    (site,) = rewritten.result.sites
    assert site.sinks
    assert site.params.causal
    compare(model, rewritten.graph, [torch.randn(3, 5, 12, dtype=torch.float64)])


# -- none of that ------------------------------------------------------------------------------


def ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ F.pad(k, (0, 0, 1, 0), value=1.0).mT).softmax(-1) @ in_front(v)


def of_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ in_front(k).mT).softmax(-1) @ F.pad(v, (0, 0, 1, 0), value=0.5)


def on_other_sides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ in_front(k).mT).softmax(-1) @ behind(v)


def features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (F.pad(x, (0, 1)) for x in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


def hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ behind(k).mT
    return s.masked_fill(future(*s.shape[-2:]), INF).softmax(-1) @ behind(v)


def hidden_from_some(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ in_front(k).mT
    rows = torch.arange(q.size(2))[:, None]
    hides = (rows % 3 == 1) & (torch.arange(s.size(3)) == 0)
    return s.masked_fill(hides, INF).softmax(-1) @ in_front(v)


def hidden_in_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ in_front(k, 2).mT
    return s.masked_fill(future(*s.shape[-2:]), INF).softmax(-1) @ in_front(v, 2)


def masked_on_the_other_side(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = F.pad(future(q.size(2), q.size(2)), (1, 0))
    return (q @ behind(k).mT).masked_fill(mask, INF).softmax(-1) @ behind(v)


def by_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ in_front(k, 2).mT
    rows, columns = (torch.arange(n) for n in s.shape[-2:])
    return (s + 0.5 * (columns - rows[:, None])).softmax(-1) @ in_front(v, 2)


def added_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ in_front(k).mT
    return (s + torch.arange(s.size(3)).add(1) * 0.1).softmax(-1) @ in_front(v)


def by_the_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ in_front(k).mT
    return (s + in_front(k)[..., 0].add(1).cos()[:, :, None]).softmax(-1) @ in_front(v)


OTHERS = [
    ones, of_values, on_other_sides, features, hidden, hidden_from_some, hidden_in_part,
    masked_on_the_other_side, by_distance, added_to, by_the_data,
]  # fmt: skip


@pytest.mark.parametrize("function", OTHERS, ids=lambda f: f.__name__)
def test_others_are_keys_like_any(function: Function) -> None:
    rewritten = rewrite(trace_directly(of_one(function), data_of(2, 7), DYNAMIC))
    assert not any(site.sinks for site in rewritten.result.sites)
    compare(of_one(function), rewritten.graph, data_of(2, 7))


def test_what_is_learned_may_become_another() -> None:
    def learned(x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = x.split(4, 1)
        return (q @ in_front(k).mT + bias).softmax(-1) @ in_front(v)

    model = Site(learned, [torch.zeros(8, dtype=torch.float64)])
    rewritten = rewrite(trace_directly(model, data_of(2, 7)))
    assert not any(site.sinks for site in rewritten.result.sites)
    compare(model, rewritten.graph, data_of(2, 7))
