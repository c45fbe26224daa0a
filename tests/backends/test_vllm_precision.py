"""Parameters of several dtypes, and autocast in forward, in the real engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxport
from tests.backends.engine import assert_same, engine, generate, recompute, sharpened
from tests.zoo.precision import EXACT, VOCAB

pytestmark = pytest.mark.engine

# Attention rounds to eight bits, in another order than eager does.
ROUNDED = 0.1


@pytest.mark.parametrize("name", ["half tables", "autocast", "wide norms"])
def test_every_weight_is_held_in_the_dtype_in_which_it_is_read(name: str, tmp_path: Path) -> None:
    model = sharpened(EXACT[name], seed=1)
    port = fxport.port(model)
    directory = port.save(tmp_path / "port")
    prompts = [[5], [7, 3, 11, 60], list(range(33))]
    dtype = str(port.serving.dtype).removeprefix("torch.")
    with engine(directory, dtype=dtype) as llm:
        found = generate(llm, prompts, 8)
    for prompt, one in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt + one.tokens])
        with torch.no_grad():
            expected = model(ids)[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
        assert (expected.amax(1) - chosen).max() < ROUNDED
        assert (chosen - torch.tensor(one.logprobs)).abs().max() < ROUNDED


def test_a_table_in_half_precision_alone_is_exact(tmp_path: Path) -> None:
    model = sharpened(EXACT["widened table"], seed=1)
    directory = fxport.port(model).save(tmp_path / "port")
    prompts = [torch.randint(0, VOCAB, (n,)).tolist() for n in (1, 4, 33)]
    expected = [recompute(model, prompt, 8) for prompt in prompts]
    with engine(directory) as llm:
        assert_same(generate(llm, prompts, 8), expected)
