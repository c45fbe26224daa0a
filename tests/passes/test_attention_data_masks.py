"""Masks that come with the data: padding, documents, biases; rows without any key included."""

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
    softmax_count,
    trace_directly,
    trace_training,
)
from spellings_base import causal_bool, finish, heads_first
from torch import Tensor

INF = float("-inf")


def fill_infinite(qkv: Tensor, keep: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.mT).masked_fill(~keep[:, None, None, :], INF)
    return finish(s.softmax(-1), v)


def fill_finite(qkv: Tensor, keep: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.mT).masked_fill(keep[:, None, None, :] == 0, -1e9)
    return finish(s.softmax(-1), v)


def causal_and_padding_infinite(qkv: Tensor, keep: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.mT * 0.3).masked_fill(~causal_bool(q.size(2)), INF)
    return finish(s.masked_fill(~keep[:, None, None, :], INF).softmax(-1), v)


def causal_and_padding_finite(qkv: Tensor, keep: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.mT * 0.3).masked_fill(~causal_bool(q.size(2)), -1e9)
    return finish(s.masked_fill(~keep[:, None, None, :], -1e9).softmax(-1), v)


def causal_infinite_padding_finite(qkv: Tensor, keep: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.mT * 0.3).masked_fill(~keep[:, None, None, :], -1e9)
    return finish(s.masked_fill(~causal_bool(q.size(2)), INF).softmax(-1), v)


