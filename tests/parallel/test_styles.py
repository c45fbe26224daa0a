"""Whole models in the styles of the zoo: divided where that is proven, never wrong."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.simulation import compare, make, randomised
from tests.zoo.styles import STYLES

RANKS = {"stablelm": 3, "cohere": 2, "gemma3": 2, "olmo2": 3, "starcoder2": 2, "speed run": 2}


@pytest.mark.parametrize(("name", "world_size"), RANKS.items())
def test_outputs_and_every_gradient(
    name: str, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Norms that ask for float32 get float64: ranks add up sums of squares in another order, and
    # float32's rounding of them would hide what is looked for.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = randomised(STYLES[name]())
    ranks = make(model, world_size)
    plan = ranks.modules[0].plan
    assert any(shard.kind == "column" for shard in plan.parameters)
    assert all(shard.reason for shard in plan.parameters if shard.kind == "replicated")
    errors = compare(model, ranks)
    assert errors.output < 1e-12 and errors.gradient < 1e-11, errors
