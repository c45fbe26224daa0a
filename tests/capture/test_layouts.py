"""Models that take ``[T, B]``: found out, proven as such, and never taken for something else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import fxport
from fxport.backends.torch import PackedModel
from fxport.capture.export import capture
from fxport.capture.layouts import Layout, as_batch_first, layout_of
from fxport.errors import PortError, ReasonCode
from fxport.passes.lookups import look_up_first
from tests.zoo import awkward, caches, calls, time_first
from tests.zoo.awkward import VOCAB

aten = torch.ops.aten
EXACT = {**time_first.EXACT, "turned twice": calls.TimeFirst}


@pytest.mark.parametrize("name", EXACT)
def test_time_first(name: str) -> None:
    torch.manual_seed(5)
    model = EXACT[name]().double().eval()
    port = fxport.port(model)
    layouts = [d.detail for d in port.report.decisions if d.subject == "layout of the tokens"]
    assert layouts == ["forward takes [T, B]; the port takes [B, T], as vLLM does"]
    assert port.report.facts["max_position_embeddings"] == awkward.LIMIT
    packed = PackedModel(port.serving, port.parameters)
    sequences = [torch.randint(0, VOCAB, (n,)) for n in (1, 13, 2, 50)]
    for sequence, found in zip(sequences, packed(sequences), strict=True):
        with torch.no_grad():
            expected = model(sequence[:, None])[:, 0]
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


def test_logits_with_time_first() -> None:
    torch.manual_seed(5)
    model = time_first.GivenTimeFirst().double().eval()
    port = fxport.port(model)
    layouts = [d.detail for d in port.report.decisions if d.subject == "layout of the tokens"]
    assert layouts == [
        "forward takes [B, T] and gives [T, B, V]; the port takes [B, T] and gives [B, T, V], "
        "as vLLM does"
    ]
    packed = PackedModel(port.serving, port.parameters)
    sequences = [torch.randint(0, VOCAB, (n,)) for n in (1, 13, 2, 50)]
    for sequence, found in zip(sequences, packed(sequences), strict=True):
        with torch.no_grad():
            expected = model(sequence[None])[:, 0]
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("name", time_first.BATCH_FIRST)
def test_the_last_state_has_a_row_for_each_token(name: str) -> None:
    """However the model has it: `PackedModel` cuts as vLLM does."""
    torch.manual_seed(5)
    model = time_first.BATCH_FIRST[name]().double().eval()
    port = fxport.port(model)
    assert port.serving.hidden_size == awkward.WIDTH
    packed = PackedModel(port.serving, port.parameters)
    sequences = [torch.randint(0, VOCAB, (n,)) for n in (1, 13, 2, 50)]
    for sequence, found in zip(sequences, packed(sequences), strict=True):
        with torch.no_grad():
            expected = model(sequence[None])[0]
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


class FeaturesFirst(time_first.Folded):
    """``[C, B, T]`` before the head."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        last = self.hidden(ids.t()).permute(2, 1, 0)
        return torch.einsum("cbt,vc->btv", last, self.embed.weight)


def test_features_apart_are_refused() -> None:
    with pytest.raises(PortError) as caught:
        fxport.port(FeaturesFirst().double().eval())
    assert caught.value.reasons[0].code is ReasonCode.UNSUPPORTED_FEATURE
    assert caught.value.reasons[0].location is not None


def test_the_trainable_module_is_called_as_the_model_is() -> None:
    torch.manual_seed(5)
    model = time_first.Folded().double().eval()
    ids = torch.randint(0, VOCAB, (11, 3))
    module = fxport.port(model).module
    torch.testing.assert_close(module(ids), model(ids), rtol=0.0, atol=1e-12)


def test_verify_and_explain_know_the_layout(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = time_first.Folded().eval()
    directory = fxport.port(model).save(tmp_path / "port")
    assert fxport.verify(model, directory, engine=False)
    explained = fxport.explain(model)
    assert not explained.obstacles and len(explained.sites) == awkward.LAYERS


CODES = {
    "time first, no mask": ReasonCode.NOT_CAUSAL,
    "time first, over the batch": ReasonCode.POSITION_UNKNOWN,  # taken for [B, T]: columns mix
    "taken time first": ReasonCode.POSITION_UNKNOWN,
}


@pytest.mark.parametrize("name", time_first.REFUSED)
def test_other_models_that_take_time_first_are_refused(name: str) -> None:
    with pytest.raises(PortError) as caught:
        fxport.port(time_first.REFUSED[name]().double().eval())
    assert caught.value.reasons[0].code is CODES[name], caught.value
    assert caught.value.reasons[0].location is not None


class Forgotten(nn.Module):
    """``[B, T]``, and torch's attention is not told so."""

    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=batch_first)
        self.head = nn.Linear(32, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        found: torch.Tensor = self.attention(x, x, x, attn_mask=mask)[0]
        return self.head(x + found[:, :, :32])


@pytest.mark.parametrize("batch_first", [False, True])
def test_what_torch_s_attention_was_not_told_is_said(batch_first: bool) -> None:
    model = Forgotten(batch_first).eval()
    if batch_first:
        model.attention.embed_dim = 33  # another mistake
    with pytest.raises(PortError) as caught:
        fxport.port(model)
    (reason,) = caught.value.reasons
    assert reason.code is ReasonCode.CAPTURE_FAILED
    assert ("batch_first=True" in reason.hint) is not batch_first


class Mixed(calls.Decoder):
    """``[B, T]``, and every sequence sees the others."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = super().forward(ids)
        return logits + logits.mean(0, keepdim=True)


@pytest.mark.parametrize("model", [calls.Decoder, Mixed])
def test_other_layouts_are_not_taken_for_time_first(model: type[nn.Module]) -> None:
    torch.manual_seed(5)
    assert layout_of(model().eval()) is Layout.BATCH_FIRST


def test_look_ups_come_first() -> None:
    torch.manual_seed(5)
    model = as_batch_first(time_first.Folded().double().eval(), Layout.TIME_FIRST)
    captured = capture(model)
    gm = captured.graph
    tokens = next(n for n in gm.graph.nodes if n.name == captured.tokens)
    before = Counter(n.target for n in gm.graph.nodes)
    assert look_up_first(gm, tokens) == 1
    gm.graph.eliminate_dead_code()
    after = Counter(n.target for n in gm.graph.nodes)
    assert after[aten.embedding.default] == before[aten.embedding.default]
    assert after - before == {aten.transpose.int: 1}
    assert before - after == {aten.t.default: 1}
    (found,) = [n for n in tokens.users if n.target is aten.embedding.default]
    assert str(found.meta["val"].shape[0]) == str(captured.batch)
    assert look_up_first(gm, tokens) == 0


def test_the_buffers_stay() -> None:
    """Forward writes its keys into them; the port is compared with a run of forward."""
    model = caches.EXACT["cache in buffers"]().eval()
    before = [b.clone() for b in model.buffers()]
    fxport.port(model)
    assert before and all(map(torch.equal, before, model.buffers()))
