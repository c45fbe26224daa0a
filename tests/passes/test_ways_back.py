"""A tensor in another shape and back is itself, unless somebody writes to a copy or to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxport.passes.view_writes import drop_ways_back


def _viewed(x: Tensor) -> Tensor:
    return x.view(-1).view(3, 5) + 1


def _flattened(x: Tensor) -> Tensor:
    return x.flatten().reshape(3, 5) + 1


def _copied(x: Tensor) -> Tensor:
    return x.t().reshape(-1).view(5, 3) + 1


def _elsewhere(x: Tensor) -> Tensor:
    return x.flatten().view(5, 3) + 1


def _written(x: Tensor) -> Tensor:
    copy = x.t().reshape(-1)
    back = copy.view(5, 3)
    copy[0] = 7.0
    return x.t() + back


@pytest.mark.parametrize(
    ("forward", "left"),
    [(_viewed, 0), (_flattened, 0), (_copied, 0), (_elsewhere, 2), (_written, 2)],
)
def test_only_ways_back_go(forward: Callable[[Tensor], Tensor], left: int) -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    gm = make_fx(forward, pre_dispatch=True)(x.clone())
    drop_ways_back(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    shaped = ("view", "reshape", "flatten")
    assert sum(getattr(n.target, "_opname", "") in shaped for n in gm.graph.nodes) == left
    assert torch.equal(gm(x.clone()), forward(x.clone()))
