"""ALiBi tables: linear, linear but rounded to half precision, and almost linear."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_graphs import Site, compare, rewrite, trace_directly, trace_training
from torch import Tensor

from fxport.passes.masks.slopes import same_slopes, slopes_of

HEADS, LENGTH = 5, 61
SLOPES = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / 3)
HALF = [torch.bfloat16, torch.float16]


def table(dtype: torch.dtype, length: int = LENGTH, slopes: Tensor = SLOPES) -> Tensor:
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    return (slopes[:, None, None] * distance).to(dtype).double()[None]


def seen(length: int = LENGTH) -> Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril()


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def test_float32_tables_are_linear_up_to_a_constant_per_row():
    raw = table(torch.float32) + torch.linspace(-3, 3, LENGTH).double()[:, None]
    found = slopes_of(raw, seen(), 0.0)
    assert found is not None
    torch.testing.assert_close(found, SLOPES.double(), rtol=1e-4, atol=1e-6)
    raw[0, 2, 40, 7] += 0.01
    assert slopes_of(raw, seen(), 0.0) is None


@pytest.mark.parametrize("dtype", HALF)
def test_rounded_tables_are_linear_within_their_rounding(dtype):
    raw = table(dtype)
    assert slopes_of(raw, seen(), 0.0) is None
    found = slopes_of(raw, seen(), roundoff(dtype))
    assert found is not None
    # The slope itself is known to half a unit in its last place.
    torch.testing.assert_close(found, SLOPES.double(), rtol=roundoff(dtype), atol=0)
    error = (table(torch.float64, slopes=found) - raw).abs()
    assert bool((error <= 1.01 * roundoff(dtype) * raw.abs()).all())
    assert same_slopes(found, table(dtype, 23), seen(23), roundoff(dtype))
    assert not same_slopes(found * 1.01, table(dtype), seen(), roundoff(dtype))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("place", [(0, 60, 0), (3, 17, 16), (4, 9, 9)])
def test_one_entry_off_is_not_linear(dtype, place):
    raw = table(dtype)
    head, row, column = place
    raw[0, head, row, column] += max(3 * roundoff(dtype) * float(raw[0][place].abs()), 1e-3)
    assert slopes_of(raw, seen(), roundoff(dtype)) is None


@pytest.mark.parametrize("rounding", [0.0, roundoff(torch.bfloat16)])
def test_one_row_for_all_is_linear_up_to_a_constant_per_row(rounding: float):
    """BLOOM's bias: ``slope * j`` for every row, broadcast against the causal mask."""
    row = (SLOPES[:, None, None] * torch.arange(LENGTH)).double()[None]
    found = slopes_of(row, seen(), rounding)
    assert found is not None
    torch.testing.assert_close(found, SLOPES.double(), rtol=1e-5, atol=0)
    for other in (row.expand(3, -1, -1, -1), torch.cat([row, row])):
        assert slopes_of(other, seen(), rounding) is not None
    assert slopes_of(torch.cat([row, 2 * row]), seen(), rounding) is None


def test_forbidden_entries_do_not_count():
    raw = table(torch.bfloat16)
    raw[0, :, 5, 9:] = 77.0
    assert slopes_of(raw, seen(), roundoff(torch.bfloat16)) is not None


@pytest.mark.parametrize("dtype", HALF)
def test_logarithmic_and_clamped_distances_are_not_linear(dtype):
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]
    for values in (-(distance.clamp(min=0) + 1.0).log(), -distance.clamp(0, 30).double()):
        raw = (SLOPES[:, None, None] * values).to(dtype).double()[None]
        assert slopes_of(raw, seen(), roundoff(dtype)) is None


