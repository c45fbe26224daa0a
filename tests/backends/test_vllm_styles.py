"""Further styles in the real engine: exact greedy tokens, log-probabilities to 1e-4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxport
from tests.backends.engine import assert_same, engine, generate, recompute, sharpened
from tests.zoo import time_first
from tests.zoo.chunks import VOCAB, ByChunks
from tests.zoo.styles import STYLES

pytestmark = pytest.mark.engine

# Seeds at which greedy decoding is unambiguous where 1 is not; `recompute` checks that it is.
SEEDS = {"stablelm": 2, "nn.MultiheadAttention": 2}


@pytest.mark.parametrize("name", STYLES)
def test_greedy_tokens_are_exact(name: str, tmp_path: Path) -> None:
    model = sharpened(STYLES[name], SEEDS.get(name, 1))
    directory = fxport.port(model).save(tmp_path / "port")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in (1, 4, 19, 33, 70)]
    expected = [recompute(model, p, 12) for p in prompts]
    with engine(directory, max_num_batched_tokens=48, max_num_seqs=8) as llm:
        assert_same(generate(llm, prompts, 12), expected)


def test_chunks_of_every_size(tmp_path: Path) -> None:
    """Prefilled in pieces that end within chunks, from a cache of prefixes, and one by one."""
    model = sharpened(ByChunks, seed=2)
    port = fxport.port(model)
    directory = port.save(tmp_path / "port")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (1, 6, 30, 70)]
    expected = [recompute(model, p, 12) for p in prompts]
    with engine(directory, max_num_batched_tokens=48, max_num_seqs=8, block_size=32) as llm:
        for _ in range(2):
            assert_same(generate(llm, prompts, 12), expected)
            assert_same(generate(llm, prompts[-1:], 12), expected[-1:])


def test_what_flags_of_chunks_say() -> None:
    """Within a chunk nothing is added; to the one before so much that nothing is left."""
    from fxport.backends.vllm.chunks import ChunkFlags
    from fxport.errors import FxportError
    from fxport.ops.params import AttentionParams

    config = Settings(Settings(max_model_len=100))
    for scale in (0.125, -3.0, 1e-3):
        flags = ChunkFlags.of(AttentionParams(scale, True, chunk=5), config)  # type: ignore[arg-type]
        assert flags is not None and flags.window_left == 4
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            zeros, positions = torch.zeros(1, 2, 40, 3, dtype=dtype), torch.arange(7, 47)
            q, k = flags.append(zeros, zeros, positions)
            added = (q.double() @ k.double().mT) * scale
            chunk = positions // 5
            apart = (chunk[:, None] - chunk[None, :]).abs() % 2 == 1
            assert bool((added[0, 0][~apart] == 0).all())
            assert bool((added[0, 0][apart] <= -1e5).all())
    assert ChunkFlags.of(AttentionParams(0.1, True, chunk=100), config) is None  # type: ignore[arg-type]
    narrow = ChunkFlags.of(AttentionParams(0.1, True, 2, chunk=5), config)  # type: ignore[arg-type]
    assert narrow is not None and narrow.window_left == 2
    with pytest.raises(FxportError, match="softcap"):
        ChunkFlags.of(AttentionParams(0.1, True, softcap=3.0, chunk=5), config)  # type: ignore[arg-type]


class Settings:
    """As much of vLLM's configuration as is read."""

    def __init__(self, model_config: object = None, max_model_len: int = 0) -> None:
        self.model_config, self.max_model_len = model_config, max_model_len


class Turned(nn.Module):
    """A ``[T, B]`` model, asked as ``[B, T]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids.t()).transpose(0, 1)


@pytest.mark.parametrize("name", [*time_first.EXACT, *time_first.BATCH_FIRST])
def test_time_first(name: str, tmp_path: Path) -> None:
    """The rows that vLLM picks are tokens, however the model has them."""
    model = sharpened({**time_first.EXACT, **time_first.BATCH_FIRST}[name], seed=2)
    directory = fxport.port(model).save(tmp_path / "port")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in (1, 4, 33)]
    asked = Turned(model) if name in time_first.EXACT else model
    expected = [recompute(asked, p, 8) for p in prompts]
    with engine(directory, max_num_batched_tokens=24, max_num_seqs=8) as llm:
        assert_same(generate(llm, prompts, 8), expected)


class Convolved(nn.Module):
    """Every projection is a convolution over one token: queries and keys are columns in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 64), nn.Linear(64, 61)
        self.into = nn.ModuleList(nn.Conv1d(64, 192, 1) for _ in range(4))
        self.out = nn.ModuleList(nn.Conv1d(64, 64, 1) for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).transpose(1, 2)
        for into, out in zip(self.into, self.out, strict=True):
            q, k, v = into(x).unflatten(1, (3, 2, 32)).transpose(-1, -2).unbind(1)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(y.transpose(-1, -2).flatten(1, 2))
        return self.head(x.transpose(1, 2))


def test_keys_that_are_columns(tmp_path: Path) -> None:
    model = sharpened(Convolved, seed=2)
    directory = fxport.port(model).save(tmp_path / "port")
    prompts = [[5], [7, 3, 11, 60], list(range(33))]
    expected = [recompute(model, p, 8) for p in prompts]
    with engine(directory, max_num_batched_tokens=24, max_num_seqs=8) as llm:
        assert_same(generate(llm, prompts, 8), expected)
