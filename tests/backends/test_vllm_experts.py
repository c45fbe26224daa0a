"""Expert loops with data-dependent control flow in the real engine: exact greedy tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxport
from tests.backends.engine import assert_same, engine, generate, recompute, sharpened
from tests.zoo.chosen_experts import LOOK_UPS, of_styles
from tests.zoo.experts import MODELS

pytestmark = pytest.mark.engine


QUICK, *LONG = MODELS
LOOKED_UP = "weights looked up for each row"


@pytest.mark.parametrize(
    "name", [LOOKED_UP, QUICK, *(pytest.param(n, marks=pytest.mark.long) for n in LONG)]
)
def test_greedy_tokens_are_exact(name: str, tmp_path: Path) -> None:
    build = MODELS[name] if name in MODELS else lambda: of_styles(LOOK_UPS)
    model = sharpened(build, 1)
    directory = fxport.port(model).save(tmp_path / "port")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in (1, 4, 19, 33, 70)]
    expected = [recompute(model, p, 12) for p in prompts]
    with engine(directory, max_num_batched_tokens=48, max_num_seqs=8) as llm:
        assert_same(generate(llm, prompts, 12), expected)
