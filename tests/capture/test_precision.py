"""Parameters of several dtypes, and autocast inside of forward: captured with every cast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxport
from fxport.capture.export import capture
from fxport.errors import PortError
from fxport.passes.dtypes import coarsest
from fxport.passes.held_as_read import hold_as_read
from fxport.passes.tokens.rules import may_be_saved
from fxport.saved import read_serving
from tests.zoo import precision
from tests.zoo.precision import EXACT

aten = torch.ops.aten
HALF, FLOAT = torch.bfloat16, torch.float32

SERVED = {
    "half tables": HALF,
    "widened table": FLOAT,
    "wide norms": HALF,
    "wide norms, float16": torch.float16,
    "autocast": FLOAT,
    "autocast, half tables": HALF,
}


@pytest.mark.parametrize("name", EXACT)
def test_served_in_the_dtype_of_attention(name: str, tmp_path) -> None:
    """The self-check compares the logits; every parameter keeps its own dtype, saved too."""
    torch.manual_seed(0)
    model = EXACT[name]().eval()
    port = fxport.port(model)
    serving = port.serving
    assert serving.dtype == SERVED[name]
    own = dict(model.named_parameters())
    assert {n: serving.dtype_of(n) for n in serving.parameters} == {
        n: own[n].dtype for n in serving.parameters
    }
    port.save(tmp_path / "port")
    read = read_serving(tmp_path / "port", may_be_saved, serving.dtype, torch.device("cpu"))
    assert read.dtypes == serving.dtypes
    ids = torch.randint(0, precision.VOCAB, (1, 9))
    with torch.no_grad():
        loaded = fxport.load(tmp_path / "port").module(ids)
        torch.testing.assert_close(loaded, model(ids), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["autocast", "autocast, half tables"])
def test_autocast_written_out_gives_the_same_numbers(name: str) -> None:
    """Bit by bit: attention and all else are still the model's own operations."""
    torch.manual_seed(0)
    model = EXACT[name]().eval()
    captured = capture(model)
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    ids = torch.randint(0, precision.VOCAB, (2, 9))
    given = [
        ids if n.name == captured.tokens else values[n.meta["input"].name]
        for n in captured.graph.graph.find_nodes(op="placeholder")
    ]
    with torch.no_grad():
        assert torch.equal(captured.graph(*given), model(ids))


class OneOperation(nn.Module):
    """An operation under autocast between a look-up and a product."""

    def __init__(self, operation) -> None:
        super().__init__()
        self.embed, self.operation = nn.Embedding(17, 32), operation
        self.weight = nn.Parameter(torch.randn(32, 32))

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.operation(self.embed(ids), self.weight)
        return F.linear(x.float(), self.embed.weight)


OPERATIONS = {
    "linear": F.linear,
    "matmul": lambda x, w: x @ w,
    "einsum": lambda x, w: torch.einsum("btc,dc->btd", x, w),
    "layer norm": lambda x, w: F.layer_norm(x, (32,), w[0]),
    "softmax": lambda x, w: F.linear(x, w).softmax(-1),
    "both dtypes": lambda x, w: torch.cat([x[..., :16], F.linear(x, w)[..., 16:]], -1),
    "stack": lambda x, w: torch.stack([x, F.linear(x, w)]).sum(0),
    "addcmul": lambda x, w: torch.addcmul(x, F.linear(x, w), x),
    "with itself": lambda x, w: (x * (x @ w)) @ (w @ w),
    "in place": lambda x, w: F.linear(x, w).add_(x),
    "double": lambda x, w: x.double() @ w.double(),
    "attention": lambda x, w: F.scaled_dot_product_attention(x, x @ w, x, is_causal=True),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_autocast_does_is_seen(name: str) -> None:
    torch.manual_seed(0)
    model = OneOperation(OPERATIONS[name]).eval()
    captured = capture(model)
    values = dict(model.named_parameters())
    ids = torch.randint(0, 17, (2, 9))
    given = [
        ids if n.name == captured.tokens else values[n.meta["input"].name]
        for n in captured.graph.graph.find_nodes(op="placeholder")
    ]
    with torch.no_grad():
        assert torch.equal(captured.graph(*given), model(ids))


def test_what_autocast_does_beside_casts_is_refused() -> None:
    """As where a library's operation asks whether autocast is on."""
    library = torch.library.Library("fxport_test", "DEF")
    library.define("shifted(Tensor x, Tensor w) -> Tensor")

    def shifted(x: Tensor, w: Tensor) -> Tensor:
        return (x + 1 if torch.is_autocast_enabled("cpu") else x) @ w

    library.impl("shifted", shifted, "CompositeImplicitAutograd")
    with pytest.raises(PortError, match=r"what autocast does to `fxport_test.shifted.default`"):
        capture(OneOperation(torch.ops.fxport_test.shifted).eval())


def test_weights_that_are_only_read_cast_are_held_so() -> None:
    serving = hold_as_read(fxport.port(precision.HalfTables().eval()).serving)
    assert serving.dtype_of("layers.0.qkv.weight") == serving.dtype_of("head.weight") == HALF
    assert serving.dtype_of("layers.0.norms.0.weight") == FLOAT
    for linear in serving.body.graph.find_nodes(op="call_function", target=aten.linear.default):
        assert linear.args[1].op == "placeholder"


class Tied(precision.HalfTables):
    """The head reads, in bfloat16, the table that is looked up in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed.float()
        self.head.weight = self.embed.weight

    def first(self, ids: Tensor) -> Tensor:
        return self.embed(ids).bfloat16()


def test_a_weight_that_is_read_otherwise_too_stays_as_it_is() -> None:
    serving = hold_as_read(fxport.port(Tied().eval()).serving)
    assert serving.dtype_of("embed.weight") == FLOAT
    assert serving.head.graph.find_nodes(op="call_function", target=aten.to.dtype)


def test_rounding_is_that_of_attention() -> None:
    assert coarsest(fxport.port(precision.Autocast().eval()).serving) == HALF
    assert coarsest(fxport.port(precision.WidenedTable().eval()).serving) == FLOAT
