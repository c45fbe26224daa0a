"""What two nodes compute alike, and what only looks as if it were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxport.passes.attention.computed_twice import computed_again

aten = torch.ops.aten


def _twice(x: Tensor) -> Tensor:
    return (x * 2).exp() + (x * 2).exp()


def _swapped(x: Tensor) -> Tensor:
    return x.amax(-1, keepdim=True).exp() + x.amax(-1, True).exp()


def _other_number(x: Tensor) -> Tensor:
    return (x * 2).exp() + (x * 3).exp()


def _other_type(x: Tensor) -> Tensor:
    return (x * 1).exp() + (x * True).exp()


def _other_axis(x: Tensor) -> Tensor:
    return x.amax(0, keepdim=True).exp() + x.amax(1, keepdim=True).exp()


def _more(x: Tensor) -> Tensor:
    return torch.cat([x, x]).sum().exp() + torch.cat([x, x, x]).sum().exp()


def _drawn(x: Tensor) -> Tensor:
    return (x * torch.rand_like(x)).exp() + (x * torch.rand_like(x)).exp()


def _written_between(x: Tensor) -> Tensor:
    y = x * 1.5
    first = y.exp()
    y[0].add_(1.0)
    return first + y.exp()


def _products(x: Tensor) -> Tensor:
    return (x @ x).exp() + (x @ x).exp()


@pytest.mark.parametrize(
    ("forward", "nodes"),
    [
        (_twice, 2),
        (_swapped, 2),
        (_other_number, None),
        (_other_type, None),
        (_other_axis, None),
        (_more, None),
        (_drawn, None),
        (_written_between, None),
        (_products, None),
    ],
)
def test_alike_means_the_same_value(forward: Callable[[Tensor], Tensor], nodes: int | None) -> None:
    gm = make_fx(forward, pre_dispatch=True)(torch.randn(4, 4, dtype=torch.float64))
    first, again = gm.graph.find_nodes(op="call_function", target=aten.exp.default)
    found = computed_again(again, first)
    assert (found is None) if nodes is None else (found is not None and len(found) == nodes)
    assert found is None or found[0] is again
    assert computed_again(first, first) == ()


def test_what_autocast_computes_elsewhere_is_another_value() -> None:
    """The graph says it with the dtype alone."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    first, again = (graph.call_function(aten.exp.default, (x,)) for _ in range(2))
    first.meta["val"], again.meta["val"] = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    assert computed_again(again, first) is None
