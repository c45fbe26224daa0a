"""Reads of a cache become the values that were just written; any other read stays a read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxport.capture import caches
from fxport.capture.caches import read_what_was_written

aten = torch.ops.aten
Function = Callable[[Tensor, Tensor], Tensor]


def traced(function: Function, cache: Tensor, x: Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake", pre_dispatch=True)(cache.clone(), x)


def front(cache: Tensor, x: Tensor) -> Tensor:
    cache[: x.shape[0], : x.shape[1]] = x.sin()
    return cache[: x.shape[0], : x.shape[1]].transpose(0, 1) * 2


def by_layer(cache: Tensor, x: Tensor) -> Tensor:
    cache[1, : x.shape[1]] = x[0].sin()
    return cache[1, : x.shape[1]] * 2


def view_from_before(cache: Tensor, x: Tensor) -> Tensor:
    keys = cache[: x.shape[0], 2 : 2 + x.shape[1]]
    keys.copy_(x.cos())
    return keys.exp()


def narrower(cache: Tensor, x: Tensor) -> Tensor:
    """The cache keeps less precision than what is written."""
    cache[: x.shape[0], : x.shape[1]] = x.double().sin() * (1 + 2**-40)
    return cache[: x.shape[0], : x.shape[1]] * 2


def keys_and_values(cache: Tensor, x: Tensor) -> Tensor:
    """Both in one buffer, and more is written behind them later."""
    n = x.shape[1]
    cache[0, :n] = x[0].sin()
    cache[1, :n] = x[1].cos()
    keys, values = cache[0, :n].transpose(0, 1), cache[1, :n]
    scores = keys @ values
    cache[2, :n] = x[2]
    cache[:2, n:] = 3.0
    return scores + keys @ cache[2, :n]


def stacked(cache: Tensor, x: Tensor) -> Tensor:
    cache[:2, : x.shape[1]] = torch.stack([x[0].sin(), x[1].cos()])
    keys, values = cache[:2, : x.shape[1]]
    return keys.transpose(0, 1) @ values


def unpacked(cache: Tensor, x: Tensor) -> Tensor:
    first, second, *_ = cache
    first[: x.shape[1]] = x[0].sin()
    second[: x.shape[1]] = x[1].cos()
    keys, values, *_ = cache[:, : x.shape[1]].unbind(0)
    return keys.transpose(0, 1) @ values


@pytest.mark.parametrize(
    "function",
    [front, by_layer, view_from_before, narrower, keys_and_values, stacked, unpacked],
)
@pytest.mark.parametrize("rows", [3, 5])  # 5: every size of x is the cache's
def test_the_cache_is_not_read(function: Function, rows: int) -> None:
    cache, x = torch.randn(5, 11, 5), torch.randn(rows, 7, 5)
    gm = traced(function, cache, x)
    assert aten.copy_.default in [n.target for n in gm.graph.nodes]
    assert read_what_was_written(gm) == (gm.graph.find_nodes(op="placeholder")[0].name,)
    assert aten.copy_.default not in [n.target for n in gm.graph.nodes]
    assert not gm.graph.find_nodes(op="placeholder")[0].users
    torch.testing.assert_close(
        gm(torch.full_like(cache, float("nan")), x), function(cache, x), rtol=0, atol=0
    )


def one_more(cache: Tensor, x: Tensor) -> Tensor:
    cache[: x.shape[0], : x.shape[1]] = x
    return cache[: x.shape[0], : x.shape[1] + 1] * 2


def other_place(cache: Tensor, x: Tensor) -> Tensor:
    cache[: x.shape[0], : x.shape[1]] = x
    return cache[: x.shape[0], 1 : 1 + x.shape[1]] * 2


def other_layer(cache: Tensor, x: Tensor) -> Tensor:
    cache[1, : x.shape[1]] = x[0]
    return cache[2, : x.shape[1]] * 2


def read_first(cache: Tensor, x: Tensor) -> Tensor:
    y = cache[: x.shape[0], : x.shape[1]] * 2
    cache[: x.shape[0], : x.shape[1]] = x
    return y


def written_over(cache: Tensor, x: Tensor) -> Tensor:
    cache[: x.shape[0], : x.shape[1]] = x
    cache[0] = 3.0
    return cache[: x.shape[0], : x.shape[1]] * 2


def both_written_over(cache: Tensor, x: Tensor) -> Tensor:
    """The second write meets the first in one entry."""
    cache[0, : x.shape[1]] = x[0]
    cache[:2, x.shape[1] - 1 :] = 3.0
    return cache[0, : x.shape[1]] * 2


def other_row(cache: Tensor, x: Tensor) -> Tensor:
    first, second, *_ = cache
    first[: x.shape[1]] = x[0]
    return second[: x.shape[1]] * 2


def value_changes(cache: Tensor, x: Tensor) -> Tensor:
    y = x.sin()
    cache[: x.shape[0], : x.shape[1]] = y
    y.mul_(3.0)
    return cache[: x.shape[0], : x.shape[1]] * y


def shifted_within(cache: Tensor, x: Tensor) -> Tensor:
    cache[: x.shape[0], 1 : 1 + x.shape[1]] = cache[: x.shape[0], : x.shape[1]].clone() * 2
    part = cache[: x.shape[0], : x.shape[1]]
    cache[: x.shape[0], 2 : 2 + x.shape[1]].copy_(part)
    return cache[: x.shape[0], 2 : 2 + x.shape[1]] + 1


def seen_later(cache: Tensor, x: Tensor) -> Tensor:
    """A view of what is read, and the cache changes before the view is used."""
    cache[: x.shape[0], : x.shape[1]] = x
    turned = cache[: x.shape[0], : x.shape[1]].transpose(0, 1)
    cache.mul_(2.0)
    return turned + 1


def added(cache: Tensor, x: Tensor) -> Tensor:
    cache[: x.shape[0], : x.shape[1]] += x
    return cache[: x.shape[0], : x.shape[1]] * 2


STAYS = [
    one_more, other_place, other_layer, read_first, written_over, value_changes, shifted_within,
    seen_later, added, both_written_over, other_row,
]  # fmt: skip


@pytest.mark.parametrize("function", STAYS)
def test_what_is_not_certain_is_read(function: Function) -> None:
    cache, x = torch.randn(5, 11, 5), torch.randn(3, 7, 5)
    gm = traced(function, cache, x)
    read_what_was_written(gm)
    assert gm.graph.find_nodes(op="placeholder")[0].users or function is value_changes
    torch.testing.assert_close(
        gm(cache.clone(), x), function(cache.clone(), x), rtol=0, atol=0, equal_nan=True
    )


def part(cache: Tensor, x: Tensor) -> Tensor:
    cache[:, 2:9] = x.sin()
    return cache[:, 3:6].transpose(0, 1) * 2


def part_of_a_layer(cache: Tensor, x: Tensor) -> Tensor:
    cache[1, :7] = x[0].sin()
    return cache[1, 4:7].detach() * 2


def part_narrower(cache: Tensor, x: Tensor) -> Tensor:
    cache[:, 2:9] = x.double().sin() * (1 + 2**-40)
    return cache[:, 3:6] * 2


def reaches_beyond(cache: Tensor, x: Tensor) -> Tensor:
    cache[:, 2:9] = x.sin()
    return cache[:, 3:10] * 2


def begins_before(cache: Tensor, x: Tensor) -> Tensor:
    cache[:, 2:9] = x.sin()
    return cache[:, 1:6] * 2


@pytest.mark.parametrize("function", [part, part_of_a_layer, part_narrower])
def test_a_part_of_what_was_written_is_that_part(function: Function) -> None:
    cache, x = torch.randn(5, 11, 5), torch.randn(5, 7, 5)
    gm = traced(function, cache, x)
    assert read_what_was_written(gm)
    empty = torch.full_like(cache, float("nan"))
    torch.testing.assert_close(gm(empty, x), function(cache, x), rtol=0, atol=0)


@pytest.mark.parametrize("function", [reaches_beyond, begins_before])
def test_more_than_what_was_written_is_read(function: Function) -> None:
    cache, x = torch.randn(5, 11, 5), torch.randn(5, 7, 5)
    gm = traced(function, cache, x)
    assert read_what_was_written(gm) == ()
    torch.testing.assert_close(gm(cache.clone(), x), function(cache, x), rtol=0, atol=0)


def test_a_mask_written_row_by_row_takes_time_in_its_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every write was held against every other."""

    def forward(x: Tensor) -> Tensor:
        mask = torch.full((40, 40), float("-inf"))
        for row in range(40):
            mask[row, max(0, row - 7) : row + 1] = 0.0
        return x + mask

    compared: list[fx.Node] = []
    is_elsewhere = caches._is_elsewhere

    def counted(write: fx.Node, read: caches._Part) -> bool:
        compared.append(write)
        return is_elsewhere(write, read)

    monkeypatch.setattr(caches, "_is_elsewhere", counted)
    x = torch.randn(40, 40)
    gm = make_fx(forward, tracing_mode="fake", pre_dispatch=True)(x)
    read_what_was_written(gm)
    assert len(compared) <= 2 * 40
    assert torch.equal(gm(x), forward(x))
