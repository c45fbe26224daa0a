"""Operations on weights alone need no rule; tokens, lengths and random numbers still refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxport
from fxport.errors import PortError, ReasonCode
from fxport.graph_json import part_from_dict, part_to_dict
from fxport.passes.tokens.rules import has_rule, may_be_saved
from fxport.passes.tokens.weights import is_function

aten = torch.ops.aten
VOCAB, WIDTH = 61, 64


class Decoder(nn.Module):
    """One attention, and something done with weights of its own."""

    def __init__(self, made: Callable[[Decoder, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.a, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.codes = nn.Parameter(torch.randint(0, 256, (WIDTH, 32), dtype=torch.uint8), False)
        self.table = nn.Parameter(torch.randn(96, WIDTH))
        self.made = made

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)[:, None]
        x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.head(self.made(self, x[:, 0]))


def _orthogonal(m: Decoder, x: Tensor) -> Tensor:
    if not nn.utils.parametrize.is_parametrized(m.inner):
        parametrizations.orthogonal(m.inner)
    return m.inner(x)


def _unpacked(m: Decoder, x: Tensor) -> Tensor:
    codes = torch.stack([m.codes & 15, m.codes >> 4], -1).reshape(WIDTH, WIDTH)
    return F.linear(x, (codes.float() - 8) * m.w.abs().mean())


EXACT: dict[str, Callable[[Decoder, Tensor], Tensor]] = {
    "kron": lambda m, x: F.linear(x, torch.kron(m.a, m.b)),
    "block_diag": lambda m, x: x @ torch.block_diag(*[m.a, m.b] * 4),
    "solve": lambda m, x: x @ torch.linalg.solve(torch.eye(WIDTH) + m.w - m.w.T, m.w),
    "matrix_exp": lambda m, x: x @ torch.matrix_exp(m.w - m.w.T),
    "qr": lambda m, x: x @ torch.linalg.qr(m.w)[0],
    "fake_quantize": lambda m, x: F.linear(
        x, torch.fake_quantize_per_tensor_affine(m.w, 0.01, 0, -128, 127)
    ),
    "kthvalue": lambda m, x: F.linear(x, m.w * (m.w.abs() > m.w.flatten().kthvalue(99).values)),
    "four bits": _unpacked,
}

_RULES = (ReasonCode.UNSUPPORTED_OP, ReasonCode.DEPENDS_ON_LENGTH, ReasonCode.MIXES_TOKENS)
REFUSED: dict[str, Callable[[Decoder, Tensor], Tensor]] = {
    "random numbers": lambda m, x: F.linear(x, torch.rand_like(m.w)),
    "drawn from weights": lambda m, x: F.linear(x, torch.bernoulli(m.w.sigmoid())),
    "noise on weights": lambda m, x: F.linear(x, m.w + torch.randn(WIDTH, WIDTH)),
    "dropout of weights": lambda m, x: F.linear(x, F.dropout(m.w, 0.1, True)),
    "of tokens": lambda m, x: torch.kron(x, m.a[:1, :1].expand(1, 1, 1)),
    "over positions": lambda m, x: x + torch.linalg.qr(m.table[: x.shape[1]])[0].sum(),
    "quantile over positions": lambda m, x: x + m.table[: x.shape[1]].quantile(0.5, dim=0),
    "pinv over positions": lambda m, x: x + torch.linalg.pinv(m.table[: x.shape[1]]).T,
}


@pytest.mark.parametrize("name", EXACT)
def test_weights_alone(name: str) -> None:
    """The self-check compares the logits with the model's."""
    torch.manual_seed(0)
    fxport.port(Decoder(EXACT[name]).eval(), max_seq_len=64)


def test_a_parametrised_layer() -> None:
    torch.manual_seed(0)
    model = Decoder(_orthogonal)
    _orthogonal(model, torch.zeros(1, WIDTH))
    port = fxport.port(model.eval(), max_seq_len=64)
    assert "parametrizations" in "".join(port.serving.parameters)


@pytest.mark.parametrize("name", REFUSED)
def test_not_of_weights_alone(name: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(PortError) as refused:
        fxport.port(Decoder(REFUSED[name]).eval(), max_seq_len=64)
    reason = refused.value.reasons[0]
    assert reason.code in _RULES
    assert reason.location is not None and __file__ in reason.location.file


class Wide(nn.Module):
    """Layers whose weights are merged, or scaled by one number, in forward."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 256), nn.Linear(256, VOCAB)
        self.down = nn.Parameter(torch.randn(4, 256) / 16)
        self.up = nn.Parameter(torch.randn(256, 4) / 16)
        self.layers = nn.ModuleList([nn.Linear(256, 256) for _ in range(4)])
        self.merged = merged

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            q = x[:, None, :, :64]
            x = x + F.scaled_dot_product_attention(q, q, x[:, None], is_causal=True)[:, 0]
            if self.merged:
                x = x + F.linear(x, layer.weight + self.up @ self.down)
            else:
                x = x + layer(x) * (1 + self.down[0].tanh())
        return self.head(x)


@pytest.mark.parametrize("merged", [True, False])
def test_what_is_made_at_every_step_is_said(merged: bool) -> None:
    torch.manual_seed(0)
    report = fxport.port(Wide(merged).eval(), max_seq_len=64).report
    found = [d for d in report.left() if d.reason and d.reason.code is ReasonCode.EVERY_STEP]
    if not merged:  # 256 numbers: not worth a line
        assert found == []
        return
    (line,) = found
    assert line.detail == f"8 values, {8 * 256 * 256:,} numbers"
    assert line.location is not None
    assert "self.up @ self.down" in line.location.source


def test_no_graph_for_a_precision_without_kernels() -> None:
    torch.manual_seed(0)
    port = fxport.port(Decoder(EXACT["qr"]).eval(), max_seq_len=64)
    assert port.half is None
    (line,) = [d for d in port.report.decisions if d.subject == "serving dtype"]
    assert line.reason is not None and "cannot be run in this precision" in line.reason.message


def test_functions() -> None:
    for target in (aten.kron.default, aten.linalg_qr.default, aten.block_diag.default):
        assert is_function(target) and not has_rule(target) and may_be_saved(target)
    strange = (
        aten.from_file.default, aten.randn.default, aten.bernoulli.default, aten.dropout.default,
        aten.add_.Tensor, aten.nonzero.default, aten.item.default, aten.resize.default,
        aten._unsafe_index.Tensor, aten.set_.source_Tensor, aten.new_empty_strided.default,
        aten.max_unpool2d.default, aten.fbgemm_linear_fp16_weight.default, aten.as_strided.default,
        aten.mkldnn_linear.default, aten.segment_reduce.default, aten.data.default,
    )  # fmt: skip
    assert not any(map(is_function, strange))


def test_a_saved_graph_holds_them() -> None:
    torch.manual_seed(0)
    serving = fxport.port(Decoder(EXACT["kron"]).eval(), max_seq_len=64).serving
    data = part_to_dict(serving.body, may_be_saved, torch.float32)
    read = part_from_dict(data, may_be_saved, torch.float32, torch.device("cpu"))
    assert any(n.target is aten.kron.default for n in read.graph.nodes)
