"""Masks whose exceptions lie far out: a proof at one length must not hide what comes later."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import Site, compare, rewrite, trace_training
from spellings_base import finish, heads_first
from torch import Tensor

# Allowed keys from positions i [T, 1] and j [1, T], and a length at which it is not what it seems.
Rule = Callable[[Tensor, Tensor], Tensor]


def square_root(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) | (torch.sqrt(i.double()) > 9)


def logarithm(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (torch.log(i.double() - j + 1.0).nan_to_num(0.0) <= 4.5)


def logarithm_of_row(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) | (torch.log(i.double() + 1.0) > 4.5)


def power_below_one(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) | (i.double() ** 0.5 > 9)


def bfloat16_positions(i: Tensor, j: Tensor) -> Tensor:
    return j.bfloat16() <= i.bfloat16()


def byte_positions(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (j.to(torch.uint8) <= i.to(torch.uint8))


def small_table_of_blocks(i: Tensor, j: Tensor) -> Tensor:
    open_ = torch.tensor([True, False])
    return (j <= i) & open_[((i - j) // 90).clamp(0, 1)]


def embedded_table_of_blocks(i: Tensor, j: Tensor) -> Tensor:
    open_ = torch.tensor([0.0, 1.0])
    blocked = torch.nn.functional.embedding(((i - j) // 90).clamp(0, 1), open_[:, None])[..., 0]
    return (j <= i) & (blocked == 0)


def reciprocal(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) | (1.0 / (i.double() + 1.0) < 0.01)


def counted_blocks(i: Tensor, j: Tensor) -> Tensor:
    starts = ((i & 7) == 0).cumsum(0) - ((j & 7) == 0).cumsum(1)
    return (j <= i) & (starts < 20)


def square(i: Tensor) -> Tensor:
    return torch.ones(i.size(0) + 60, i.size(0) + 60, dtype=torch.bool)


def triangle_moved_along(i: Tensor, j: Tensor) -> Tensor:
    """A window of forty: what is cut off in front says where it begins."""
    length = i.size(0)
    return (j <= i) & ~square(i).tril()[:length, 40 : 40 + length]


def identity_moved_along(i: Tensor, j: Tensor) -> Tensor:
    length = i.size(0)
    return (j <= i) & ~torch.eye(length + 60, dtype=torch.bool)[:length, 40 : length + 40]


def one_row_of_a_triangle(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (square(i).tril()[40][: i.size(0)] | (i == j))


def row_that_is_written(i: Tensor, j: Tensor) -> Tensor:
    mask = square(i).tril()
    mask[42] = True
    return mask[: i.size(0), : i.size(0)]


def parts_put_end_to_end(i: Tensor, j: Tensor) -> Tensor:
    late = torch.cat([torch.zeros(40), torch.ones(i.size(0))])[: i.size(0)] > 0
    return (j <= i) & (~late | (i == j))


def last_keys_hidden_by_parts_that_grow(i: Tensor, j: Tensor) -> Tensor:
    last = torch.cat([torch.zeros(i.size(0) - 3), torch.ones(3)]) > 0
    return (j <= i) & (~last | (j >= 20) | (i == j))


CASES = [
    (last_keys_hidden_by_parts_that_grow, 50),
    (triangle_moved_along, 50), (identity_moved_along, 50), (one_row_of_a_triangle, 50),
    (row_that_is_written, 50), (parts_put_end_to_end, 50),
    (square_root, 90), (logarithm, 110), (logarithm_of_row, 100), (power_below_one, 90),
    (bfloat16_positions, 270), (byte_positions, 270), (small_table_of_blocks, 110),
    (embedded_table_of_blocks, 110), (reciprocal, 110),
    (counted_blocks, 190),
]  # fmt: skip


def masked(qkv: Tensor, rule: Rule) -> Tensor:
    q, k, v = heads_first(qkv)
    t = torch.arange(q.size(2))
    s = (q @ k.mT).masked_fill(~rule(t[:, None], t[None, :]), float("-inf"))
    return finish(s.softmax(-1), v)


def example(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(3, batch, length, 4, 6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("rule", "length"), CASES, ids=[r.__name__ for r, _ in CASES])
def test_far_exceptions(rule: Rule, length: int) -> None:
    module = Site(lambda x: masked(x, rule))
    found = rewrite(trace_training(module, [example(2, 9)], {0: (1, 2)}))
    for size in (9, length):
        compare(module, found.graph, [example(1, size)])


def test_a_mask_that_varies_along_the_batch() -> None:
    def late_entries(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        t, b = torch.arange(q.size(2)), torch.arange(q.size(0))
        allowed = (t[None, :] <= t[:, None]) | (b[:, None, None, None] >= 4)
        return finish((q @ k.mT).masked_fill(~allowed, float("-inf")).softmax(-1), v)

    module = Site(late_entries)
    found = rewrite(trace_training(module, [example(2, 9)], {0: (1, 2)}))
    for batch in (2, 6):
        compare(module, found.graph, [example(batch, 9)])


def test_an_identity_over_the_batch() -> None:
    def late_entries(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        open_ = torch.eye(q.size(0), 5)[:, 4, None, None, None] > 0
        allowed = torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril() | open_
        return finish((q @ k.mT).masked_fill(~allowed, float("-inf")).softmax(-1), v)

    module = Site(late_entries)
    found = rewrite(trace_training(module, [example(2, 9)], {0: (1, 2)}))
    for batch in (2, 6):
        compare(module, found.graph, [example(batch, 9)])


def late_bias(kind: str, distance: Tensor) -> Tensor:
    if kind == "steps":
        return distance // 90 * -3.0
    if kind == "remainder":
        return (distance // 90 % 2) * -3.0
    if kind == "truncated":
        return (distance * 0.0101).long() * -3.0
    if kind == "rounded division":
        return torch.div(distance, 90, rounding_mode="floor") * -3.0
    if kind == "table":
        return torch.tensor([0.0, -3.0, -5.0])[(distance // 90).abs() % 3]
    return -torch.exp(distance.double() * 10 - 1500)  # 0 at first, by underflow


@pytest.mark.parametrize(
    "kind", ["steps", "remainder", "truncated", "rounded division", "table", "exponential"]
)
def test_biases_that_begin_far_out(kind: str) -> None:
    def function(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        i = torch.arange(q.size(2))
        distance = (i[:, None] - i[None, :]).clamp(min=0)
        s = q @ k.mT + late_bias(kind, distance)
        return finish(s.masked_fill(i[None, :] > i[:, None], float("-inf")).softmax(-1), v)

    module = Site(function)
    found = rewrite(trace_training(module, [example(2, 9)], {0: (1, 2)}))
    for length in (9, 190):
        compare(module, found.graph, [example(1, length)])


def test_a_stored_mask_per_head_is_looked_at_whole() -> None:
    """The number of heads is no bound on the length."""
    buffer = torch.ones(1, 4, 40, 40, dtype=torch.bool).tril()
    buffer[:, :, 30, 2] = False

    def function(qkv: Tensor, mask: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        t = q.size(2)
        return finish((q @ k.mT).masked_fill(~mask[:, :, :t, :t], float("-inf")).softmax(-1), v)

    module = Site(function, (), [buffer])
    found = rewrite(trace_training(module, [example(2, 9)], {0: (1, 2)}))
    for length in (9, 40):
        compare(module, found.graph, [example(1, length)])


def test_a_stored_mask_that_is_wider_than_high() -> None:
    buffer = torch.ones(16, 64, dtype=torch.bool)
    buffer[5, 40] = False

    def function(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        s = (x @ y.mT).masked_fill(~mask[: x.size(1), : y.size(1)], float("-inf"))
        return s.softmax(-1) @ y

    module = Site(function, (), [buffer])
    x, y = example(2, 9)[0].flatten(2), example(2, 11)[0].flatten(2)
    found = rewrite(trace_training(module, [x, y], {0: (1,), 1: (1,)}))
    compare(module, found.graph, [x, y])
    compare(module, found.graph, [x, example(2, 50)[0].flatten(2)])


@pytest.mark.parametrize("width", [1, 2, 31, 300])
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_windows_are_not_off_by_one(width: int, off: int) -> None:
    """Two ways to say one window, of which one may be off by one: the smaller counts."""

    def function(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        t = q.size(2)
        i = torch.arange(t)
        near = i[:, None] - i[None, :] < width + max(off, 0)
        allowed = torch.ones(t, t, dtype=torch.bool).tril().triu(1 - width + min(off, 0)) & near
        return finish((q @ k.mT).masked_fill(~allowed, float("-inf")).softmax(-1), v)

    module = Site(function)
    found = rewrite(trace_training(module, [example(2, 9)], {0: (1, 2)}))
    (site,) = found.result.sites
    assert site.params.causal and site.params.window_left == width - 1 and not site.bias
    compare(module, found.graph, [example(1, width + 3)])


def test_causal_up_to_sixteen_and_not_beyond() -> None:
    def function(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        t = q.size(2)
        allowed = torch.ones(t, t, dtype=torch.bool).tril()
        allowed = allowed | torch.ones(t, t, dtype=torch.bool) & (torch.arange(t)[:, None] >= 16)
        return finish((q @ k.mT).masked_fill(~allowed, float("-inf")).softmax(-1), v)

    module = Site(function)
    found = rewrite(trace_training(module, [example(2, 9)], {0: (1, 2)}))
    assert all(site.bias == "constant" for site in found.result.sites)
    compare(module, found.graph, [example(1, 40)])


@pytest.mark.parametrize("width", [4999, 5000, 5001])
def test_a_far_window_is_no_causal_mask(width: int) -> None:
    """Traced at length 9; the window begins to matter at 5000."""

    def function(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        i = torch.arange(q.size(2))
        distance = i[:, None] - i[None, :]
        allowed = (distance >= 0) & (distance < width)
        return finish((q @ k.mT).masked_fill(~allowed, float("-inf")).softmax(-1), v)

    found = rewrite(trace_training(Site(function), [example(2, 9)], {0: (1, 2)}))
    (site,) = found.result.sites
    assert site.params.causal and site.params.window_left == width - 1 and not site.bias


def test_an_edge_too_far_to_look_at_is_not_claimed() -> None:
    def function(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        i = torch.arange(q.size(2))
        allowed = (i[:, None] >= i[None, :]) & (i[:, None] + i[None, :] < 200_000)
        return finish((q @ k.mT).masked_fill(~allowed, float("-inf")).softmax(-1), v)

    module = Site(function)
    found = rewrite(trace_training(module, [example(2, 9)], {0: (1, 2)}))
    (site,) = found.result.sites
    assert site.bias == "constant" and site.mask == "full"
    assert "too large" in str([d.reason for d in found.result.decisions if d.reason])
    compare(module, found.graph, [example(1, 30)])


Padded = Callable[[Tensor], Tensor]


def one_more_key(causal: Tensor) -> Tensor:
    return F.pad(causal, (1, 0), value=True)


def fifty_more_keys_cut_off(causal: Tensor) -> Tensor:
    """All keys for up to 50 tokens, a band beyond."""
    return F.pad(causal, (50, 0), value=True)[:, : causal.size(0)]


def fifty_more_rows_cut_off(causal: Tensor) -> Tensor:
    return F.pad(causal, (0, 0, 50, 0), value=True)[: causal.size(0)]


def none_at_the_end(causal: Tensor) -> Tensor:
    """The last column is another one for every length."""
    return F.pad(causal, (1, 1), value=True)[:, 1:]


def hidden_at_the_end_if_near(causal: Tensor) -> Tensor:
    """Keys in the last three places are hidden, of the first twenty: at a length below that."""
    last = F.pad(torch.zeros_like(causal[0, 3:]), (0, 3), value=True)
    return causal & ~(last & (torch.arange(causal.size(1)) < 20))


def reflected(causal: Tensor) -> Tensor:
    return F.pad(causal.double()[None], (1, 0), mode="reflect")[0] > 0.5


@pytest.mark.parametrize(
    ("pad", "more", "mask"),
    [
        (one_more_key, 1, "causal from the end"),
        (fifty_more_keys_cut_off, 0, "window from None to 50"),
        (fifty_more_rows_cut_off, 0, "full"),
        (none_at_the_end, 1, "full"),
        (hidden_at_the_end_if_near, 0, "full"),
        (reflected, 1, "full"),
    ],
)
def test_a_mask_that_is_padded(pad: Padded, more: int, mask: str) -> None:
    def padded(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        k, v = (torch.cat([x[:, :, :1]] * more + [x], 2) for x in (k, v))
        allowed = pad(torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril())
        return finish((q @ k.mT).masked_fill(~allowed, float("-inf")).softmax(-1), v)

    module = Site(padded)
    found = rewrite(trace_training(module, [example(2, 9)], {0: (1, 2)}))
    assert [s.mask for s in found.result.sites] == [mask]
    for length in (9, 4, 70):
        compare(module, found.graph, [example(1, length)])
