"""Scores that are a sum of products become one product; what only looks like it stays a bias."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import (
    Rewritten,
    Site,
    compare,
    rewrite,
    run_like,
    trace_directly,
    trace_training,
)
from torch import Tensor

Function = Callable[..., Tensor]

# q, k, v, q2, k2 with heads, k2 and v without; all sizes differ, or B == H == T.
SIZES = {"batch": 2, "length": 7, "heads": 3, "size": 4, "more": 6, "value": 5}
EQUAL = dict.fromkeys(SIZES, 4)


def data_of(batch: int, length: int, heads: int, size: int, more: int, value: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    shapes = [(heads, size), (heads, size), (heads, value), (heads, more), (heads, more), (more,)]
    return [
        torch.randn(batch, length, *s, generator=generator, dtype=torch.float64) for s in shapes
    ]


def heads_first(*values: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in values]


def finish(s: Tensor, v: Tensor) -> Tensor:
    """`s`: scores; `v`: heads first."""
    allowed = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    return s.masked_fill(~allowed, -math.inf).softmax(-1) @ v


# -- sums of products ------------------------------------------------------------------------------


def latent(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor) -> Tensor:
    s = torch.einsum("bthd,bshd->bhts", q, k) + torch.einsum("bthr,bsr->bhts", q2, shared)
    return finish(s * 0.3, v.transpose(1, 2))


def latent_expanded(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    q, k, v, q2 = heads_first(q, k, v, q2)
    shared = shared.unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    return finish((q @ k.mT + q2 @ shared.mT) / 3, v)


def shared_first(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor) -> Tensor:
    """The product that is walked back to is the one whose keys have no heads."""
    q, k, v, q2 = heads_first(q, k, v, q2)
    return finish(q2 @ shared.unsqueeze(1).mT + q @ k.mT, v)


def each_with_its_scale(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
    return finish(q @ k.mT * 0.4 - (q2 @ k2.mT) / 4, v)


def three_in_brackets(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
    more = torch.sub(q2 @ k2.mT, (q2 * 0.5) @ shared.unsqueeze(1).mT, alpha=0.7)
    return finish(q @ k.mT + more, v)


def folded_heads(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor) -> Tensor:
    q, k, v, q2, k2 = (x.flatten(0, 1) for x in heads_first(q, k, v, q2, k2))
    added = torch.bmm(q2, k2.mT)
    return finish(torch.baddbmm(added, q, k.mT, beta=0.25, alpha=0.5), v)


def as_a_mask_of_sdpa(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=q2 @ k2.mT * 0.2)


def rows_and_columns_by_name(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    """The queries of the second product are the right factor."""
    s = torch.einsum("bthd,bshd->bhts", q, k) + torch.einsum("bshd,bthd->bhts", k2, q2)
    return finish(s, v.transpose(1, 2))


SUMS = [
    latent, latent_expanded, shared_first, each_with_its_scale, three_in_brackets, folded_heads,
    as_a_mask_of_sdpa, rows_and_columns_by_name,
]  # fmt: skip


def is_whole(found: Rewritten) -> bool:
    """Nothing dense is left beside one call."""
    (call,) = found.calls()
    (site,) = found.result.sites
    return call.args[3] is None and not site.bias


def check(function: Function, sizes: dict[str, int], dynamic: bool = False) -> Rewritten:
    site = Site(function)
    data = data_of(**sizes)
    marked = dict.fromkeys(range(len(data)), (0, 1)) if dynamic else {}
    found = rewrite(trace_directly(site, data, marked))
    compare(site, found.graph, data)
    if dynamic:
        compare(site, found.graph, data_of(**{**sizes, "batch": 3, "length": 11}))
    return found


@pytest.mark.parametrize("function", SUMS)
def test_a_sum_of_products_is_one(function: Function) -> None:
    found = check(function, SIZES, dynamic=True)
    assert is_whole(found)
    (site,) = found.result.sites
    more = {three_in_brackets: 12}.get(function, 6)
    assert (site.head_dim, site.value_dim) == (4 + more, 5)
    assert site.mask == ("full" if function is as_a_mask_of_sdpa else "causal")
    check(function, EQUAL)


def test_through_dynamo() -> None:
    data = data_of(**SIZES)
    site = Site(latent)
    found = rewrite(trace_training(site, data, dict.fromkeys(range(len(data)), (0, 1))))
    assert is_whole(found)
    compare(site, found.graph, data_of(**{**SIZES, "length": 11}))


def test_a_learned_position_per_key() -> None:
    site = Site(learned_position, [torch.rand(3, 7, 4, dtype=torch.float64)])
    data = data_of(**SIZES)
    found = rewrite(trace_directly(site, data))
    assert is_whole(found)
    compare(site, found.graph, data)


def learned_position(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor, position: Tensor
) -> Tensor:
    q, k, v = heads_first(q, k, v)
    return finish(q @ k.mT + q @ position.mT, v)


# -- before a softcap or a factor ------------------------------------------------------------------


def capped_together(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
    return finish(5 * torch.tanh((q @ k.mT * 0.3 - q2 @ k2.mT / 4) / 5) * 1.5, v)


def factor_on_both(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
    factor = torch.sigmoid(q[..., :1] + shared.unsqueeze(1)[..., :1].mT)
    rows, keys = factor[..., :1], torch.sigmoid(k[..., :1]).mT
    return finish((q @ k.mT + q2 @ k2.mT * 0.5) * rows * keys, v)


@pytest.mark.parametrize("function", [capped_together, factor_on_both])
def test_both_products_come_before_it(function: Function) -> None:
    found = check(function, SIZES)
    assert is_whole(found) and found.result.sites[0].head_dim == 10
    check(function, EQUAL)


def bias_before_a_softcap(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    q, k, v = heads_first(q, k, v)
    return finish(torch.tanh(q @ k.mT + shared[:, None, None, :, 0]), v)


def factor_before_the_second(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
    return finish(torch.tanh(q @ k.mT * torch.sigmoid(q[..., :1]) + q2 @ k2.mT), v)


def mask_before_a_softcap(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
    s = q @ k.mT + q2 @ k2.mT
    return torch.tanh(s.masked_fill(s.isnan(), -math.inf)).softmax(-1) @ v


@pytest.mark.parametrize(
    "function", [bias_before_a_softcap, factor_before_the_second, mask_before_a_softcap]
)
def test_nothing_else_may_come_before_it(function: Function) -> None:
    for sizes in (SIZES, EQUAL):
        found = check(function, sizes)
        assert found.count == 0 and "order-of-operations" in found.left()


# -- what stays a bias -----------------------------------------------------------------------------


def after_a_mask(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor) -> Tensor:
    q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
    first = q @ k.mT
    allowed = torch.ones(first.shape[-2:], dtype=torch.bool).tril()
    return (first.masked_fill(~allowed, -math.inf) + q2 @ k2.mT).softmax(-1) @ v


def after_a_softcap(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
    return finish(torch.tanh(q @ k.mT) + q2 @ k2.mT, v)


def after_a_gate(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor) -> Tensor:
    q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
    gate = torch.sigmoid(shared[:, None, :, :1])
    return finish(q @ k.mT * gate + q2 @ k2.mT, v)


def keys_for_every_query(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    between = shared[:, :, None] - shared[:, None]
    s = torch.einsum("bthd,bshd->bhts", q, k) + torch.einsum("bthr,btsr->bhts", q2, between)
    return finish(s, v.transpose(1, 2))


def without_gradient(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
    return finish(q @ k.mT + (q2 @ k2.mT).detach(), v)


def rounded_before(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
    return finish(q @ k.mT + (q2 @ k2.mT).float(), v)


def of_another_precision(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
    return finish(q @ k.mT + (q2.float() @ k2.float().mT).double(), v)


def of_the_keys_alone(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    norms = torch.einsum("bshd,bshd->bhs", k, k)
    return finish(torch.einsum("bthd,bshd->bhts", q, k) + norms[:, :, None], v.transpose(1, 2))


def repeated_where_it_is_summed(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
    return finish(q @ k.mT + q2[..., :1].expand_as(q2) @ k2.mT, v)


STAYS = [
    after_a_mask, after_a_softcap, after_a_gate, keys_for_every_query, without_gradient,
    rounded_before, of_another_precision, of_the_keys_alone, repeated_where_it_is_summed,
]  # fmt: skip


@pytest.mark.parametrize("function", STAYS)
def test_what_is_no_part_of_the_product_stays(function: Function) -> None:
    for sizes in (SIZES, EQUAL):
        (site,) = check(function, sizes).result.sites
        assert site.bias == "data" and site.head_dim == 4


def test_heads_in_the_place_of_queries() -> None:
    """Where H == T a product may be added the other way round: its keys differ for every query."""

    def crossed(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor) -> Tensor:
        s = torch.einsum("bthd,bshd->bhts", q, k) + torch.einsum("bthd,bshd->bths", q2, k2)
        return finish(s, v.transpose(1, 2))

    (site,) = check(crossed, EQUAL).result.sites
    assert site.bias == "data" and site.head_dim == 4


def test_wider_than_any_kernel() -> None:
    (site,) = check(latent, {**SIZES, "more": 253}).result.sites
    assert site.bias == "data" and site.head_dim == 4
    (site,) = check(latent, {**SIZES, "size": 257}).result.sites
    assert not site.bias and site.head_dim == 263


def operand_written_to(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    base = torch.stack([q2, k2])
    q, k, v, q2, k2 = heads_first(q, k, v, base[0], base[1])
    s = q @ k.mT + q2 @ k2.mT
    k2.mul_(2.0)
    return finish(s, v) + base.sum()


def bias_written_to(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor
) -> Tensor:
    q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
    bias = q2 @ k2.mT
    view = bias.transpose(0, 1)
    view.mul_(2.0)
    return finish(q @ k.mT + bias, v) + view.sum()


@pytest.mark.parametrize("function", [operand_written_to, bias_written_to])
def test_what_is_written_to_in_between(function: Function) -> None:
    """In inference: autograd would not let it."""
    data = data_of(**SIZES)
    with torch.no_grad():
        found = rewrite(trace_training(Site(function), data))
        assert not any(is_whole(found) for _ in found.calls())
        (actual,) = run_like(found.graph, Site(function), data)
        torch.testing.assert_close(actual, function(*data))


def test_without_gradient_in_between() -> None:
    def half(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, shared: Tensor) -> Tensor:
        q, k, v, q2, k2 = heads_first(q, k, v, q2, k2)
        with torch.no_grad():
            bias = q2 @ k2.mT
        return finish(q @ k.mT + bias, v)

    data = data_of(**SIZES)
    found = rewrite(trace_training(Site(half), data))
    assert not is_whole(found)
    compare(Site(half), found.graph, data)
