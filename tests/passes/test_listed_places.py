"""A number written at listed places: the fill it is, for attention and in the graphs of `port`."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from attention_graphs import Site, compare, rewrite, trace_directly, trace_training
from torch import Tensor, nn

import fxport
from fxport.capture.listed_places import fill_listed_places

aten = torch.ops.aten
INF = float("-inf")
LIMIT = 61


def attend(x: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    q, k, v = x.unbind(0)
    scores = q @ k.mT
    change(scores)
    return scores.softmax(-1) @ v


def above(scores: Tensor) -> None:
    rows, columns = torch.triu_indices(scores.size(-2), scores.size(-1), offset=1)
    scores[..., rows, columns] = INF


def outside_a_window(scores: Tensor) -> None:
    length = scores.size(-1)
    far = torch.tril_indices(length, length, offset=-3)
    above(scores)
    scores[:, :, far[0], far[1]] = INF


def from_the_end(scores: Tensor) -> None:
    length = scores.size(-1)
    listed = torch.triu_indices(length, length, 1)
    scores[:, :, listed[0] - length, listed[1]] = INF


FOUND = {above: "causal", outside_a_window: "causal, window 3", from_the_end: "causal"}


@pytest.mark.parametrize("change", FOUND)
@pytest.mark.parametrize("length", [7, 5])
def test_attention_of_a_known_length(change: Callable[[Tensor], None], length: int) -> None:
    torch.manual_seed(length)
    site = Site(lambda x: attend(x, change))
    data = [torch.randn(3, 2, 4, length, 4, dtype=torch.float64)]
    found = rewrite(trace_training(site, data))
    assert [s.mask for s in found.result.sites] == [FOUND[change]]
    compare(site, found.graph, data)


def put(
    x: Tensor, at: list[Tensor | None], value: Tensor | float = -1.0, accumulate: bool = False
) -> Tensor:
    value = value if isinstance(value, Tensor) else x.new_tensor(value)
    written: Tensor = aten.index_put.default(x, at, value, accumulate)
    return written


def listed(x: Tensor, offset: int = 1) -> list[Tensor]:
    return list(torch.triu_indices(x.shape[-2], x.shape[-1], offset).unbind())


def last_axes(x: Tensor) -> Tensor:
    return put(x, [None, None, *listed(x)])


def axes_before(x: Tensor) -> Tensor:
    return put(x, [None, *listed(x[0, :, :, 0])], 2.0)


def three_lists(x: Tensor) -> Tensor:
    two = torch.arange(2)
    return put(x, [None, two[:, None, None], two[:, None] + 1, torch.arange(3)])


def learned(x: Tensor, value: Tensor) -> Tensor:
    return put(x, [None, None, *listed(x)], value)


def added(x: Tensor) -> Tensor:
    return put(x, [None, None, *listed(x)], accumulate=True)


def one_value_each(x: Tensor) -> Tensor:
    rows, columns = listed(x)
    return put(x, [None, None, rows, columns], torch.arange(float(len(rows))).to(x))


def by_the_data(x: Tensor) -> Tensor:
    rows, columns = listed(x)
    return put(x, [None, None, rows, (columns + x[0, 0, 0, 0].long().clamp(0, 0))])


def one_list(x: Tensor) -> Tensor:
    return put(x, [None, None, torch.arange(2)])


def an_axis_between(x: Tensor) -> Tensor:
    return put(x, [torch.arange(2), None, torch.arange(2)])


def masks_of_an_axis(x: Tensor) -> Tensor:
    some = torch.arange(3) > 0
    return put(x, [None, some, torch.arange(2)])


def filled(function: Callable[..., Tensor], *parameters: Tensor) -> bool:
    module, data = Site(function, parameters), [torch.randn(2, 3, 4, 4, dtype=torch.float64)]
    graph = trace_directly(module, data)
    fill_listed_places(graph)
    graph.graph.lint()
    graph.recompile()
    compare(module, graph, data)
    return bool(graph.graph.find_nodes(op="call_function", target=aten.masked_fill.Tensor))


@pytest.mark.parametrize("function", [last_axes, axes_before, three_lists])
def test_a_number_at_listed_places(function: Callable[[Tensor], Tensor]) -> None:
    assert filled(function)


def test_a_learned_number_keeps_its_gradient() -> None:
    assert filled(learned, torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    "function",
    [added, one_value_each, by_the_data, one_list, an_axis_between, masks_of_an_axis],
)
def test_anything_else(function: Callable[[Tensor], Tensor]) -> None:
    assert not filled(function)


class Attention(nn.Module):
    def __init__(self, change: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192, bias=False), nn.Linear(64, 64)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.qkv(x).view(rows, length, 3, 2, 32).permute(2, 0, 3, 1, 4)
        mixed = attend(operator.mul(parts, 32**-0.25), self.change)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, width))


class Model(nn.Module):
    def __init__(self, change: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(29, 64), nn.Embedding(LIMIT, 64)
        self.layers = nn.ModuleList(Attention(change) for _ in range(2))
        self.head = nn.Linear(64, 29)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = x + layer(x)
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("change", [above, outside_a_window])
def test_it_is_ported_for_every_length(change: Callable[[Tensor], None]) -> None:
    torch.manual_seed(0)
    report = fxport.port(Model(change)).report
    details = [d.detail for d in report.decisions if d.pass_name == "attention"]
    assert len(details) == 2 and all(f"{FOUND[change]}, 2 heads" in d for d in details)


def below(scores: Tensor) -> None:
    rows, columns = torch.tril_indices(scores.size(-2), scores.size(-1), offset=-1)
    scores[..., rows, columns] = INF


def test_a_mask_that_looks_ahead_is_refused() -> None:
    with pytest.raises(fxport.PortError, match="causal"):
        fxport.port(Model(below))
