"""N ranks in one process, float64: outputs, every gradient, communication counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx

from fxport.parallel.api import gather_state_dict, plan, shard_state_dict
from fxport.parallel.context import ParallelContext
from fxport.passes.tensor_parallel.build import divide, prepare
from tests.parallel.models import LAYERS, MODELS
from tests.parallel.simulation import compare, make_once, randomised

# Head counts that divide, do not divide, and are below the number of ranks.
RANKS = {"separate": (2, 3, 4, 8), "grouped, few kv heads": (2, 3, 4), "multi-query": (2, 4)}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_every_gradient(name: str) -> None:
    model = randomised(MODELS[name]())
    for ranks in make_once(model, *RANKS.get(name, (2, 3))):
        errors = compare(model, ranks)
        assert errors.output < 1e-12 and errors.gradient < 1e-12, errors


@pytest.mark.parametrize("name", ["separate", "chunk", "unbind, packed GLU", "interleaved"])
def test_dense_block_costs_two_reductions_each_way(name: str) -> None:
    found = plan(MODELS[name](), 2)
    # one more each way for the divided vocabulary: embedding forward, head backward
    assert found.count("forward") == found.count("backward") == 2 * LAYERS + 1
    assert not any("parameter" in c.kind for c in found.collectives)


def _calls(graph: fx.Graph) -> Counter[Any]:
    return Counter(n.target for n in graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("name", ["separate", "grouped, few kv heads"])
def test_operations_before_and_after(name: str) -> None:
    """Every operation of the model once, collectives besides; nothing at all for one rank."""
    prepared = prepare(randomised(MODELS[name]()))
    before = _calls(prepared.graph.graph)
    for world_size in (1, 2):
        context = ParallelContext.simulated(world_size)[0]
        found = divide(prepared, context)
        after = _calls(found.emission.graph)
        linear, attention = torch.ops.aten.linear.default, torch.ops.fxport.attention.default
        assert after[linear] == before[linear] and after[attention] == before[attention] == LAYERS
        new = sum(after.values()) - sum(before.values())
        if world_size == 1:
            assert after == before and not found.plan.collectives
        else:
            assert new > 0 and found.plan.collectives


def test_norm_over_all_heads_reduces_moments_and_gathers_nothing() -> None:
    found = plan(MODELS["norm over all heads"](), 2)
    assert found.count("forward", "all_gather") == 1  # the logits
    assert found.shard("blocks.0.attention.q.weight").kind == "column"
    assert found.shard("blocks.0.attention.q_norm.weight").kind == "sliced"


def test_too_few_heads_are_replicated_and_reported() -> None:
    found = plan(MODELS["separate"](), 8)
    assert found.shard("blocks.0.attention.q.weight").kind == "replicated"
    assert any("fewer units than 8 ranks" in r.reason for r in found.replicated)
    assert found.shard("blocks.0.mlp.up.weight").kind == "column"


def test_state_dict_round_trip_to_another_world_size() -> None:
    model = randomised(MODELS["grouped, few kv heads"]())
    three, two = make_once(model, 3, 2)
    full = gather_state_dict(three.modules[0].plan, [m.state_dict() for m in three.modules])
    for name, value in model.state_dict().items():
        assert torch.equal(full[name], value), name
    for rank, module in enumerate(two.modules):
        part = shard_state_dict(module.plan, full, rank)
        for name, value in module.state_dict().items():
            assert torch.equal(part[name], value), name