def joint_mask_where(qkv: Tensor, keep: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    mask = causal_bool(q.size(2)) & keep[:, None, None, :]
    return finish(torch.where(mask, q @ k.mT, torch.finfo(q.dtype).min).softmax(-1), v)


def folded_heads(qkv: Tensor, keep: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
    mask = keep[:, None, None, :].expand(b, h, t, t).reshape(b * h, t, t)
    s = torch.bmm(q, k.mT).masked_fill(~mask, INF)
    return torch.bmm(s.softmax(-1), v).view(b, h, t, d)


def documents(qkv: Tensor, keep: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    document = keep.cumsum(-1)
    same = document[:, None, :, None] == document[:, None, None, :]
    return finish((q @ k.mT).masked_fill(~(same & causal_bool(q.size(2))), INF).softmax(-1), v)


def grouped(qkv: Tensor, keep: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    q = q.unflatten(1, (2, 2))
    s = torch.einsum("bkgtd,bksd->bkgts", q, k[:, :2])
    s = s.masked_fill(~keep[:, None, None, None, :], -1e4)
    return torch.einsum("bkgts,bksd->bkgtd", s.softmax(-1), v[:, :2])


def sdpa(qkv: Tensor, keep: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])


def masked_twice(qkv: Tensor, keep: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    mask = ~keep[:, None, None, :]
    w = (q @ k.mT).masked_fill(mask, INF).softmax(-1).masked_fill(mask, 0.0)
    return finish(w, v)


def nan_to_number(qkv: Tensor, keep: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.mT).masked_fill(~causal_bool(q.size(2)), INF)
    w = s.masked_fill(~keep[:, None, None, :], INF).softmax(-1)
    return finish(torch.nan_to_num(w), v)


CASES = [
    fill_infinite, fill_finite, causal_and_padding_infinite, causal_and_padding_finite,
    causal_infinite_padding_finite, joint_mask_where, folded_heads, documents, grouped, sdpa,
    nan_to_number,
]  # fmt: skip


def example(batch: int = 3, length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return torch.randn(3, batch, length, 4, 6, generator=generator, dtype=torch.float64)


def keep_mask(batch: int, length: int, empty: bool) -> Tensor:
    keep = torch.ones(batch, length, dtype=torch.bool)
    keep[0, length - 2 :] = False  # padding on the right
    keep[1, 1] = False
    if empty:
        keep[2, :] = False  # nothing to see for any query
        keep[1, :3] = False  # nothing to see for the first queries, if causal
    return keep


def rewritten(function: Callable[..., Tensor], *data: Tensor, symbolic: bool = False) -> Rewritten:
    dynamic = {0: (1, 2), 1: (0, 1)} if symbolic else {}
    found = rewrite(trace_training(Site(function), data, dynamic))
    assert found.count == 1 and softmax_count(found.graph) == 0, found.result.decisions
    return found


@pytest.mark.parametrize("empty", [False, True], ids=["some-key", "empty-rows"])
@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_padding(function: Callable[..., Tensor], empty: bool) -> None:
    found = rewritten(function, example(), keep_mask(3, 7, False), symbolic=True)
    assert found.result.sites[0].bias == "data"
    for batch, length in ((3, 7), (4, 5)):
        data = (example(batch, length), keep_mask(batch, length, empty))
        compare(Site(function), found.graph, data)


def test_masked_again_after_the_softmax() -> None:
    data = (example(), keep_mask(3, 7, False))
    compare(Site(masked_twice), rewritten(masked_twice, *data).graph, data)


def _relative(
    qkv: Tensor, keep: Tensor, table: Tensor, fill: float, beside: Tensor | None = None
) -> Tensor:
    """Conformers: q.k and q.(distance), masked, and the weights masked again."""
    q, k, v = heads_first(qkv)
    mask = ~keep[:, None, None, :]
    s = (q @ k.mT + q @ table.mT) / math.sqrt(6)
    s = s if beside is None else s + beside
    return finish(s.masked_fill(mask, fill).softmax(-1).masked_fill(mask, 0.0), v)


@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float64).min], ids=str)
def test_relative_positions_masked_again(fill: float) -> None:
    def site(qkv: Tensor, keep: Tensor, table: Tensor) -> Tensor:
        return _relative(qkv, keep, table, fill)

    table = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    data = (example(), keep_mask(3, 7, False))
    module = Site(site, [table])
    found = rewrite(trace_training(module, data))
    assert found.count == 1 and softmax_count(found.graph) == 0, found.result.decisions
    for empty in (False, True):
        compare(module, found.graph, (example(), keep_mask(3, 7, empty)))


def test_masked_again_beside_a_bias_that_may_empty_rows() -> None:
    """Such a row is NaN in the original, where the mask alone would make it zeros."""

    def site(qkv: Tensor, keep: Tensor, beside: Tensor, table: Tensor) -> Tensor:
        return _relative(qkv, keep, table, INF, beside)

    table = torch.randn(7, 6, dtype=torch.float64)
    data = (example(), keep_mask(3, 7, False), torch.zeros(7, 7, dtype=torch.float64))
    found = rewrite(trace_training(Site(site, [table]), data))
    assert found.count == 0 and softmax_count(found.graph) == 1


def test_additive_float_mask_is_kept() -> None:
    def additive(qkv: Tensor, mask: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        s = q @ k.mT / math.sqrt(6) + mask[:, None, None, :]
        return finish((s + torch.full((7, 7), INF, dtype=s.dtype).triu(1)).softmax(-1), v)

    mask = torch.randn(3, 7, dtype=torch.float64)
    found = rewritten(additive, example(), mask)
    assert found.result.sites[0].mask == "causal"
    compare(Site(additive), found.graph, (example(), mask))


def test_dropout_keeps_its_distribution() -> None:
    def dropped(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        s = (q @ k.mT).masked_fill(~causal_bool(q.size(2)), INF)
        return finish(F.dropout(s.softmax(-1), 0.25, True), v)

    data = example()
    found = rewritten(dropped, data)
    (call,) = found.calls()
    assert found.result.sites[0].params.dropout_p == 0.25 and call.args[7] is not None
    torch.manual_seed(0)
    runs = torch.stack([found.graph(data)[0] for _ in range(600)])
    kept = Site(lambda x: finish(
        (heads_first(x)[0] @ heads_first(x)[1].mT)
        .masked_fill(~causal_bool(7), INF).softmax(-1), heads_first(x)[2]
    ))(data)  # fmt: skip
    assert runs.std(0).amax() > 0.1
    error = (runs.mean(0) - kept).abs() / (runs.std(0) / math.sqrt(600) + 1e-9)
    assert float(error.amax()) < 6.0


def test_dropout_of_scores_is_left() -> None:
    def dropped(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        return finish(F.dropout(q @ k.mT, 0.25, True).softmax(-1), v)

    found = rewrite(trace_directly(Site(dropped), [example()]))
    assert found.left() == ["unsupported-feature"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_softmax_between_narrow_products(dtype: torch.dtype) -> None:
    def narrow(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        s = torch.matmul(q, k.mT) * 0.4
        s = s + torch.full((7, 7), torch.finfo(s.dtype).min, dtype=s.dtype).triu(1)
        w = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)
        return finish(w, v)

    def upcast(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        wide = torch.promote_types(q.dtype, torch.float32)
        s = (q.to(wide) @ k.to(wide).mT).masked_fill(~causal_bool(7), INF)
        return finish(s.softmax(-1).type_as(v), v)

    for function in (narrow, upcast):
        data = example().to(dtype)
        found = rewritten(function, data)
        (call,) = found.calls()
        assert call.args[0].meta["val"].dtype == dtype  # type: ignore[union-attr]
        out, exact = found.graph(data)[0], function(data.double().to(dtype).double())
        assert out.dtype == dtype
        bound = 4 * torch.finfo(dtype).eps * float(exact.abs().amax())
        assert float((out.double() - exact).abs().amax()) <= bound


# -- relative positions by a product of their own, under a padding mask ----------------------------


def relative(qkv: Tensor, keep: Tensor, table: Tensor) -> Tensor:
    """The added scores are no mask: made of weights and data, like q.k."""
    q, k, v = heads_first(qkv)
    t = q.size(2)
    index = (torch.arange(t)[:, None] - torch.arange(t)[None, :]).clamp(-3, 3) + 3
    rel = torch.gather(q @ table.mT, -1, index.expand(q.size(0), q.size(1), -1, -1))
    s = q @ k.mT + rel / torch.sqrt(torch.tensor(6.0, dtype=q.dtype))
    return finish(s.masked_fill(~keep[:, None, None, :], -1e9).softmax(-1), v)


def masked_by_a_product(qkv: Tensor, keep: Tensor, table: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    seen = keep.to(q.dtype) * table[0, 0]
    s = q @ k.mT + (seen[:, None, :, None] @ seen[:, None, None, :] - 1.0) * 1e9
    return finish(s.masked_fill(~keep[:, None, None, :], -1e9).softmax(-1), v)


@pytest.mark.parametrize("empty", [False, True])
def test_a_learned_product_is_no_mask(empty: bool) -> None:
    module = Site(relative, [torch.randn(7, 6, dtype=torch.float64)])
    data = [example(), keep_mask(3, 7, empty)]
    found = rewrite(trace_directly(module, data, {0: (1, 2), 1: (0, 1)}))
    assert found.count == 1, found.result.decisions
    compare(module, found.graph, data)


def masked_by_a_plain_product(qkv: Tensor, keep: Tensor, table: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    hidden = (1.0 - keep.to(q.dtype)) * table[0, 0]
    s = q @ k.mT + hidden[:, None, :, None] @ hidden[:, None, None, :] * -1e9
    return finish(s.masked_fill(~keep[:, None, :, None], -1e9).softmax(-1), v)


@pytest.mark.parametrize("function", [masked_by_a_product, masked_by_a_plain_product])
def test_a_product_that_is_one_is_left(function: Callable[..., Tensor]) -> None:
    """Nor is it taken for the product of queries and keys, to which the other one is added."""
    module = Site(function, [torch.ones(1, 1, dtype=torch.float64)])
    data = [example(), keep_mask(3, 7, empty=True)]
    found = rewrite(trace_directly(module, data))
    assert found.left() == ["fully-masked-row"]
    compare(module, found.graph, data)


def test_keys_written_piece_by_piece() -> None:
    """Multi-head latent attention as in transformers."""

    def function(qkv: Tensor, keep: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        keys = k.new_empty(k.shape)
        keys[..., :4].copy_(k[..., :4])
        keys[..., 4:].copy_(k[:, :1, :, 4:].expand(-1, k.size(1), -1, -1))
        return finish((q @ keys.mT).masked_fill(~keep[:, None, None, :], INF).softmax(-1), v)

    module, data = Site(function), [example(), keep_mask(3, 7, empty=False)]
    found = rewrite(trace_training(module, data))
    assert found.count == 1, found.result.decisions
    compare(module, found.graph, data)


# -- a bias that is known to stay above the number that is filled in -------------------------------


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)


def counted(qkv: Tensor, keep: Tensor, slopes: Tensor) -> Tensor:
    """BLOOM: the keys that are seen are numbered, and the number is a bias."""
    q, k, v = heads_first(qkv)
    place = ((keep.cumsum(-1) - 1) * keep)[:, None, :]
    s = q @ k.mT * 0.4 + (slopes[:, None] * place)[:, :, None]
    hidden = ~(causal_bool(q.size(2)) & keep[:, None, None].bool())
    return finish(s.masked_fill(hidden, torch.finfo(s.dtype).min).softmax(-1), v)


def counted_bools(qkv: Tensor, keep: Tensor, slopes: Tensor) -> Tensor:
    return counted(qkv, keep.bool().to(qkv.dtype), slopes)


def counted_from_nothing(qkv: Tensor, keep: Tensor, slopes: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    place = keep.bool().to(q.dtype).neg().sub(1.0)[:, None, :] * slopes[:, None]
    s = q @ k.mT + place[:, :, None]
    return finish(s.masked_fill(keep[:, None, None] == 0, -1e9).softmax(-1), v)


@pytest.mark.parametrize("function", [counted, counted_bools, counted_from_nothing])
def test_a_bias_that_stays_above(function: Callable[..., Tensor]) -> None:
    module = Site(function, (), [SLOPES])
    data = [example(), keep_mask(3, 7, True).long()]
    if function is counted_bools:
        data[1] = data[1].bool()
    found = rewrite(trace_directly(module, data, {0: (1, 2), 1: (0, 1)}))
    assert found.count == 1, found.result.decisions
    assert found.result.sites[0].relied_on == ("b0",)
    compare(module, found.graph, data)


def lowered_by_integers(qkv: Tensor, keep: Tensor, slopes: Tensor) -> Tensor:
    """Integers may be as low as the fill."""
    q, k, v = heads_first(qkv)
    s = q @ k.mT + (keep * 10**9)[:, None, None]
    return finish(s.masked_fill(~causal_bool(q.size(2)), -1e9).softmax(-1), v)


def lowered_by_a_logarithm(qkv: Tensor, keep: Tensor, slopes: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.mT + keep.to(q.dtype).log()[:, None, None]
    return finish(s.masked_fill(~causal_bool(q.size(2)), torch.finfo(q.dtype).min).softmax(-1), v)


def lowered_by_a_difference(qkv: Tensor, keep: Tensor, slopes: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    hidden = keep.bool().logical_not().to(q.dtype)
    s = q @ k.mT + (torch.zeros(7, dtype=q.dtype) - hidden * 2e9)[:, None, None]
    return finish(s.masked_fill(~causal_bool(q.size(2)), -1e9).softmax(-1), v)


def lowered_by_what_is_taken_away(qkv: Tensor, keep: Tensor, slopes: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    hidden = keep.bool().logical_not().to(q.dtype)
    s = q @ k.mT - (hidden * 2e9)[:, None, None]
    return finish(s.masked_fill(~causal_bool(q.size(2)), -1e9).softmax(-1), v)


def lowered_by_an_overflow(qkv: Tensor, keep: Tensor, slopes: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    hidden = keep.bool().logical_not().half() * 4e4 * -4  # -inf
    s = q @ k.mT + hidden.to(q.dtype)[:, None, None]
    return finish(s.masked_fill(~causal_bool(q.size(2)), torch.finfo(q.dtype).min).softmax(-1), v)


@pytest.mark.parametrize(
    "function",
    [
        lowered_by_integers, lowered_by_a_logarithm, lowered_by_a_difference,
        lowered_by_what_is_taken_away, lowered_by_an_overflow,
    ],
)  # fmt: skip
def test_a_bias_that_may_not(function: Callable[..., Tensor]) -> None:
    module = Site(function, (), [SLOPES])
    data = [example(), keep_mask(3, 7, True).long() - int(function is lowered_by_integers)]
    found = rewrite(trace_directly(module, data))
    assert found.left() == ["fully-masked-row"]
    compare(module, found.graph, data)
