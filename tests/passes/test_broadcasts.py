"""Factors that are spread out before they meet scores meet them as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_graphs import Site, compare, trace_directly
from torch import Tensor

from fxport.passes.attention.broadcasts import spread_by_the_operation


def repeated(x: Tensor) -> Tensor:
    return x * x[..., :1].repeat(1, 1, x.size(2))


def expanded(x: Tensor) -> Tensor:
    return x / x[..., :1].exp().expand_as(x)


def spread_over_a_new_dimension(x: Tensor) -> Tensor:
    return x[0, 0].repeat(x.size(0), 1, 1) * x


def tiled(x: Tensor) -> Tensor:
    return x * x[..., :2].repeat(1, 1, x.size(2) // 2)


def both_spread(x: Tensor) -> Tensor:
    return x[..., :1].repeat(1, 1, 4) * x[:, :1].repeat(1, 3, 1)


def count(graph: torch.fx.GraphModule) -> int:
    spreads = (torch.ops.aten.repeat.default, torch.ops.aten.expand.default)
    return sum(n.target in spreads for n in graph.graph.nodes)


@pytest.mark.parametrize(
    "function,left",
    [(repeated, 0), (expanded, 0), (spread_over_a_new_dimension, 0), (tiled, 1), (both_spread, 1)],
)
def test_only_what_is_copied_along_ones_goes(function: Callable[..., Any], left: int) -> None:
    data = [torch.randn(2, 3, 4, dtype=torch.float64)]
    site = Site(function)
    graph = trace_directly(site, data)
    spread_by_the_operation(graph)
    graph.graph.lint()
    graph.recompile()
    assert count(graph) == left
    compare(site, graph, data)
