"""Attention under ``torch.vmap`` in training: found, in both directions, with its line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import Site, compare, rewrite, trace_training
from spellings_base import causal_bool, finish, heads_first, parameter
from torch import Tensor

INF = float("-inf")
Function = Callable[..., Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT * 0.4).masked_fill(~causal_bool(q.size(-2)), INF)
    return s.softmax(-1) @ v


def over_batch_and_heads(qkv: Tensor, weight: Tensor, slopes: Tensor) -> Tensor:
    out = torch.vmap(torch.vmap(attend))(*heads_first(qkv))
    return out.transpose(1, 2).flatten(2)


def over_the_batch(qkv: Tensor, weight: Tensor, slopes: Tensor) -> Tensor:
    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return torch.vmap(whole)(*heads_first(qkv)).transpose(1, 2).flatten(2)


def over_heads_with_weights_of_their_own(qkv: Tensor, weight: Tensor, slopes: Tensor) -> Tensor:
    def head(q: Tensor, k: Tensor, v: Tensor, w: Tensor, slope: Tensor) -> Tensor:
        j = torch.arange(q.size(-2))
        s = F.linear(q, w) @ k.mT + slope * (j - j[:, None])
        return s.masked_fill(j > j[:, None], INF).softmax(-1) @ v

    mapped = torch.vmap(head, in_dims=(2, 2, 2, 0, 0), out_dims=2)
    return mapped(*qkv.unbind(0), weight, slopes).flatten(2)


def a_mask_over_rows_and_columns(qkv: Tensor, weight: Tensor, slopes: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    j = torch.arange(q.size(2))

    def allowed(row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row - column < 3)

    mask = torch.vmap(torch.vmap(allowed, (None, 0)), (0, None))(j, j)
    return finish((q @ k.mT).masked_fill(~mask, INF).softmax(-1), v)


FOUND: dict[Function, str] = {
    over_batch_and_heads: "causal",
    over_the_batch: "causal",
    over_heads_with_weights_of_their_own: "causal",
    a_mask_over_rows_and_columns: "causal, window 3",
}


def example(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return torch.randn(3, batch, length, 4, 6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dynamic", [False, True], ids=["plain", "symbolic"])
@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_found(function: Function, dynamic: bool) -> None:
    module = Site(function, [parameter(4, 6, 6)(), parameter(4)()])
    found = rewrite(trace_training(module, [example(2, 7)], {0: (1, 2)} if dynamic else {}))
    assert found.count == 1 and FOUND[function] in found.result.decisions[0].detail
    place = found.result.sites[0].location
    assert place is not None and place.file.endswith("test_attention_vmap.py")
    for batch, length in ((2, 7), (3, 5)) if dynamic else ((2, 7),):
        compare(module, found.graph, [example(batch, length)])


def without_gradients(qkv: Tensor) -> Tensor:
    def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            w = (q @ k.mT).softmax(-1)
        return w @ v

    return torch.vmap(head)(*heads_first(qkv))


def test_gradients_that_are_switched_off_inside_stay_off() -> None:
    module = Site(without_gradients)
    found = rewrite(trace_training(module, [example(2, 7)]))
    assert found.count == 0
    compare(module, found.graph, [example(2, 7)])


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).softmax(-1), 0.5, training=True) @ v


def masked_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s[..., 0] = 1.0
    return s.softmax(-1) @ v


@pytest.mark.parametrize("head", [dropped, masked_in_place])
def test_what_is_not_run_at_once_is_reported(head: Function) -> None:
    module = Site(lambda x: torch.vmap(head, randomness="different")(*heads_first(x)))
    found = rewrite(trace_training(module, [example(2, 7)]))
    assert found.count == 0 and found.left() == ["unsupported-feature"]
    assert "torch.vmap" in found.result.decisions[0].reason.message  # type: ignore[union-attr]


def test_a_write_in_place_stays_below_the_map() -> None:
    module = Site(lambda x: torch.vmap(masked_in_place)(*heads_first(x)))
    found = rewrite(trace_training(module, [example(2, 7)]))
    assert found.count == 0 and found.left() == ["unsupported-feature"]
    compare(module, found.graph, [example(2, 7)])


def derivative_of_a_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.func.grad(lambda x: attend(x, k, v).sum())(q)


def pulled_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, pull = torch.func.vjp(lambda x: attend(x, k, v), q)
    return out + pull(out)[0]  # type: ignore[no-any-return]


def pushed_forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.func.jvp(lambda x: attend(x, k, v), (q,), (k,))[1]


@pytest.mark.parametrize(
    ("head", "name"),
    [(derivative_of_a_sum, "grad"), (pulled_back, "vjp"), (pushed_forward, "jvp")],
)
def test_what_is_derived_inside_is_reported(head: Callable[..., Tensor], name: str) -> None:
    module = Site(lambda x: head(*heads_first(x)) + attend(*heads_first(x)))
    found = rewrite(trace_training(module, [example(2, 7)]))
    reasons = [d.reason for d in found.result.decisions if d.reason is not None]
    assert found.count == 1 and found.left() == ["unsupported-feature"]
    assert name in reasons[0].message and reasons[0].location is not None
