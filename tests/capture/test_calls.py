"""What forward takes and returns: what is understood, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fxport
from fxport.backends.torch import PackedModel
from fxport.capture.export import capture
from fxport.errors import PortError, ReasonCode
from tests.zoo import caches, older
from tests.zoo.awkward import VOCAB, WIDTH
from tests.zoo.calls import EXACT, IMAGE, REFUSED
from tests.zoo.gpt import GPT


def logits_in(output: object) -> Tensor:
    """By hand, so that the code under test does not choose for itself."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return output[1]
    return output["logits"] if isinstance(output, dict) else output.logits  # type: ignore[attr-defined]


KEPT = {**caches.EXACT, **older.EXACT}  # what forward keeps, looks at, or registers
REALLY_KEPT = {**caches.REFUSED, **older.REFUSED}


@pytest.mark.parametrize("name", [*EXACT, *KEPT])
def test_the_logits_are_found(name: str) -> None:
    torch.manual_seed(3)
    model = {**EXACT, **KEPT}[name]().double().eval()
    port = fxport.port(model)
    packed = PackedModel(port.serving, port.parameters)
    for length in (1, 2, 13, 50):
        sequences = [torch.randint(0, VOCAB, (n,)) for n in (length, 7)]
        sequences[0][:1] = sequences[1][3] = IMAGE
        for sequence, found in zip(sequences, packed(sequences), strict=True):
            with torch.no_grad():
                expected = logits_in(model(sequence[None]))[0]
            torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


def test_the_report_says_that_caches_are_not_kept() -> None:
    report = fxport.port(caches.EXACT["cache in buffers"]().eval()).report
    (found,) = [d for d in report.decisions if d.subject == "the model's own caches"]
    assert found.detail.count("cache_k") == found.detail.count("cache_v") == 4


def test_buffers_that_hold_nothing_yet() -> None:
    model = GPT().eval()
    for layer in range(12):
        model.register_buffer(f"cache_{layer}", None)
    model.register_buffer("scale", torch.ones(1))
    names = list(model._buffers)
    assert "cache_0" not in capture(model).state
    assert list(model._buffers) == names


def test_the_model_keeps_its_own_forward() -> None:
    model = EXACT["dataclass"]().double().eval()
    fxport.port(model)
    assert "forward" not in vars(model)


CODES = {
    "bigram ids": ReasonCode.NO_VOCABULARY,
    "short vocabulary": ReasonCode.NO_LOGITS,
    "two heads": ReasonCode.NO_LOGITS,
    "reads more than it wrote": ReasonCode.MUTATED_STATE,
    "reads before it writes": ReasonCode.MUTATED_STATE,
    "nn.TransformerEncoder, no mask": ReasonCode.NOT_CAUSAL,
    "tables made of values": ReasonCode.MUTATED_STATE,
}


@pytest.mark.parametrize("name", [*REFUSED, *REALLY_KEPT])
def test_other_calls_are_refused(name: str) -> None:
    with pytest.raises(PortError) as caught:
        fxport.port({**REFUSED, **REALLY_KEPT}[name]().double().eval())
    reason = caught.value.reasons[0]
    assert reason.code is CODES[name]
    if reason.code is ReasonCode.NO_LOGITS:
        assert reason.location is not None and "tests/zoo" in reason.location.file
        assert f"] and [.., {WIDTH if 'short' in name else VOCAB}], for ids below" in reason.message


class CompilesItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)[:, None]
        causal = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, ids.shape[1], ids.shape[1], device="cpu"
        )
        return flex_attention(x, x, x, block_mask=causal)[:, 0] @ self.embed.weight.T


def test_a_forward_that_compiles_a_part_of_itself_is_refused_in_plain_words() -> None:
    with pytest.raises(PortError) as refused:
        fxport.port(CompilesItself().eval())
    (reason,) = refused.value.reasons
    assert reason.code is ReasonCode.CAPTURE_FAILED
    assert "compiles a part of itself" in reason.message
    assert reason.location is not None and "flex_attention(x" in reason.location.source
