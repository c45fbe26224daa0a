"""The zoo in the real engine: windows, softcaps, ALiBi, sinks, experts, one KV head, padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxport
from tests.backends.engine import assert_same, engine, generate, recompute, sharpened
from tests.zoo.gemma import Gemma
from tests.zoo.mpt import MPT
from tests.zoo.oss import OSS
from tests.zoo.parallel import ParallelGPT

pytestmark = pytest.mark.engine

# Seeds at which greedy decoding is unambiguous; `recompute` checks that it is.
SEEDS = {Gemma: 1, MPT: 2, OSS: 1, ParallelGPT: 1}


@pytest.mark.parametrize("build", SEEDS, ids=lambda b: b.__name__.lower())
def test_greedy_tokens_are_exact(build: type[torch.nn.Module], tmp_path: Path) -> None:
    model = sharpened(build, SEEDS[build])
    directory = fxport.port(model).save(tmp_path / "port")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 97, (n,), generator=generator).tolist() for n in (1, 4, 19, 33, 70)]
    expected = [recompute(model, p, 12) for p in prompts]
    with engine(directory, max_num_batched_tokens=48, max_num_seqs=8) as llm:
        assert_same(generate(llm, prompts, 12), expected)
