"""The constants of a graph of plain sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxport.capture.clone import clone_for_capture
from fxport.capture.export import capture
from fxport.capture.inputs import graph_input
from fxport.capture.sample import take_sample
from fxport.capture.sizes import at_sizes
from fxport.capture.symbolic import trace_symbolically
from tests.zoo.awkward import LIMIT
from tests.zoo.called import Tiny

aten = torch.ops.aten


class Adds(Tiny):
    """Adds to the logits what `made` gives for the length."""

    def __init__(self, made: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.made = made

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.made(ids.shape[1])


def values(made: Callable[[int], Tensor], target: Any) -> list[Tensor]:
    sample = take_sample(clone_for_capture(Adds(made).eval()), 2, 5)
    found = [sample.value(n) for n in sample.graph.graph.nodes if n.target is target]
    assert len(found) == 2
    return found


def test_what_is_made_alike_twice_is_made_once():
    one, other = values(
        lambda n: sum(torch.ones(n, 1).cumsum(0) for _ in range(2)), aten.cumsum.default
    )
    assert one is other


def written_between(n: int) -> Tensor:
    table = torch.ones(n, 1)
    first = table.cumsum(0)
    return first + table.mul_(3).cumsum(0)


def drawn(n: int) -> Tensor:
    return torch.rand(n, 1).cumsum(0) + torch.rand(n, 1).cumsum(0)


def of_another_number(n: int) -> Tensor:
    return torch.ones(n, 2).cumsum(0).sum(1, keepdim=True) + torch.ones(n, 1).cumsum(0)


@pytest.mark.parametrize("made", [written_between, drawn, of_another_number])
def test_what_is_not_made_alike_is_not_shared(made):
    one, other = values(made, aten.cumsum.default)
    assert one.shape != other.shape or not torch.equal(one, other)


def row_by_row(n: int) -> Tensor:
    return torch.stack([torch.full((1,), i / 4) for i in range(n)])


def test_what_every_layer_makes_is_one_table_of_the_port():
    model = Adds(lambda n: row_by_row(n) + row_by_row(n).exp() + row_by_row(n)).eval()
    inputs = map(graph_input, capture(model).graph.graph.find_nodes(op="placeholder"))
    tables = [i.value for i in inputs if i.name.startswith("constant_")]
    assert sum(t is not None and t.shape == (LIMIT, 1) for t in tables) == 1


def test_a_symbolic_graph_at_plain_sizes_is_the_plain_graph():
    model = Tiny().eval()
    symbolic = trace_symbolically(clone_for_capture(model))
    one = at_sizes(symbolic, 3, 19)
    other = take_sample(clone_for_capture(model), 3, 19)
    assert [n.target for n in one.varying] == [n.target for n in other.varying]
    for n, m in zip(one.varying, other.varying, strict=True):
        if isinstance(n.meta["val"], Tensor):
            assert n.meta["val"].shape == m.meta["val"].shape
    assert one.logits == other.logits
