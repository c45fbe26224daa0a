"""What exponentials give whose row has no key; a buffer as a scale; attentions out of sight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_graphs import Site, compare, rewrite, trace_directly, trace_training
from spellings_base import causal_bool, finish, heads_first
from test_attention_corners import example, left_padding
from torch import Tensor

INF = float("-inf")


def divided(e: Tensor) -> Tensor:
    return e / e.sum(-1, keepdim=True)


EXPONENTIALS: dict[str, tuple[Callable[[Tensor], Tensor], bool, bool]] = {
    # what is made of scores, whether it is found where they are -1e9 and where they are -inf
    "row": (lambda s: divided(torch.exp(s - s.amax(-1, keepdim=True))), True, True),
    "row, other base": (
        lambda s: divided(torch.exp2((s - s.amax(-1, keepdim=True)) * 1.4427)), True, True
    ),
    "none": (lambda s: divided(torch.exp(s)), False, True),
    "all": (lambda s: divided(torch.exp(s - s.max())), False, False),
    "logarithm": (lambda s: torch.exp(s - torch.logsumexp(s, -1, keepdim=True)), False, True),
}  # fmt: skip


@pytest.mark.parametrize("added", [False, True], ids=["filled", "added"])
@pytest.mark.parametrize("low", [-1e9, INF], ids=str)
@pytest.mark.parametrize("name", EXPONENTIALS)
def test_what_an_empty_row_gives_depends_on_what_is_subtracted(
    name: str, low: float, added: bool
) -> None:
    """exp(-1e9) is 0, and 0 / 0 is NaN where a softmax has the mean. Ours had that too."""
    weights, *found = EXPONENTIALS[name]

    def function(x: Tensor, pad: Tensor) -> Tensor:
        q, k, v = heads_first(x)
        blocked = ~(causal_bool(x.size(2)) & (pad[:, None, None, :] > 0))
        s = q @ k.mT
        if added:
            s = s + torch.zeros_like(s).masked_fill(blocked, low)
        else:
            s = s.masked_fill(blocked, low)
        return finish(weights(s), v)

    module, data = Site(function), [example(3, 6), left_padding(3, 6)]
    rewritten = rewrite(trace_directly(module, data))
    expected = found[low == INF and not added]
    assert rewritten.count == expected, rewritten.result.decisions
    assert expected or rewritten.left() == ["fully-masked-row"]
    compare(module, rewritten.graph, data, 1e-6, nan_spreads=True)


@pytest.mark.parametrize("added", [False, True], ids=["filled", "added"])
def test_a_buffer_that_scales_masked_scores_may_change(added: bool) -> None:
    """Only a fill is known to be as good after it; what is added would hold the old number."""

    def function(x: Tensor, scale: Tensor) -> Tensor:
        q, k, v = x.transpose(2, 3).unbind(0)
        s = (q @ k.mT).masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), INF)
        s = s + torch.arange(7.0, dtype=s.dtype).sin() if added else s
        return (s / scale).softmax(-1) @ v

    module = Site(function, buffers=[torch.tensor(2.0, dtype=torch.float64)])
    data = torch.randn(3, 2, 7, 4, 6, dtype=torch.float64)
    rewritten = rewrite(trace_directly(module, [data]))
    assert rewritten.count == (not added), rewritten.result.decisions
    module.b0.mul_(3)
    compare(module, rewritten.graph, [data])


def test_a_buffer_that_turns_masks_over_is_left() -> None:
    def function(x: Tensor, scale: Tensor) -> Tensor:
        q, k, v = x.transpose(2, 3).unbind(0)
        s = (q @ k.mT).masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -1e9)
        return (s * scale).softmax(-1) @ v

    module = Site(function, buffers=[torch.tensor(-0.5, dtype=torch.float64)])
    data = torch.randn(3, 2, 7, 4, 6, dtype=torch.float64)
    rewritten = rewrite(trace_directly(module, [data]))
    assert rewritten.count == 0 and rewritten.left() == ["order-of-operations"]
    compare(module, rewritten.graph, [data])


def test_attention_under_vmap_that_may_be_random_is_reported() -> None:
    """It stays as it is, and so do those beside it that are found."""

    def single(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v

    def function(x: Tensor) -> Tensor:
        q, k, v = heads_first(x)
        return torch.vmap(single, randomness="same")(q, k, single(q, k, v))

    module = Site(function)
    rewritten = rewrite(trace_training(module, [example(2, 7)]))
    assert rewritten.count == 1
    (reason,) = [d.reason for d in rewritten.result.decisions if d.reason is not None]
    assert "inside torch.vmap" in reason.message and reason.location is not None
    compare(module, rewritten.graph, [example(2, 7)])


SINKS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    # what masked scores are, and the sinks of four heads
    "no sink at all": (INF, lambda x: x.new_full((4,), INF)),
    "none for one head": (INF, lambda x: torch.arange(4.0, dtype=x.dtype).log()),
    "a number like masked scores": (-1e9, lambda x: x.new_full((1,), -1e9)),
    "numbers like masked scores": (-1e9, lambda x: torch.arange(4.0, dtype=x.dtype) - 1e9),
}


@pytest.mark.parametrize("name", SINKS)
def test_a_sink_as_low_as_masked_scores_is_left(name: str) -> None:
    """In rows without a key it is no longer all there is: NaN, or a part of the mean."""
    fill, sinks = SINKS[name]

    def function(x: Tensor, pad: Tensor) -> Tensor:
        q, k, v = heads_first(x)
        s = (q @ k.mT).masked_fill(pad[:, None, None, :] == 0, fill)
        column = sinks(x).view(1, -1, 1, 1).expand(*s.shape[:3], 1)
        return finish(torch.cat([s, column], -1).softmax(-1)[..., :-1], v)

    module, data = Site(function), [example(3, 6), torch.arange(3)[:, None].expand(3, 6)]
    rewritten = rewrite(trace_directly(module, data))
    assert rewritten.count == 0 and rewritten.left() == ["unsupported-feature"]


@pytest.mark.parametrize("low", [-1e9, INF], ids=str)
def test_a_learned_choice_of_keys_may_leave_a_row_without_any(low: float) -> None:
    def function(x: Tensor, wanted: Tensor) -> Tensor:
        q, k, v = heads_first(x)
        return finish((q @ k.mT).masked_fill(wanted < 0, low).softmax(-1), v)

    wanted = torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6)
    module, data = Site(function, [wanted]), [example(3, 6)]
    rewritten = rewrite(trace_directly(module, data))
    assert rewritten.count == 1, rewritten.result.decisions
    compare(module, rewritten.graph, data, nan_spreads=True)


def test_constant_sinks_may_be_made_in_the_shape_of_the_scores() -> None:
    """Their values then cannot be told at no length at all. The pass ended with an error."""

    def function(x: Tensor) -> Tensor:
        q, k, v = heads_first(x)
        column = torch.zeros_like(q[..., :1]) + torch.arange(4.0, dtype=x.dtype).view(1, -1, 1, 1)
        return finish(torch.cat([q @ k.mT, column], -1).softmax(-1)[..., :-1], v)

    rewritten = rewrite(trace_directly(Site(function), [example(3, 6)], {0: (1, 2)}))
    assert rewritten.count == 0 and rewritten.left() == ["unsupported-feature"]
