"""Rows taken and put back by an index written out for every column; a part of each row stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxport.capture.whole_rows import take_whole_rows

aten = torch.ops.aten
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def taken(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    return x.gather(0, rows[:, None].expand(-1, x.shape[1]))


def put_back(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    return x.scatter_add(0, rows.view(-1, 1).repeat(1, x.shape[1]), y)


def some_columns(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    return x.gather(0, rows[:, None].expand(-1, 3))


def some_columns_put_back(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    return x.scatter_add(0, rows[:, None].expand(-1, 3), y)


def of_larger_rows(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    wide = torch.cat([y, y], 1)
    return x.scatter_add(0, rows[:, None].expand(-1, x.shape[1]), wide)


def of_more_rows(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    return x.scatter_add(0, rows[:, None].expand(-1, x.shape[1]), torch.cat([y, y]))


def columns(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    square = x @ x.T
    return square.gather(1, rows[:, None].expand(-1, 6))


def another_row_for_each_column(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    return x.gather(0, rows[None, :].expand(5, -1))


def repeated_rows(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    return x.gather(0, rows[:, None].repeat(2, x.shape[1]))


def changed(function: Function) -> bool:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(n, 5, generator=generator) for n in (6, 5))
    rows = torch.tensor([4, 0, 4, 2, 1])
    graph = make_fx(function, tracing_mode="fake")(x, rows, y)
    take_whole_rows(graph)
    graph.recompile()
    assert torch.equal(graph(x, rows, y), function(x, rows, y))
    return not any(n.target in (aten.gather.default, aten.scatter_add.default)
                   for n in graph.graph.nodes)  # fmt: skip


@pytest.mark.parametrize("function", [taken, put_back])
def test_whole_rows(function: Function) -> None:
    assert changed(function)


@pytest.mark.parametrize(
    "function",
    [
        some_columns, some_columns_put_back, of_larger_rows, of_more_rows, columns,
        another_row_for_each_column, repeated_rows,
    ],
)  # fmt: skip
def test_what_is_no_whole_row_stays(function: Function) -> None:
    assert not changed(function)
