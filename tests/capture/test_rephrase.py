"""What is said in another way for the trace, with the same meaning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxport
from fxport.capture.arguments import arguments
from fxport.capture.export import capture
from fxport.capture.rephrase import rephrased
from fxport.errors import PortError
from tests.zoo.called import Tiny
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


class _Causal(Tiny):
    """Masks unless there is one token, as models with a cache do; by keyword, and by place."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = super().forward(ids)[:, None]
        attend = F.scaled_dot_product_attention
        x = x + attend(x, x, x, is_causal=ids.shape[1] > 1)
        return attend(x, x, x, None, 0.0, x.shape[2] == ids.shape[1])[:, 0]


def test_causal_by_a_comparison_of_sizes() -> None:
    captured = capture(_Causal().eval())
    assert captured.symbolic
    attention = torch.ops.aten.scaled_dot_product_attention.default
    calls = captured.graph.graph.find_nodes(op="call_function", target=attention)
    assert [a["is_causal"] for a in map(arguments, calls[-2:])] == [True, True]
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def _head(q: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor], scale: float) -> object:
    scores = (q @ pair[0].transpose(-1, -2) * scale).softmax(-1)
    return scores @ pair[1], {"largest": scores.max(-1).values}


@pytest.mark.parametrize(
    ("in_dims", "out_dims"), [((1, (1, 1), None), (1, 0)), ((0, (0, None), None), (-1, 1))]
)
def test_vmap_is_a_loop(in_dims: object, out_dims: object) -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 4).unbind()
    v = v if in_dims[1][1] is not None else v[0]
    mapped = torch.vmap(_head, in_dims, out_dims)
    expected, largest = mapped(q, (k, v), 0.5)
    with rephrased():
        gm = make_fx(lambda q, k, v: mapped(q, (k, v), 0.5), pre_dispatch=True)(q, k, v)
    assert gm.graph.find_nodes(op="call_function", target=torch.ops.aten.stack.default)
    torch.testing.assert_close(gm(q, k, v), (expected, largest))


def test_vmap_over_numbers_stays_one_operation() -> None:
    rows = torch.arange(5)
    with rephrased():
        mask = torch.vmap(torch.vmap(lambda q, k: k <= q, (None, 0)), (0, None))(rows, rows)
        gm = make_fx(lambda x: torch.vmap(torch.sin)(x), pre_dispatch=True)(rows.float())
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)) == 1
    assert mask.equal(torch.ones(5, 5, dtype=torch.bool).tril())


class ByHead(nn.Module):
    """Attention head by head, as functions of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(31, 64), nn.Linear(64, 192)
        self.head = nn.Linear(64, 31)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        batch, length = ids.shape
        x = self.embed(ids)
        q, k, v = self.qkv(x).view(batch, length, 3, 2, 32).permute(2, 0, 3, 1, 4)
        allowed = torch.ones(length, length, dtype=torch.bool).tril()

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            scores = (q @ k.transpose(-1, -2) / 32**0.5).masked_fill(~allowed, -torch.inf)
            return scores.softmax(-1) @ v

        y = torch.vmap(attend, in_dims=1, out_dims=2)(q, k, v)
        return self.head(x + y.reshape(batch, length, 64))


def test_a_model_that_maps_over_heads() -> None:
    torch.manual_seed(0)
    assert len(fxport.port(ByHead().eval()).serving.attention) == 2


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


class GivenData(GPT):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = super().forward(ids)
        logits.data = logits * 3
        return logits


def test_memory_given_by_data_is_refused() -> None:
    """The trace would go on with what the tensor had before."""
    with pytest.raises(PortError) as refused:
        capture(GivenData().eval())
    assert refused.value.reasons[0].location.source == "logits.data = logits * 3"
