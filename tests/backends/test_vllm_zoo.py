"""The zoo in the real engine: windows, softcaps, ALiBi, sinks, experts, one KV head, padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxport
from tests.backends.engine import assert_same, engine, generate, recompute, sharpened
from tests.zoo.gemma import Gemma
from tests.zoo.mpt import MPT
from tests.zoo.off_by_one import OffByOne
from tests.zoo.oss import OSS
from tests.zoo.parallel import ParallelGPT

pytestmark = pytest.mark.engine

# Seeds at which greedy decoding is unambiguous; `recompute` checks that it is.
SEEDS = {Gemma: 1, MPT: 2, OSS: 1, ParallelGPT: 1, OffByOne: 1}


@pytest.mark.parametrize("build", SEEDS, ids=lambda b: b.__name__.lower())
def test_greedy_tokens_are_exact(build: type[torch.nn.Module], tmp_path: Path) -> None:
    model = sharpened(build, SEEDS[build])
    directory = fxport.port(model).save(tmp_path / "port")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 97, (n,), generator=generator).tolist() for n in (1, 4, 19, 33, 70)]
    expected = [recompute(model, p, 12) for p in prompts]
    with engine(directory, max_num_batched_tokens=48, max_num_seqs=8) as llm:
        assert_same(generate(llm, prompts, 12), expected)


@pytest.mark.parametrize("build", SEEDS, ids=lambda b: b.__name__.lower())
def test_half_precision_stays_close(build: type[torch.nn.Module], tmp_path: Path) -> None:
    """`dtype="auto"` makes vLLM serve a float32 port in bfloat16; tables stay in float32.

    Bound: eight significant bits (2**-8 relative) over logits of size about 10 and 4 layers.
    """
    model = sharpened(build, SEEDS[build])
    directory = fxport.port(model).save(tmp_path / "port")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 97, (n,), generator=generator).tolist() for n in (5, 33)]
    with engine(directory, dtype="auto") as llm:
        assert llm.llm_engine.model_config.dtype == torch.bfloat16
        found = generate(llm, prompts, 1)
    for one, prompt in zip(found, prompts, strict=True):
        with torch.no_grad():
            output = model(torch.tensor([prompt]))
        logits = output["logits"] if isinstance(output, dict) else output
        expected = logits[0, -1].log_softmax(-1)[one.tokens[0]]
        assert abs(one.logprobs[0] - float(expected)) < 0.5
