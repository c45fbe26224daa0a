"""Masks with a finite number, where scores come near it; and scores that are rounded on the way.

And scores that are NaN or infinite, where ``nan_to_num`` would replace them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from attention_graphs import Rewritten, Site, compare, trace_directly, trace_training
from spellings_base import causal_bool, finish, heads_first
from torch import Tensor

from fxport.passes.attention.rewrite import rewrite_attention

HARD = -(2.0**24)


def example(scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(3, 2, 9, 4, 6, generator=generator, dtype=torch.float64) * scale


def added(s: Tensor, low: float) -> Tensor:
    return s + torch.zeros(s.shape[-2:], dtype=s.dtype).masked_fill(~causal_bool(s.size(-1)), low)


def filled(s: Tensor, low: float) -> Tensor:
    return s.masked_fill(~causal_bool(s.size(-1)), low)


def chosen(s: Tensor, low: float) -> Tensor:
    return torch.where(causal_bool(s.size(-1)), s, torch.full_like(s[..., :1, :1], low))


def replaced(s: Tensor, low: float) -> Tensor:
    """As in the first GPT."""
    b = causal_bool(s.size(-1)).to(s.dtype)
    return s * b + low * (1 - b)


def floored(s: Tensor, low: float) -> Tensor:
    return s.masked_fill(~causal_bool(s.size(-1)), float("-inf")).clamp(min=low)


def attention(masked: Callable[[Tensor, float], Tensor], low: float) -> Site:
    def function(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        return finish(masked(q @ k.mT, low).softmax(-1), v)

    return Site(function)


def rewritten(module: Site, data: Tensor, check: bool = True) -> Rewritten:
    graph = trace_directly(module, [data])
    result = rewrite_attention(graph, check_scores=check)
    graph.graph.lint()
    graph.recompile()
    return Rewritten(graph, result)


def detail(found: Rewritten) -> str:
    return found.result.decisions[0].detail


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("low", [-1e4, -1e6])
def test_a_finite_number_that_is_added_stays_a_bias(low: float, scale: float) -> None:
    """At scale 100 the scores differ by 1e5: masked keys have all the weight of some rows."""
    module, data = attention(added, low), example(scale)
    found = rewritten(module, data)
    assert found.count == 1 and "dense constant bias" in detail(found)
    compare(module, found.graph, [data])
    reason = found.result.decisions[1].reason
    assert reason is not None and f"it adds {low:g}" in reason.message


def test_what_is_added_may_be_assumed_to_forbid_and_that_is_said() -> None:
    module, data = attention(added, -1e4), example()
    graph = trace_directly(module, [data])
    result = rewrite_attention(graph, assume_spread=True)
    graph.recompile()
    (decision,) = result.decisions
    assert decision.detail.startswith("fxport::attention causal")
    assert "scores of a row assumed to differ by less than 9900" in decision.detail
    compare(module, graph, [data])


def ragged(s: Tensor, low: float) -> Tensor:
    """A small bias beside it."""
    return added(s, low) + torch.linspace(-1, 1, s.size(-1), dtype=s.dtype)


def anti(s: Tensor, low: float) -> Tensor:
    """The first row has no key but those that are lowered."""
    return s + torch.zeros(s.shape[-2:], dtype=s.dtype).masked_fill(causal_bool(s.size(-1)), low)


@pytest.mark.parametrize("masked", [ragged, anti])
def test_nothing_is_assumed_of_other_biases(masked: Callable[[Tensor, float], Tensor]) -> None:
    module, data = attention(masked, -1e4), example()
    graph = trace_directly(module, [data])
    result = rewrite_attention(graph, assume_spread=True)
    graph.recompile()
    assert "assumed" not in detail(Rewritten(graph, result))
    compare(module, graph, [data])


@pytest.mark.parametrize("masked", [added, filled, chosen, replaced, floored])
@pytest.mark.parametrize("low", [HARD, -1e9, torch.finfo(torch.float32).min])
def test_a_number_beyond_fractions_is_a_flag(
    masked: Callable[[Tensor, float], Tensor], low: float
) -> None:
    module, data = attention(masked, low), example(100.0)
    found = rewritten(module, data)
    assert detail(found).startswith("fxport::attention causal")
    assert "dense" not in detail(found) and "scores" not in detail(found)
    compare(module, found.graph, [data])


FILLS = [filled, chosen, replaced, floored]


@pytest.mark.parametrize("masked", FILLS)
def test_a_fill_that_scores_may_reach_is_checked(
    masked: Callable[[Tensor, float], Tensor],
) -> None:
    module, data = attention(masked, -1e4), example()
    found = rewritten(module, data)
    assert "causal" in detail(found) and "scores checked to be above -9900" in detail(found)
    compare(module, found.graph, [data])
    with pytest.raises(RuntimeError, match=r"scores below -9900 .*; mask with minus infinity"):
        found.graph(example(300.0))


def test_the_check_names_the_mask() -> None:
    graph = trace_training(attention(filled, -1e4), [example()])
    rewrite_attention(graph, check_scores=True)
    (check,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_async.msg)
    line = inspect.getsourcelines(filled)[1] + 1
    assert f"test_low_masks.py:{line})" in str(check.args[1])


def test_nan_is_no_low_score() -> None:
    module, data = attention(filled, -1e4), example()
    found = rewritten(module, data)
    data[0, 0, 3] = torch.nan
    torch.testing.assert_close(found.graph(data), module(data), equal_nan=True)


def test_without_a_check_it_is_said() -> None:
    found = rewritten(attention(filled, -1e4), example(), check=False)
    assert "scores assumed to be above -9900" in detail(found)
    assert not [n for n in found.graph.graph.nodes if "assert" in str(n.target)]


def replacing(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish(filled(torch.nan_to_num(q @ k.mT), float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_would_be_replaced_are_noticed(number: float) -> None:
    found = rewritten(Site(replacing), example())
    assert "scores checked to be finite" in detail(found)
    compare(Site(replacing), found.graph, [example()])
    data = example()
    data[1, 0, 0, 0, 0] = number
    data[0, 0, 0] = 1.0  # all that the first query sees is that number
    with pytest.raises(RuntimeError, match=r"scores are NaN or infinite.*; drop nan_to_num"):
        found.graph(data)


def test_a_mask_of_the_data_beside_scores_that_would_be_replaced() -> None:
    """Rows that it empties are NaN, and are told from replaced ones by nothing."""

    def function(qkv: Tensor, pad: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        s = torch.nan_to_num(q @ k.mT).masked_fill(pad[:, None, None, :], float("-inf"))
        return finish(s.softmax(-1), v)

    data = [example(), torch.arange(18).view(2, 9) < 9]
    graph = trace_directly(Site(function), data)
    result = rewrite_attention(graph, check_scores=True)
    assert [d.reason.code.value for d in result.decisions if d.reason] == ["fully-masked-row"]


def test_a_bias_from_the_data_after_such_a_fill() -> None:
    def function(qkv: Tensor, bias: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        return finish((filled(q @ k.mT, -1e4) + bias).softmax(-1), v)

    module, data = Site(function), [example(), torch.full((9,), 3.0, dtype=torch.float64)]
    graph = trace_directly(module, data)
    found = Rewritten(graph, rewrite_attention(graph, check_scores=True))
    assert found.left() == ["order-of-operations"]


def test_half_precision_ends_earlier() -> None:
    """float16 has no lower number than -65504: there it forbids, in float32 scores it does not."""
    low = torch.finfo(torch.float16).min
    data = example()
    for dtype, words in ((torch.float16, "causal"), (torch.float32, "dense constant bias")):
        found = rewritten(attention(added, low), data.to(dtype))
        assert words in detail(found)
        assert ("dense" in detail(found)) == ("dense" in words)


@pytest.mark.parametrize(
    "rounded",
    [
        lambda s: s.softmax(-1, dtype=torch.float32).to(s.dtype),
        lambda s: s.float().softmax(-1).type_as(s),
        lambda s: s.softmax(-1).float().to(s.dtype),
    ],
)
def test_rounding_that_the_result_shows(rounded: Callable[[Tensor], Tensor]) -> None:
    def function(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        return finish(rounded(q @ k.mT), v)

    wide = rewritten(Site(function), example())
    assert wide.count == 0 and wide.left() == ["unsupported-feature"]
    compare(Site(function), wide.graph, [example()])
    assert rewritten(Site(function), example().float()).count == 1
