"""A decoder layer without an encoder: attention over a memory that holds no tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxport
from fxport import api
from fxport.backends.torch import PackedModel
from fxport.capture.export import capture
from fxport.capture.inputs import InputKind, graph_input
from fxport.errors import PortError, ReasonCode
from fxport.passes.attention.rewrite import rewrite_attention
from fxport.passes.axes import Symbols
from fxport.passes.fixed_keys import attend_to_fixed_keys
from fxport.report import Decision, Outcome

V, C, H, D, LONGEST = 41, 24, 6, 4, 29
OP = torch.ops.fxport.attention.default
Memory = Callable[["Layered", Tensor], Tensor]


class Layered(nn.Module):
    """Layers of `nn.TransformerDecoder`, each with a memory made up for it."""

    def __init__(self, memories: Sequence[Memory]) -> None:
        super().__init__()
        self.emb, self.table = nn.Embedding(V, C), nn.Embedding(LONGEST, C)
        self.rows = nn.Parameter(torch.randn(1, 5, C))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(C, H, 40, 0.1, batch_first=True) for _ in memories
        )
        self.head = nn.Linear(C, V)
        self.memories = memories
        for weight in self.parameters():  # biases are made as zeros
            nn.init.normal_(weight, std=0.3)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.emb(ids) + self.table(torch.arange(length))
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
        for layer, memory in zip(self.layers, self.memories, strict=True):
            x = layer(x, memory(self, x), tgt_mask=mask)
        return self.head(x)


def zeros(model: Layered, x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def one_row(model: Layered, x: Tensor) -> Tensor:
    return model.rows[:, :1].expand(x.shape[0], -1, -1)


def one_row_for_each(model: Layered, x: Tensor) -> Tensor:
    return model.rows[:, :1].expand_as(x) * 2.0


def five_rows(model: Layered, x: Tensor) -> Tensor:
    return model.rows.repeat(x.shape[0], 1, 1)


def no_row(model: Layered, x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], 0, C)


def counted(model: Layered, x: Tensor) -> Tensor:
    return torch.zeros_like(x) + torch.arange(x.shape[1])[:, None] * 0.1


def turned(model: Layered, x: Tensor) -> Tensor:
    """Two rows, read as if they were tokens: what is alike ends up apart."""
    flat = model.rows[:, :2].expand(x.shape[1], 2, C).reshape(-1)
    return flat.view(2, x.shape[1], C)[:1].expand(x.shape[0], -1, -1)


def running(model: Layered, x: Tensor) -> Tensor:
    return torch.ones_like(x).cumsum(1) * 0.1


def tokens(model: Layered, x: Tensor) -> Tensor:
    return x


@pytest.fixture(autouse=True)
def float_only(monkeypatch: pytest.MonkeyPatch) -> None:
    decision = Decision("precision", Outcome.PROVEN, "serving dtype")
    monkeypatch.setattr(api, "_half", lambda *_: (None, decision))


def double(*memories: Memory) -> Layered:
    torch.manual_seed(3)
    return Layered(memories).double().eval()


def test_each_token_for_itself() -> None:
    model = double(zeros, one_row, one_row_for_each, five_rows, no_row)
    port = fxport.port(model)
    found = [d for d in port.report.decisions if d.pass_name == "keys"]
    assert [d.outcome for d in found] == [Outcome.REWRITTEN] * 5
    assert len(port.serving.attention) == 5
    sequences = [torch.randint(0, V, (n,)) for n in (1, 9, 2, LONGEST)]
    packed = PackedModel(port.serving, port.parameters)(sequences)
    for sequence, logits in zip(sequences, packed, strict=True):
        with torch.no_grad():
            expected = model(sequence[None])[0]
        torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-12)


def attended(model: nn.Module) -> tuple[torch.fx.GraphModule, int]:
    captured = capture(model)
    rewrite_attention(captured.graph, assume_spread=True)
    found = attend_to_fixed_keys(captured.graph, Symbols(captured.batch, captured.length))
    return captured.graph, len(found)


@pytest.mark.parametrize("memory", [counted, turned, running, tokens])
def test_a_memory_that_differs_by_token_is_left_alone(memory: Memory) -> None:
    gm, found = attended(double(memory))
    assert found == 0 and len(gm.graph.find_nodes(op="call_function", target=OP)) == 2


def test_and_refused() -> None:
    with pytest.raises(PortError) as caught:
        fxport.port(double(tokens))
    assert caught.value.reasons[0].code is ReasonCode.NOT_CAUSAL


class Grouped(nn.Module):
    """Fewer heads of keys than of queries, and what a plain softmax over all keys is not."""

    def __init__(self, keys: int = 7, **options: object) -> None:
        super().__init__()
        self.emb, self.q, self.head = nn.Embedding(V, C), nn.Linear(C, C), nn.Linear(C, V)
        self.rows = nn.Parameter(torch.randn(2, 1, 2, keys, D))
        self.options = options

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        q = self.q(x).unflatten(-1, (H, D)).transpose(1, 2)
        k, v = self.rows.expand(-1, ids.shape[0], -1, -1, -1)
        attend = F.scaled_dot_product_attention
        y = attend(q, k, v, enable_gqa=True, **self.options)  # type: ignore[arg-type]
        return self.head(x + y.transpose(1, 2).flatten(2))


def grouped(**options: Any) -> nn.Module:
    torch.manual_seed(4)
    return Grouped(**options).double().eval()


@pytest.mark.parametrize("keys", [7, 1, 0])
def test_numbers_and_gradients(keys: int) -> None:
    model = grouped(keys=keys, scale=0.7)
    gm, found = attended(model)
    assert found == 1 and not gm.graph.find_nodes(op="call_function", target=OP)
    ids = torch.randint(0, V, (3, 11))
    named = dict(model.named_parameters())
    inputs = [graph_input(n) for n in gm.graph.find_nodes(op="placeholder")]
    given = [ids if i.kind is InputKind.DATA else named[i.name] for i in inputs]
    after = gm(*given)
    before = model(ids)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    loss = torch.linspace(-1, 1, before.numel(), dtype=torch.float64).view_as(before)
    wanted, got = (
        torch.autograd.grad((x * loss).sum(), list(named.values()), materialize_grads=True)
        for x in (before, after)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_a_mask_over_the_keys_is_left_alone() -> None:
    seen = torch.tensor([True, False, True, True, False, True, True])
    gm, found = attended(grouped(attn_mask=seen[None]))
    assert found == 0 and gm.graph.find_nodes(op="call_function", target=OP)
