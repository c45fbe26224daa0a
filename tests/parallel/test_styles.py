"""Whole models in the styles of the zoo: divided where that is proven, never wrong."""

from __future__ import annotations

import pytest
import torch

import fxport
from fxport.tools.zoo_configs import tiny_model
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


@pytest.mark.parametrize(("family", "moments"), [("phi3", 0), ("olmo2", 2)])
def test_fused_projections_and_full_width_norms_cost_what_dense_blocks_do(
    family: str, moments: int
) -> None:
    """Hugging Face's own plans gather phi3's fused projections and OLMo 2's queries and keys.

    `moments` are of one element for a token: the mean square of the queries, and of the keys.
    """
    model = tiny_model(family)
    plan = fxport.plan(model, 2)
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    assert plan.replicated == ()
    for direction in ("forward", "backward"):
        found = [c for c in plan.collectives if c.direction == direction]
        sent = sorted(c.elements_per_token for c in found if c.kind == "all_reduce")
        # two for each block, one beside the vocabulary: embedding forward, head backward
        assert sent == [1] * moments * layers + [width] * (2 * layers + 1)
        assert sum(c.kind != "all_reduce" for c in found) == (direction == "forward")  # logits
