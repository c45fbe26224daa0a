"""A number written where a mask says so becomes a fill; whatever else is written stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_graphs import Site, compare, trace_directly
from torch import Tensor

from fxport.passes.attention.fills import spell_out_fills

aten = torch.ops.aten


def put(x: Tensor, at: list[Tensor | None], value: Tensor, accumulate: bool = False) -> Tensor:
    written: Tensor = aten.index_put.default(x, at, value, accumulate)
    return written


def below(x: Tensor) -> Tensor:
    return torch.ones(x.shape[2:], dtype=torch.bool).tril(-1)


def dims_before(x: Tensor) -> Tensor:
    return put(x, [None, None, below(x)], x.new_tensor(-1.0))


def dims_before_and_after(x: Tensor) -> Tensor:
    every_second = torch.arange(x.shape[1]) % 2 == 0
    return put(x, [None, every_second], x.new_tensor(3.0))


def mask_first(x: Tensor) -> Tensor:
    return put(x, [x > 0], x.new_tensor(0.5))


def added(x: Tensor) -> Tensor:
    return put(x, [x > 0], x.new_tensor(0.5), accumulate=True)


def one_value_each(x: Tensor) -> Tensor:
    rows = torch.tensor([True, False, True])
    return put(x, [None, rows], x.new_tensor([[[2.0]], [[3.0]]]))


def rows_by_number(x: Tensor) -> Tensor:
    return put(x, [None, torch.tensor([1])], x.new_tensor(2.0))


def rows_and_a_mask(x: Tensor) -> Tensor:
    every_second = torch.tensor([True, False, True])
    return put(x, [torch.tensor([1]), every_second], x.new_tensor(2.0))


def filled(function: Callable[[Tensor], Tensor]) -> bool:
    module, data = Site(function), [torch.randn(2, 3, 4, 4, dtype=torch.float64)]
    graph = trace_directly(module, data)
    spell_out_fills(graph)
    graph.recompile()
    compare(module, graph, data)
    return not graph.graph.find_nodes(op="call_function", target=aten.index_put.default)


@pytest.mark.parametrize("function", [dims_before, dims_before_and_after, mask_first])
def test_a_number_under_a_mask(function: Callable[[Tensor], Tensor]) -> None:
    assert filled(function)


@pytest.mark.parametrize("function", [added, one_value_each, rows_by_number, rows_and_a_mask])
def test_anything_else(function: Callable[[Tensor], Tensor]) -> None:
    assert not filled(function)


def test_a_triangle_of_constants_is_a_mask_and_stays() -> None:
    """Its sizes, and the buffers behind it, are the prover's."""

    def function(x: Tensor, table: Tensor) -> Tensor:
        mask = torch.full(x.shape[2:], -1.0, dtype=x.dtype).triu(1)
        return x.tril() + mask + table.tril()

    module = Site(function, (), [torch.ones(4, 4, dtype=torch.float64)])
    data = [torch.randn(2, 3, 4, 4, dtype=torch.float64)]
    graph = trace_directly(module, data)
    spell_out_fills(graph)
    graph.recompile()
    compare(module, graph, data)
    nodes = graph.graph.nodes
    assert len(graph.graph.find_nodes(op="call_function", target=aten.masked_fill.Scalar)) == 1
    cuts = [n for n in nodes if n.target in (aten.tril.default, aten.triu.default)]
    floats = [n for n in cuts if n.meta["val"].is_floating_point()]
    assert len(cuts) == 3 and len(floats) == 2  # and the one that says which data is kept


def filled_over(x: Tensor) -> Tensor:
    """The first has a gradient, of zeros."""
    low = torch.fill(torch.empty_like(x, dtype=torch.float16), -0.1)
    return (
        torch.fill(x * 2, 3)
        + low
        + torch.fill(torch.empty(3), 2.0)
        + torch.fill(x.new_empty(2, 1), 1)
    )


def test_what_is_filled_all_over_has_a_shape_alone() -> None:
    module, data = Site(filled_over), [torch.randn(2, 3, dtype=torch.float64)]
    graph = trace_directly(module, data)
    spell_out_fills(graph)
    graph.recompile()
    compare(module, graph, data)
    targets = [n.target for n in graph.graph.nodes]
    assert targets.count(aten.full_like.default) == 3 and targets.count(aten.fill.Scalar) == 1
    assert aten.empty_like.default not in targets
