"""What is said in another way for the trace, with the same meaning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxport
from fxport.capture.rephrase import rephrased
from tests.zoo.gpt import GPT


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_weight_norm(dim: int) -> None:
    torch.manual_seed(0)
    v = torch.randn(5, 7, dtype=torch.float64)
    g = torch.rand((1, 1) if dim == -1 else (5, 1) if dim == 0 else (1, 7), dtype=torch.float64)
    expected = torch._weight_norm(v, g if dim != -1 else g.squeeze(), dim)
    with rephrased():
        found = torch._weight_norm(v, g if dim != -1 else g.squeeze(), dim)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert found.shape == expected.shape


def test_type_as_takes_the_dtype_alone() -> None:
    x, other = torch.randn(3), torch.zeros(2, dtype=torch.float64)
    with rephrased():
        assert x.type_as(other).equal(x.double())
        assert x.type_as(other=other).dtype is torch.float64
        assert x.type_as(x) is x


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4)])
def test_hstack_is_cat(shape: tuple[int, ...]) -> None:
    parts = (torch.randn(shape), torch.randn(shape))
    with rephrased():
        gm = make_fx(lambda *given: torch.hstack(given), pre_dispatch=True)(*parts)
    assert gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    assert gm(*parts).equal(torch.hstack(parts))


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_a_weight_normed_model(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = GPT().eval()
    for block in model.transformer["h"]:
        wrap(block.mlp.c_fc)
    fxport.port(model)  # compares itself with the original


def test_a_compiled_model_is_the_model() -> None:
    model = GPT().eval()
    port = fxport.port(torch.compile(model))
    assert port.parameters.keys() == dict(model.named_parameters()).keys()
    assert port.report.model == "GPT"
