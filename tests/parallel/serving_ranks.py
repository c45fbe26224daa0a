"""Runs the serving graph of a port on N simulated ranks, and on one, in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

import fxport
from fxport.parallel.context import ParallelContext
from fxport.parallel.plan import Plan
from fxport.passes.tensor_parallel.boxes import select
from fxport.passes.tensor_parallel.serving import (
    RankPart,
    RankServing,
    divide_serving,
    whole_serving,
)
from fxport.serving import ServingGraph

LENGTH = 19


@dataclass(frozen=True)
class Served:
    """A port in float64: its serving graph, values for all it reads, and token ids ``[1, N]``."""

    serving: ServingGraph
    values: Mapping[str, Tensor]
    ids: Tensor


def served(model: nn.Module) -> Served:
    """Ports a model in float64 with weights that differ from their initial symmetry."""
    torch.manual_seed(3)
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    port = fxport.port(model)
    serving = port.serving
    parameters = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    values = {**{n: parameters[n] for n in serving.parameters}, **serving.constants}
    ids = torch.randint(0, serving.vocab_size, (1, LENGTH))
    return Served(serving, values, ids)


def one_rank(case: Served) -> Tensor:
    """Logits ``[1, N, V]`` of the undivided serving graph."""
    return run(whole_serving(case.serving), case)


@dataclass(frozen=True)
class Ranks:
    parts: list[RankServing]
    plan: Plan

    def logits(self, case: Served) -> list[Tensor]:
        """Logits ``[1, N, V]`` of every rank."""
        simulator = self.parts[0].context.group
        found: list[Tensor] = simulator.run(lambda rank: run(self.parts[rank], case))
        return found


def divided(case: Served, world_size: int) -> Ranks:
    contexts = ParallelContext.simulated(world_size)
    parts = [divide_serving(case.serving, c, torch.device("cpu")) for c in contexts]
    plan = parts[0].plan
    assert plan is not None
    return Ranks(parts, plan)


@torch.no_grad()
def run(rank: RankServing, case: Served) -> Tensor:
    known = {"positions": torch.arange(LENGTH), "input_ids": case.ids}
    values = dict(case.values)
    if rank.plan is not None:
        for shard in rank.plan.parameters:
            values[shard.name] = select(values[shard.name], shard.indices[rank.context.rank])
    steps = (("embeddings", rank.embed), ("hidden", rank.body), ("logits", rank.head))
    for name, part in steps:
        known[name] = _run_part(part, known, values)
    return known["logits"]


def _run_part(part: RankPart, known: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
    root = nn.Module()
    for key, module in part.modules.items():
        root.add_module(key, module)
    gm = fx.GraphModule(root, part.part.graph)
    weights = part.part.weights
    given = [
        values[weights[n.name]] if n.name in weights else known[n.name]
        for n in part.part.graph.nodes
        if n.op == "placeholder"
    ]
    result: Tensor = gm(*given)
    return result


def error(case: Served, ranks: Ranks) -> float:
    """The largest difference of any rank's logits, relative to the largest logit."""
    wanted = one_rank(case)
    found = ranks.logits(case)
    assert all(y.shape == wanted.shape for y in found)
    return max(float((y - wanted).abs().max() / wanted.abs().max()) for y in found)
