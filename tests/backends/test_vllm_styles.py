"""Further styles in the real engine: exact greedy tokens, log-probabilities to 1e-4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxport
from tests.backends.engine import assert_same, engine, generate, recompute, sharpened
from tests.zoo import time_first
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
