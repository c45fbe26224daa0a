"""Masks that are written piece by piece: what they hold, for fixed and for varying lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_graphs import Rewritten, Site, compare, rewrite, trace_training
from torch import Tensor

INF = float("-inf")
FIXED: dict[int, tuple[int, ...]] = {}
VARYING: dict[int, tuple[int, ...]] = {0: (1, 3)}


def attend(x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = x.unbind(0)
    scores = q @ k.mT
    scores = scores.masked_fill(mask, INF) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


def rows(x: Tensor) -> Tensor:
    mask = torch.zeros(x.size(3), x.size(3), dtype=x.dtype)
    for i in range(x.size(3)):
        mask[i, i + 1 :] = INF
    return attend(x, mask)


def windows(x: Tensor) -> Tensor:
    mask = torch.ones(x.size(3), x.size(3), dtype=torch.bool)
    for i in range(x.size(3)):
        mask[i, max(0, i - 2) : i + 1] = False
    return attend(x, mask)


def prefix(x: Tensor) -> Tensor:
    mask = torch.ones(x.size(3), x.size(3), dtype=torch.bool).triu(1)
    mask[:, :2] = False
    return attend(x, mask)


def prefix_twice(x: Tensor) -> Tensor:
    mask = torch.full((x.size(3), x.size(3)), INF, dtype=x.dtype).triu(1)
    mask[:2, :3] = 0.0
    mask[2] = 0.0
    return attend(x, mask)


def written_again(x: Tensor) -> Tensor:
    mask = torch.ones(x.size(3), x.size(3), dtype=torch.bool).triu(1)
    mask[1] = True
    mask[1, :2] = False
    return attend(x, mask)


def copied_row(x: Tensor) -> Tensor:
    mask = torch.ones(x.size(3), x.size(3), dtype=torch.bool).triu(1)
    mask[0] = mask[1]
    return attend(x, mask)


def row_by_another(x: Tensor) -> Tensor:
    row = torch.zeros(x.size(3), dtype=x.dtype)
    row[1:] = INF
    mask = torch.full((x.size(3), x.size(3)), INF, dtype=x.dtype).triu(2)
    mask[0] = row
    mask[1, 2:] = INF
    return attend(x, mask)


def from_the_data(x: Tensor) -> Tensor:
    mask = torch.zeros(x.size(3), x.size(3), dtype=x.dtype)
    mask[0] = x[0, 0, 0, :, 0]
    return attend(x, mask)


def row_read_later(x: Tensor) -> Tensor:
    mask = torch.zeros(x.size(3), x.size(3), dtype=x.dtype)
    first = mask[0]
    first[1:] = INF
    mask[1, 2:] = INF
    return attend(x, mask) + first[0]


def read_in_between(x: Tensor) -> Tensor:
    mask = torch.zeros(x.size(3), x.size(3), dtype=x.dtype)
    mask[0, 1:] = INF
    before = mask.exp()
    mask[1, 2:] = INF
    return attend(x, mask) + before.sum()


def row_by_one_read_in_between(x: Tensor) -> Tensor:
    row = torch.zeros(x.size(3), dtype=x.dtype)
    row[2:] = INF
    before = row.exp()
    row[1:] = INF
    mask = torch.full((x.size(3), x.size(3)), INF, dtype=x.dtype).triu(2)
    mask[0] = row
    return attend(x, mask) + before.sum()


def drawn(x: Tensor) -> Tensor:
    mask = torch.randint(0, 1, (x.size(3), x.size(3)), dtype=x.dtype)
    mask[0, 1:] = INF
    return attend(x, mask)


def traced(
    function: Callable[..., Any], dynamic: dict[int, tuple[int, ...]], length: int
) -> tuple[Site, list[Tensor], Rewritten]:
    torch.manual_seed(length)
    site, data = Site(function), [torch.randn(3, 2, 4, length, 4, dtype=torch.float64)]
    return site, data, rewrite(trace_training(site, data, dynamic))


@pytest.mark.parametrize(
    "function,mask",
    [
        (rows, "causal"),
        (windows, "causal, window 3"),
        (prefix, "full"),
        (prefix_twice, "full"),
        (written_again, "causal"),
        (copied_row, "full"),
        (row_by_another, "full"),
    ],
)
@pytest.mark.parametrize("length", [7, 4])
def test_of_a_known_length(function: Callable[..., Any], mask: str, length: int) -> None:
    site, data, found = traced(function, FIXED, length)
    assert [s.mask for s in found.result.sites] == [mask]
    compare(site, found.graph, data)
    torch.manual_seed(1)
    compare(site, found.graph, [torch.randn(3, 2, 4, length, 4, dtype=torch.float64)])


@pytest.mark.parametrize("function", [prefix, prefix_twice, written_again])
def test_of_any_length(function: Callable[..., Any]) -> None:
    site, _, found = traced(function, VARYING, 7)
    assert found.count == 1
    for length in (7, 4, 12):
        compare(site, found.graph, [torch.randn(3, 3, 4, length, 4, dtype=torch.float64)])


def first_keys_open(x: Tensor) -> Tensor:
    mask = torch.ones(x.size(3), x.size(3), dtype=torch.bool).triu(2)
    mask[0, 1] = False
    mask[1:, :2] = False
    return attend(x, mask)


def logarithm_of_a_band(x: Tensor) -> Tensor:
    mask = torch.ones(x.size(3), x.size(3), dtype=x.dtype)
    return attend(x, mask.triu(-2).tril().log())


def root_of_what_is_written(x: Tensor) -> Tensor:
    mask = torch.zeros(x.size(3), x.size(3), dtype=x.dtype)
    mask[:] = 1.0
    return attend(x, mask.tril().sqrt().sub(1).mul(1e9))


@pytest.mark.parametrize(
    "function,mask",
    [
        (first_keys_open, "window from None to 1"),
        (logarithm_of_a_band, "causal, window 3"),
        (root_of_what_is_written, "causal"),
    ],
)
def test_proven_for_any_length(function: Callable[..., Any], mask: str) -> None:
    site, _, found = traced(function, VARYING, 7)
    assert [s.mask for s in found.result.sites] == [mask]
    for length in (7, 4, 50):
        compare(site, found.graph, [torch.randn(3, 1, 1, length, 4, dtype=torch.float64)])


def open_from_far_on(x: Tensor) -> Tensor:
    """At forty tokens and more it is another mask."""
    mask = torch.ones(x.size(3) + 60, x.size(3) + 60, dtype=torch.bool).triu(1)
    mask[40:, :60] = False
    return attend(x, mask[: x.size(3), : x.size(3)])


def third_last_row_open_if_near(x: Tensor) -> Tensor:
    later = torch.ones(x.size(3), x.size(3), dtype=torch.bool).triu(1)
    mask = torch.select_scatter(later, torch.zeros_like(later[0]), 0, -3)
    return attend(x, mask | (later & (torch.arange(x.size(3)) > 30)))


def open_from_far_on_in_a_table(x: Tensor) -> Tensor:
    """The table has a fixed size, and is looked at whole."""
    mask = torch.ones(64, 64, dtype=torch.bool).triu(1)
    mask[60:, :] = False
    return attend(x, mask[: x.size(3), : x.size(3)])


def open_from_far_on_by_a_row(x: Tensor) -> Tensor:
    row = torch.zeros(64)
    row[60:] = 1
    return attend(x, torch.ones(x.size(3), x.size(3)).triu(1) > row[: x.size(3), None])


@pytest.mark.parametrize(
    "function",
    [
        open_from_far_on,
        open_from_far_on_in_a_table,
        open_from_far_on_by_a_row,
        third_last_row_open_if_near,
    ],
)
def test_writes_that_show_at_other_lengths(function: Callable[..., Any]) -> None:
    site, _, found = traced(function, VARYING, 7)
    assert [s.mask for s in found.result.sites] in ([], ["full"])
    for length in (7, 4, 50, 62):
        compare(site, found.graph, [torch.randn(3, 1, 1, length, 4, dtype=torch.float64)])


@pytest.mark.parametrize("dynamic", [FIXED, VARYING])
@pytest.mark.parametrize(
    "function", [from_the_data, row_read_later, read_in_between, row_by_one_read_in_between, drawn]
)
def test_what_is_left_as_it_is(
    function: Callable[..., Any], dynamic: dict[int, tuple[int, ...]]
) -> None:
    site, data, found = traced(function, dynamic, 7)
    assert found.left() == ["changed-in-place"]
    compare(site, found.graph, data)


def test_two_masks_of_other_types_are_two() -> None:
    def both(x: Tensor) -> Tensor:
        one = torch.ones(5, 5, dtype=x.dtype)
        other = torch.ones(5, 5, dtype=torch.bool)
        for mask in (one, other):
            for i in range(5):
                mask[i] = 0
        return attend(attend(x, other).expand(3, -1, -1, -1, -1), one)

    site, data, found = traced(both, FIXED, 5)
    assert found.count == 2
    assert {b.dtype for b in found.graph.buffers()} == {torch.float64, torch.bool}
    compare(site, found.graph, data)


def test_the_row_by_row_mask_compiles() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return rows(x)

    x = torch.randn(3, 1, 2, 6, 8)
    torch._dynamo.reset()
    compiled = torch.compile(Model(), backend="vllm_generic", options={"strict": True})
    torch.testing.assert_close(compiled(x), rows(x))