@pytest.mark.parametrize("rounded_sum", [True, False])
def test_a_rounded_table_counts_only_where_the_scores_are_as_coarse(rounded_sum: bool):
    """Added to float32 scores, its rounding is the largest there is: it stays a dense bias."""
    bias = table(torch.bfloat16).masked_fill(~seen(), float("-inf")).to(torch.bfloat16)

    def attend(x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, HEADS, 8)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * 8**-0.5
        if not rounded_sum:
            scores = scores.float()
        weights = (scores + bias).softmax(-1).to(v.dtype)
        return (weights @ v).transpose(1, 2).flatten(2)

    torch.manual_seed(2)
    site = Site(attend, buffers=[bias])
    x = torch.randn(3, LENGTH, 3 * HEADS * 8).bfloat16()
    found = rewrite(trace_training(site, [x], {}))
    assert found.count == 1
    (attention,) = found.result.sites
    assert bool(attention.alibi) == rounded_sum
    compare(site, found.graph, [x], 0.02)


def test_a_proof_holds_for_scores_of_one_dtype() -> None:
    """A line that bfloat16 rounds is one to scores that are rounded as well, and to no others."""
    rounded = table(torch.float64, 29).to(torch.bfloat16)[0]
    blocked = ~seen(29)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias).masked_fill(blocked, float("-inf")).softmax(-1) @ v

    def function(x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = x.unbind(0)
        coarse = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias)
        return coarse.float() * 1e-6 + attend(q, k, v, bias)

    data = torch.randn(3, 2, HEADS, 29, 8, generator=torch.Generator().manual_seed(3))
    module = Site(function, buffers=[rounded])
    rewritten = rewrite(trace_training(module, [data]))
    assert [site.alibi for site in rewritten.result.sites] == [True, False]
    compare(module, rewritten.graph, [data], 1e-5)


def test_slopes_are_held_in_the_precision_of_each_attention() -> None:
    """Equal ones are stored once; those of another precision are no such."""

    def attend(x: Tensor) -> Tensor:
        i = torch.arange(x.size(2), dtype=x.dtype)
        slopes = torch.tensor([0.5, 0.25], dtype=x.dtype)
        s = x @ x.mT + slopes[:, None, None] * (i - i[:, None])
        return s.masked_fill(i > i[:, None], float("-inf")).softmax(-1) @ x

    def function(x: Tensor) -> Tensor:
        return attend(attend(x)) + attend(x.float()).double()

    data = [torch.randn(2, 2, 7, 4, dtype=torch.float64)]
    found = rewrite(trace_training(Site(function), data))
    held = [call.args[5].meta["val"].dtype for call in found.calls()]
    assert sorted(map(str, held)) == ["torch.float32", "torch.float64", "torch.float64"]
    assert len([n for n, _ in found.graph.named_buffers() if "alibi" in n]) == 2
    compare(Site(function), found.graph, data, tolerance=1e-5)


def reciprocals(length: int) -> Tensor:
    return 1.0 / torch.pow(2, torch.arange(1, HEADS + 1) * (8 / HEADS))


def from_the_last(length: int) -> Tensor:
    return torch.logspace(-8, -1, HEADS, base=2.0).flip(0)


def of_the_length(length: int) -> Tensor:
    """As many at every length, but others."""
    return (torch.arange(length)[-1:] % 7 + 1.0).expand(HEADS).reciprocal()


@pytest.mark.parametrize(
    ("slopes", "alibi"), [(reciprocals, True), (from_the_last, True), (of_the_length, False)]
)
def test_slopes_are_constants_whatever_they_are_computed_by(
    slopes: Callable[[int], Tensor], alibi: bool
) -> None:
    def function(x: Tensor) -> Tensor:
        q, k, v = x.unbind(0)
        i = torch.arange(q.size(-2), dtype=x.dtype)
        bias = slopes(q.size(-2)).to(x.dtype)[:, None, None] * (i - i[:, None])
        return (q @ k.mT + bias).masked_fill(i > i[:, None], float("-inf")).softmax(-1) @ v

    def data(length: int) -> list[Tensor]:
        return [torch.randn(3, 2, HEADS, length, 8, dtype=torch.float64)]

    site = Site(function)
    found = rewrite(trace_directly(site, data(12), {0: (1, 3)}))
    assert [s.alibi for s in found.result.sites] in ([alibi], [])
    assert found.count == 1 or not alibi
    for length in (5, 12, 61):
        compare(site, found.graph, data(length))
