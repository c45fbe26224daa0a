"""Constants that a checkpointed block is given are made, and proven, inside of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_graphs import Site, compare, trace_training
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fxport.passes.constant_operands import make_constants_inside
from fxport.passes.pipeline import PipelineResult, training_pipeline

INF = float("-inf")


def attend(x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = x.unbind(0)
    s = q @ k.mT
    s = s.masked_fill(~mask, INF) if mask.dtype == torch.bool else s + mask
    return s.softmax(-1) @ v


def again(x: Tensor, mask: Tensor) -> Tensor:
    return checkpoint(attend, x, mask, use_reentrant=False)  # type: ignore[no-any-return]


def causal(x: Tensor) -> Tensor:
    return torch.ones(x.size(3), x.size(3), dtype=torch.bool).tril()


def one_mask_for_two_layers(x: Tensor) -> Tensor:
    mask = causal(x)
    y = again(x, mask)
    return again(torch.stack([y, y.sin(), x[2]]), mask)


def bias_of_positions(x: Tensor) -> Tensor:
    place = torch.arange(x.size(3), dtype=x.dtype)
    return again(x, -(place - place[:, None]).clamp(min=0) * 1e30)


def within_another(x: Tensor) -> Tensor:
    mask = causal(x)
    return checkpoint(lambda y: again(y, mask), x * 2, use_reentrant=False)  # type: ignore[no-any-return]


def given(length: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(3, batch, 4, length, 6, generator=generator, dtype=torch.float64)]


def passed(function: Callable[..., Tensor], *more: Tensor) -> PipelineResult:
    module = Site(function, (), more)
    graph = trace_training(module, given(7), {0: (1, 3)})
    result = training_pipeline(graph)
    graph.recompile()
    for length in (7, 4, 11):
        compare(module, graph, given(length))
    return result


@pytest.mark.parametrize(
    ("function", "count"),
    [(one_mask_for_two_layers, 2), (bias_of_positions, 1), (within_another, 1)],
)
def test_a_constant_mask_is_proven(function: Callable[..., Tensor], count: int) -> None:
    sites = passed(function).sites
    assert [(s.mask, s.bias) for s in sites] == [("causal", "")] * count


def mask_of_the_data(x: Tensor) -> Tensor:
    return again(x, (x[0, 0, 0, :, 0] > -9.0) & causal(x))


def mask_of_a_buffer(x: Tensor, mask: Tensor) -> Tensor:
    return again(x, mask[: x.size(3), : x.size(3)])


def mask_that_is_drawn(x: Tensor) -> Tensor:
    return again(x, (torch.rand(x.size(3), x.size(3)) >= 0) & causal(x))


def mask_that_is_written_to(x: Tensor) -> Tensor:
    mask = causal(x)
    mask[1, 0] = False
    return again(x, mask)


@pytest.mark.parametrize(
    "function", [mask_of_the_data, mask_that_is_drawn, mask_that_is_written_to]
)
def test_what_is_no_constant_is_given_as_before(function: Callable[..., Tensor]) -> None:
    (site,) = passed(function).sites
    assert site.bias == "data"


def two_layers_of_one_buffer(x: Tensor, mask: Tensor) -> Tensor:
    mask = mask[: x.size(3), : x.size(3)]
    y = again(x, mask)
    return again(torch.stack([y, y.sin(), x[2]]), mask)


def masks_of_one_buffer(x: Tensor, mask: Tensor) -> Tensor:
    """Each body is given another mask."""
    length = x.size(3)
    y = again(x, mask[:length, :length])
    return again(torch.stack([y, y.sin(), x[2]]), mask[:length, :length].mT)


def test_a_part_of_a_buffer_is_proven() -> None:
    buffer = torch.ones(16, 16, dtype=torch.bool).tril()
    sites = passed(two_layers_of_one_buffer, buffer).sites
    assert [(s.mask, s.bias, s.relied_on) for s in sites] == [("causal", "", ("b0",))] * 2
    first, second = passed(masks_of_one_buffer, buffer).sites
    assert (first.mask, second.mask) == ("causal", "window from 0 to None")


def test_a_buffer_that_is_no_mask_of_ours_is_a_dense_bias_with_a_note() -> None:
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    mask[12, 3] = False
    result = passed(mask_of_a_buffer, mask)
    assert [s.bias for s in result.sites] == ["constant"]
    assert [d.subject for d in result.decisions if d.reason is not None] == ["mask"]


def test_a_buffer_that_is_written_to_is_given_as_before() -> None:
    def written(x: Tensor, mask: Tensor) -> Tensor:
        mask[1, 0] = x.size(3) > 0
        return again(x, mask[: x.size(3), : x.size(3)])

    (site,) = passed(written, torch.ones(16, 16, dtype=torch.bool).tril()).sites
    assert site.bias == "data"


def test_a_body_that_two_calls_run_is_left() -> None:
    """Each may be given another constant."""
    module = Site(one_mask_for_two_layers)
    graph = trace_training(module, given(7))
    calls = [n for n in graph.graph.nodes if "checkpoint" in str(n.target)]
    bodies = [next(a for a in n.args if isinstance(a, torch.fx.Node)) for n in calls]
    assert len(bodies) == 2 and bodies[0] is not bodies[1]
    calls[1].replace_input_with(bodies[1], bodies[0])
    body = getattr(graph, str(bodies[0].target))
    before = str(body.graph)
    make_constants_inside(graph)
    assert str(body.graph) == before


def test_a_buffer_enters_once() -> None:
    def two_parts_of_one(x: Tensor, mask: Tensor) -> Tensor:
        length = x.size(3)
        first, second = mask[:length, :length], mask[None, :length, :length]

        def both(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return attend(y, a & b)

        return checkpoint(both, x, first, second, use_reentrant=False)  # type: ignore[no-any-return]

    module = Site(two_parts_of_one, (), [torch.ones(16, 16, dtype=torch.bool).tril()])
    graph = trace_training(module, given(7))
    (call,) = (n for n in graph.graph.nodes if "checkpoint" in str(n.target))
    before = call.args
    make_constants_inside(graph)
    assert call.args[: len(before)] == before and len(call.args) == len(before) + 1
