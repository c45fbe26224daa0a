"""Runs N ranks in this process and compares with the unsharded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxport.parallel.api import parallelize
from fxport.parallel.context import ParallelContext
from fxport.passes.tensor_parallel.boxes import select
from fxport.passes.tensor_parallel.build import Prepared, divide, prepare, rank_module
from fxport.passes.tensor_parallel.checker import check
from fxport.passes.tensor_parallel.checkpoints import checkpoint_again
from fxport.passes.tensor_parallel.numbers import check_numbers
from fxport.passes.tensor_parallel.origins import check_origins
from tests.parallel.models import VOCAB

STEPS, BATCH, LENGTH = 3, 2, 7


@dataclass
class Ranks:
    """The ranks of one model."""

    contexts: Sequence[ParallelContext]
    modules: list[fx.GraphModule]


@dataclass(frozen=True)
class Errors:
    """Largest difference from the unsharded model over all ranks, relative to the largest entry
    of the tensor (of a gradient: or to 0.1)."""

    output: float
    gradient: float
    where: str


def make(model: nn.Module, world_size: int) -> Ranks:
    contexts = ParallelContext.simulated(world_size)
    return Ranks(contexts, [parallelize(model, c) for c in contexts])


def make_once(model: nn.Module, *world_sizes: int, prepared: Prepared | None = None) -> list[Ranks]:
    """As `make`, from one capture; the checks of `parallelize` are made here, too."""
    prepared, result = prepared or prepare(model, own_modes=True), []
    for world_size in world_sizes:
        ranks = Ranks(ParallelContext.simulated(world_size), [])
        for context in ranks.contexts:
            divided = divide(prepared, context)
            module = rank_module(divided).train(model.training)
            found = check(module, divided.plan, context.rank)
            found += check_origins(prepared.graph.graph, module, divided.plan, context.rank)
            found += check_numbers(prepared.graph.graph, module)
            assert not found, found
            checkpoint_again(module, divided.plan)
            module.plan = divided.plan  # type: ignore[assignment]  # no tensor, no module
            ranks.modules.append(module)
        result.append(ranks)
    return result


def randomised(model: nn.Module) -> nn.Module:
    """Float64, with biases and norm weights that differ from 0 and 1."""
    torch.manual_seed(3)
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def compare(model: nn.Module, ranks: Ranks) -> Errors:
    """Outputs and every gradient after `STEPS` accumulated steps."""
    torch.manual_seed(5)
    ids = torch.randint(0, VOCAB, (STEPS, BATCH, LENGTH))
    model.zero_grad(set_to_none=True)
    weights, wanted = [], []
    for step in range(STEPS):
        y = model(ids[step])
        weights.append(torch.randn_like(y))
        (y * weights[-1]).sum().backward()
        wanted.append(y.detach())

    def work(rank: int) -> list[Tensor]:
        module, outputs = ranks.modules[rank], []
        module.zero_grad(set_to_none=True)
        for step in range(STEPS):
            y = module(ids[step])
            (y * weights[step]).sum().backward()
            outputs.append(y.detach())
        return outputs

    found = ranks.contexts[0].group.run(work)
    output = max(_error(y, w) for ys in found for y, w in zip(ys, wanted, strict=True))
    gradient, where = 0.0, ""
    full = dict(model.named_parameters())
    for shard in ranks.modules[0].plan.parameters:
        expected = full[shard.name].grad
        assert expected is not None, shard.name
        for rank, module in enumerate(ranks.modules):
            grad = module.get_parameter(shard.name).grad
            assert grad is not None, shard.name
            part = select(expected, shard.indices[rank])
            assert grad.shape == part.shape, shard.name
            if not part.numel():  # a head of another rank
                continue
            # a key bias shifts all scores of a row: its gradient is exactly 0, in floats noise
            error = float((grad - part).abs().max() / expected.abs().max().clamp(min=0.1))
            if error > gradient:
                gradient, where = error, f"{shard.name} on rank {rank}"
    return Errors(output, gradient, where)


def _error(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.abs().max())
