"""The building blocks: flash forward and backward, a whole model, its training, vLLM."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxport
from fxport import ParallelContext
from fxport.nn import (
    GenericTransformerForCausalLM,
    TransformerConfig,
    VLLMFlashAttention,
    full_state_dict,
    load_model,
    save_model,
)
from fxport.nn.attention import token_positions

from .backends.engine import assert_same, engine, generate, recompute, sharpened
from .backends.test_vllm_parallel import two_ranks

WINDOW = 5
SIZES = TransformerConfig(
    vocab_size=97,  # divides by no number of ranks
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    sliding_window_size=WINDOW,
)


# -- the reference: plain torch, written here --------------------------------------------------


def rotated(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Pairs (i, i + D/2) as complex numbers, turned by position * base^(-2i/D)."""
    size = x.shape[-1]
    pairs = torch.complex(*(part.double() for part in x.chunk(2, -1)))
    rate = torch.tensor([base ** (-2 * i / size) for i in range(size // 2)]).double()
    turned = pairs * torch.exp(1j * positions.double()[:, None] * rate)[:, None]
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)


def plain_attention(
    state: dict[str, Tensor], x: Tensor, heads: int, kv_heads: int, window: int | None
) -> Tensor:
    """One sequence ``[T, C]``, head by head, row by row."""
    length = x.shape[0]
    size = state["q_proj.weight"].shape[0] // heads
    positions = torch.arange(length)
    q = rotated((x @ state["q_proj.weight"].T).view(length, heads, size), positions)
    k = rotated((x @ state["k_proj.weight"].T).view(length, kv_heads, size), positions)
    v = (x @ state["v_proj.weight"].T).view(length, kv_heads, size)
    rows = []
    for t in range(length):
        first = 0 if window is None else max(0, t + 1 - window)
        parts = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            weights = (k[first : t + 1, g] @ q[t, h] / math.sqrt(size)).softmax(-1)
            parts.append(weights @ v[first : t + 1, g])
        rows.append(torch.cat(parts))
    return torch.stack(rows) @ state["o_proj.weight"].T


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def plain_model(state: dict[str, Tensor], ids: Tensor, sizes: TransformerConfig) -> Tensor:
    """One sequence ``[T]`` -> logits ``[T, V]``"""
    x = state["embed_tokens.weight"][ids]
    for i in range(sizes.num_hidden_layers):
        own = {n.removeprefix(f"layers.{i}."): v for n, v in state.items()}
        attention = {n.removeprefix("self_attn."): v for n, v in own.items()}
        heads, kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
        assert kv_heads is not None
        y = norm(x, own["input_layernorm.weight"])
        x = x + plain_attention(attention, y, heads, kv_heads, sizes.sliding_window_size)
        y = norm(x, own["post_attention_layernorm.weight"])
        gate, up = (y @ own[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ own["mlp.down_proj.weight"].T
    return norm(x, state["norm.weight"]) @ state["lm_head.weight"].T


class Plain(nn.Module):
    """The reference as a module with the same parameter names, for the engine's comparison."""

    def __init__(self, state: dict[str, Tensor], sizes: TransformerConfig) -> None:
        super().__init__()
        self.state, self.sizes = state, sizes

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([plain_model(self.state, row, self.sizes) for row in ids])


def leaves(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that collect gradients of their own."""
    return {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}


def assert_gradients(module: nn.Module, state: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(
            parameter.grad, state[name].grad, msg=lambda m, n=name: f"{n}: {m}"
        )


def double_attention(window: int | None = WINDOW) -> VLLMFlashAttention:
    torch.manual_seed(0)
    return VLLMFlashAttention(48, 6, 2, rope_base=10000.0, sliding_window=window).double()


def build(config: Any, parallel_context: ParallelContext) -> nn.Module:
    return GenericTransformerForCausalLM(config, parallel_context)


# -- the five tests ----------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, WINDOW])
def test_flash_forward(window: int | None) -> None:
    block = double_attention(window)
    x = torch.randn(3, 11, 48, dtype=torch.float64)
    state = leaves(block)
    expected = torch.stack([plain_attention(state, row, 6, 2, window) for row in x])
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block.eval()(x), expected)
    # Packed: sequences of 4, 1 and 6 tokens see nothing of each other.
    packed, bounds = x[0], torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    alone = [plain_attention(state, part, 6, 2, window) for part in packed.split([4, 1, 6])]
    torch.testing.assert_close(block(packed, cu_seqlens=bounds), torch.cat(alone))
    assert not torch.allclose(block(packed), torch.cat(alone))
    assert token_positions(packed, bounds).tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5]


def test_flash_backward() -> None:
    block = double_attention()
    state = leaves(block)
    x = torch.randn(3, 11, 48, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    seed = torch.randn(3, 11, 48, dtype=torch.float64)
    bounds = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    (block(x) * seed).sum().backward()
    (block(x[0], cu_seqlens=bounds) * seed[1]).sum().backward()
    (torch.stack([plain_attention(state, row, 6, 2, WINDOW) for row in y]) * seed).sum().backward()
    parts = [plain_attention(state, part, 6, 2, WINDOW) for part in y[0].split([4, 1, 6])]
    (torch.cat(parts) * seed[1]).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert_gradients(block, state)


def test_model_forward() -> None:
    torch.manual_seed(1)
    model = GenericTransformerForCausalLM(SIZES).double()
    ids = torch.randint(97, (2, 13))
    expected = torch.stack([plain_model(leaves(model), row, SIZES) for row in ids])
    torch.testing.assert_close(model(ids), expected)
    bounds = torch.tensor([0, 13, 26], dtype=torch.int32)
    torch.testing.assert_close(model(ids.flatten(), cu_seqlens=bounds), expected.flatten(0, 1))


def test_model_training(tmp_path: Path) -> None:
    """Three steps of AdamW, two accumulated batches each, then a checkpoint on 2 ranks."""
    torch.manual_seed(2)
    model = GenericTransformerForCausalLM(SIZES).double()
    state = leaves(model)
    own = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reference = torch.optim.AdamW(state.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        for ids in torch.randint(97, (2, 2, 9)):
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            rows = torch.cat([plain_model(state, row[:-1], SIZES) for row in ids])
            expected = F.cross_entropy(rows, ids[:, 1:].flatten())
            torch.testing.assert_close(loss, expected)
            loss.backward()
            expected.backward()
            losses.append(loss.item())
        assert_gradients(model, state)
        for optimizer in (own, reference):
            optimizer.step()
            optimizer.zero_grad()
    assert len(set(losses)) == len(losses)

    save_model(model, tmp_path / "saved", {"fxport_builder": "Tested", **SIZES.to_dict()})
    contexts = ParallelContext.simulated(2)

    def reload(rank: int) -> Tensor:
        part = GenericTransformerForCausalLM(SIZES, contexts[rank]).double()
        load_model(part, tmp_path / "saved")
        part_state = full_state_dict(part)
        assert all(torch.equal(part_state[n], p) for n, p in model.state_dict().items())
        return part(ids)

    for logits in contexts[0].group.run(reload):
        torch.testing.assert_close(logits, model(ids))


@pytest.mark.engine
@pytest.mark.parametrize("tied", [False, True])
def test_vllm_wrapper(tmp_path: Path, tied: bool) -> None:
    """``LLM(directory)`` gives the reference's greedy tokens, several requests at once."""
    fxport.register_model("Tested", build)
    sizes = TransformerConfig(**{**SIZES.to_dict(), "tie_word_embeddings": tied})
    model = sharpened(lambda: GenericTransformerForCausalLM(sizes), seed=3)
    save_model(model, tmp_path / "saved", {"fxport_builder": "Tested", **sizes.to_dict()})
    prompts = [[5, 17, 3], [88], [2, 4, 8, 16, 32, 64, 31, 62]]
    reference = Plain({n: p.detach() for n, p in model.state_dict().items()}, sizes)
    expected = [recompute(reference, prompt, 12) for prompt in prompts]
    with engine(tmp_path / "saved") as llm:
        assert_same(generate(llm, prompts, 12), expected)


@pytest.mark.engine
def test_vllm_wrapper_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two spawned workers, which find the builder by FXPORT_MODELS and share the one kv head."""
    (tmp_path / "my_models.py").write_text(
        "import fxport\nfrom fxport.nn import GenericTransformerForCausalLM as Model\n"
        "fxport.register_model('Spawned', lambda config, context: Model(config, context))\n"
    )
    monkeypatch.setenv("FXPORT_MODELS", "my_models")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    sizes = TransformerConfig(97, 48, 72, 4, 6, 1, 64, tie_word_embeddings=True)
    model = sharpened(lambda: GenericTransformerForCausalLM(sizes), seed=3)
    save_model(model, tmp_path / "saved", {"fxport_builder": "Spawned", **sizes.to_dict()})
    prompts = [[5, 17, 3], [88], [2, 4, 8, 16, 32, 64, 31, 62]]
    reference = Plain({n: p.detach() for n, p in model.state_dict().items()}, sizes)
    expected = [recompute(reference, prompt, 12) for prompt in prompts]
    with two_ranks(tmp_path / "saved", monkeypatch) as llm:
        assert_same(generate(llm, prompts, 12), expected)
