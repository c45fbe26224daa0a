"""torch.nn's own attention: `MultiheadAttention` and the Transformer layers, in both modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_graphs import compare, rewrite, softmax_count, trace_training
from torch import Tensor, nn

from fxport.errors import FxportWarning

WIDTH, HEADS, BATCH, LENGTH, MEMORY = 12, 4, 3, 7, 9


class Calls(nn.Module):
    """``call(inner, *data)`` as a module whose forward takes data alone."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner.double()
        self.call = call

    def forward(self, *data: Tensor) -> Any:
        return self.call(self.inner, *data)


@pytest.fixture(autouse=True)
def no_fast_path() -> Any:
    """The fast path is a fused kernel without a graph; it runs in inference only."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def tokens(length: int, batch_first: bool, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, length, WIDTH) if batch_first else (length, BATCH, WIDTH)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def padding(length: int) -> Tensor:
    """Keys that entry b of the batch must not see: its last b."""
    return torch.arange(length)[None, :] >= length - torch.arange(BATCH)[:, None]


def check(module: Calls, data: list[Tensor], *expect: str) -> None:
    graph = trace_training(module, data)
    assert softmax_count(graph) == len(expect)
    found = rewrite(graph)
    details = [d.detail for d in found.result.decisions if d.detail]
    assert found.count == len(expect) and softmax_count(found.graph) == 0, found.result.decisions
    for words, detail in zip(expect, details, strict=True):
        assert words in detail, (words, detail)
    compare(module, found.graph, data)


MASKS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "none": (lambda: {}, "full"),
    "bool": (lambda: {"attn_mask": causal(LENGTH)}, "causal"),
    "float": (
        lambda: {
            "attn_mask": torch.zeros(LENGTH, LENGTH)
            .double()
            .masked_fill(causal(LENGTH), -torch.inf)
        },
        "causal",
    ),
    "is_causal": (lambda: {"attn_mask": causal(LENGTH), "is_causal": True}, "causal"),
}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_multihead_attention(
    mask: str, batch_first: bool, training: bool, need_weights: bool
) -> None:
    """Weights that are asked for and dropped by the caller do no harm."""
    make, words = MASKS[mask]

    def call(inner: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = inner(x, x, x, need_weights=need_weights, **make())[0]
        return out

    dropout = 0.0 if training else 0.2
    module = Calls(nn.MultiheadAttention(WIDTH, HEADS, dropout, batch_first=batch_first), call)
    check(module.train(training), [tokens(LENGTH, batch_first)], words)


@pytest.mark.parametrize("mask", ["none", "bool"])
def test_padded_keys_from_the_data(mask: str) -> None:
    """The first entry of the batch pads nothing, the last most; causal stays part of the bias."""
    make, _ = MASKS[mask]

    def call(inner: nn.Module, x: Tensor, pad: Tensor) -> Tensor:
        out: Tensor = inner(x, x, x, key_padding_mask=pad > 0, need_weights=False, **make())[0]
        return out

    module = Calls(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), call)
    check(module, [tokens(LENGTH, True), padding(LENGTH).long()], "dense data bias")


@pytest.mark.parametrize("average", [True, False])
def test_returned_weights_are_refused(average: bool) -> None:
    def call(inner: nn.Module, x: Tensor) -> Any:
        return inner(x, x, x, average_attn_weights=average)

    module = Calls(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), call)
    data = [tokens(LENGTH, True)]
    found = rewrite(trace_training(module, data))
    assert found.count == 0 and found.left() == ["attention-weights-used-elsewhere"]
    compare(module, found.graph, data)


@pytest.mark.parametrize("extra", ["add_bias_kv", "add_zero_attn", "kdim", "no_bias"])
def test_options_of_multihead_attention(extra: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "add_bias_kv": {"add_bias_kv": True},
        "add_zero_attn": {"add_zero_attn": True},
        "kdim": {"kdim": 5, "vdim": 8},
        "no_bias": {"bias": False},
    }
    k_width, v_width = (5, 8) if extra == "kdim" else (WIDTH, WIDTH)

    def call(inner: nn.Module, q: Tensor, y: Tensor) -> Tensor:
        out: Tensor = inner(q, y[..., :k_width], y[..., :v_width], need_weights=False)[0]
        return out

    inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options[extra])
    module = Calls(inner, call)
    check(module, [tokens(LENGTH, True), tokens(MEMORY, True, 1)], "full")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_encoder_layers(batch_first: bool, training: bool, masked: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 20, 0.0 if training else 0.1, batch_first=batch_first, norm_first=masked
    )
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def call(inner: nn.Module, x: Tensor) -> Any:
        # With is_causal=None the encoder reads the mask's values, which Dynamo does not capture.
        return inner(x, mask=causal(LENGTH) if masked else None, is_causal=masked)

    words = "causal" if masked else "full"
    check(Calls(encoder, call).train(training), [tokens(LENGTH, batch_first)], *[words] * 4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_decoder_layers(batch_first: bool, training: bool, is_causal: bool) -> None:
    """Causal self-attention and full cross-attention to a memory of another length."""
    layer = nn.TransformerDecoderLayer(
        WIDTH, HEADS, 20, 0.0 if training else 0.1, batch_first=batch_first
    )

    def call(inner: nn.Module, x: Tensor, memory: Tensor) -> Any:
        return inner(x, memory, tgt_mask=causal(LENGTH), tgt_is_causal=is_causal)

    module = Calls(nn.TransformerDecoder(layer, 2), call).train(training)
    data = [tokens(LENGTH, batch_first), tokens(MEMORY, batch_first, 1)]
    check(module, data, "causal", "full", "causal", "full")


def test_decoder_with_padded_memory() -> None:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 20, 0.0, batch_first=True)

    def call(inner: nn.Module, x: Tensor, memory: Tensor, pad: Tensor) -> Any:
        return inner(x, memory, tgt_mask=causal(LENGTH), memory_key_padding_mask=pad > 0)

    data = [tokens(LENGTH, True), tokens(MEMORY, True, 1), padding(MEMORY).long()]
    check(Calls(layer, call), data, "causal", "dense data bias")


def compiled_against_eager(module: Calls, data: list[Tensor], strict: bool) -> None:
    """Through the backend with Inductor: outputs and all gradients in float64."""

    def run(function: Callable[..., Any]) -> list[Tensor]:
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in data]
        out = function(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        wanted = [x for x in inputs if x.requires_grad] + list(module.parameters())
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), wanted)]

    torch._dynamo.reset()
    compiled = torch.compile(module, backend="vllm_generic", options={"strict": strict})
    for actual, expected in zip(run(compiled), run(module), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_encoder_compiled() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 20, 0.0, batch_first=True)
    module = Calls(layer, lambda inner, x: inner(x, src_mask=causal(LENGTH), is_causal=True))
    compiled_against_eager(module, [tokens(LENGTH, True)], strict=True)


def test_decoder_compiled() -> None:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 20, 0.0, batch_first=False)
    module = Calls(layer, lambda inner, x, y: inner(x, y, tgt_mask=causal(LENGTH)))
    compiled_against_eager(module, [tokens(LENGTH, False), tokens(MEMORY, False, 1)], strict=True)


def test_returned_weights_compiled() -> None:
    """Left as it was, with a warning that says so, and right."""
    inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    module = Calls(inner, lambda inner, x: inner(x, x, x))
    with pytest.warns(FxportWarning, match="returned or used"):
        compiled_against_eager(module, [tokens(LENGTH, True)], strict=False)
