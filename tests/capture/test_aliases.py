"""Second names of operations: one rule for both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxport.capture.aliases import _NAMES, _OPERATORS, _plain, plain_names
from fxport.testing import assert_rewrites, assert_same
from tests.zoo.older import OtherNames

aten = torch.ops.aten


@pytest.mark.parametrize("name", _NAMES)
def test_every_overload_has_its_plain_name(name: str) -> None:
    for written in (name, f"{name}_"):
        packet = getattr(aten, written, None)
        for overload in packet.overloads() if packet is not None else ():
            found = _plain(getattr(packet, overload))
            assert found.overloadpacket is not packet, found
            assert found._schema.is_mutable == getattr(packet, overload)._schema.is_mutable


@pytest.mark.parametrize("name", _OPERATORS)
def test_operators_have_plain_names(name: str) -> None:
    for overload in (getattr(aten, name).Tensor, getattr(aten, name).Scalar):
        found = _plain(overload)
        assert found.overloadpacket is not overload.overloadpacket
        assert found._schema.is_mutable == overload._schema.is_mutable


def test_arguments_keep_their_places() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        z = torch.subtract(x, y, alpha=3)
        z.multiply_(y)
        return torch.divide(torch.swapaxes(z, axis0=0, axis1=2), 7, rounding_mode="floor")

    x, y = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    gm: fx.GraphModule = make_fx(function, pre_dispatch=True)(x, y)
    before = [n.target for n in gm.graph.find_nodes(op="call_function", target=aten.sub.Tensor)]
    plain_names(gm.graph)
    gm.recompile()
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert not before and aten.sub.Tensor in targets and aten.mul_.Tensor in targets
    assert aten.transpose.int in targets and aten.div.Tensor_mode in targets
    torch.testing.assert_close(gm(x, y), function(x, y), rtol=0, atol=0)


def test_other_operations_are_left_alone() -> None:
    for op in (aten.sub.Tensor, aten.floor_divide.default, aten.special_i0.default):
        assert _plain(op) is op


def test_attention_in_training() -> None:
    torch.manual_seed(0)
    model = OtherNames().double()
    ids = torch.randint(0, 61, (2, 11))
    assert_rewrites(model, (ids,), attention=4)
    assert_same(model, torch.compile(model, backend="vllm_generic"), (ids,), grads=True)
