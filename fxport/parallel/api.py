"""`plan`, `parallelize`, and state dicts between one rank and many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from fxport.errors import FxportError
from fxport.parallel.context import ParallelContext
from fxport.parallel.plan import Plan

__all__ = ["gather_state_dict", "parallelize", "plan", "shard_state_dict"]


def plan(model: nn.Module, world_size: int) -> Plan:
    """How `model` would be divided over `world_size` ranks.

    Raises:
        PortError: the model cannot be captured.
    """
    from fxport.passes.tensor_parallel.build import divide, prepare

    return divide(prepare(model), ParallelContext(0, world_size)).plan


def parallelize(model: nn.Module, ctx: ParallelContext) -> fx.GraphModule:
    """This rank's part of `model`, trainable; ``module.plan`` says how it was divided.

    Parameters are copies of this
    rank's shards under their original qualified names; call it with the token ids ``[B, T]``.

    Raises:
        PortError: the model cannot be captured.
        FxportError: the model computes something else in training mode and is in that mode
            (dropout), or the emitted graph did not pass the independent check.
    """
    from fxport.parallel.modes import training_differs
    from fxport.passes.tensor_parallel.build import divide, prepare, rank_module
    from fxport.passes.tensor_parallel.checker import check

    differs = training_differs(model) if model.training else None
    if differs is not None:
        raise FxportError(
            f"{differs} in training mode, which a sharded model does not do yet. "
            "Set dropout to 0, or call model.eval() first"
        )
    divided = divide(prepare(model), ctx)
    module = rank_module(divided)
    found = check(module, divided.plan, ctx.rank)
    if found:
        raise FxportError("the division is wrong, nothing was emitted:\n" + "\n".join(found))
    module.plan = divided.plan  # type: ignore[assignment]  # no tensor, no module
    return module


def gather_state_dict(plan: Plan, shards: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The full state dict from every rank's, in rank order; exact inverse of `shard_state_dict`.

    Raises:
        FxportError: a rank is missing, or a shard has another shape than the plan says.
    """
    if len(shards) != plan.world_size:
        raise FxportError(f"{len(shards)} state dicts for {plan.world_size} ranks")
    result = dict(shards[0])
    for shard in plan.parameters:
        full = torch.empty(shard.shape, dtype=shards[0][shard.name].dtype)
        for rank, state in enumerate(shards):
            part = state[shard.name]
            if tuple(part.shape) != shard.local_shape(rank):
                raise FxportError(
                    f"{shard.name} on rank {rank}: {tuple(part.shape)}, not "
                    f"{shard.local_shape(rank)}"
                )
            grid = [
                torch.arange(n) if index is None else torch.tensor(index)
                for n, index in zip(shard.shape, shard.indices[rank], strict=True)
            ]
            full[torch.meshgrid(*grid, indexing="ij")] = part.detach().to(full.device)
        for name, value in shards[0].items():
            if value is shards[0][shard.name] or _same(value, shards[0][shard.name]):
                result[name] = full
    return result


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.numel() > 0


def shard_state_dict(plan: Plan, state: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A rank's part of a full state dict; tied names are cut like the first of them."""
    from fxport.passes.tensor_parallel.boxes import select

    result = dict(state)
    for shard in plan.parameters:
        value = state[shard.name]
        part = select(value, shard.indices[rank])
        for name, other in state.items():
            if name == shard.name or _same(other, value):
                result[name] = part
    return result
