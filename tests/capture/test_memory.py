"""Which picked outputs of an operation are memory of their own."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from fxport.capture.memory import is_fresh

aten = torch.ops.aten


def picked(target: torch._ops.OpOverload, args: tuple, indices: list[int]) -> list[fx.Node]:
    graph = fx.Graph()
    made = graph.call_function(target, (graph.placeholder("x"), *args))
    return [graph.call_function(operator.getitem, (made, i)) for i in indices]


def test_each_output_of_topk_is_its_own() -> None:
    assert all(map(is_fresh, picked(aten.topk.default, (2,), [0, 1])))


@pytest.mark.parametrize("indices", [[0, 0], [1, -1]])
def test_an_output_that_is_picked_twice_is_shared(indices: list[int]) -> None:
    assert not any(map(is_fresh, picked(aten.topk.default, (2,), indices)))


def test_outputs_that_are_also_passed_on_together_are_shared() -> None:
    (value,) = picked(aten.topk.default, (2,), [0])
    value.graph.output(value.args[0])
    assert not is_fresh(value)


def test_pieces_of_a_tensor_are_views() -> None:
    assert not any(map(is_fresh, picked(aten.split.Tensor, (2,), [0, 1])))
