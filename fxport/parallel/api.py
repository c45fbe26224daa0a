"""`plan`, `parallelize`, and state dicts between one rank and many."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from fxport.errors import FxportError, PortError
from fxport.parallel.context import ParallelContext
from fxport.parallel.dropout import EvalOnly
from fxport.parallel.plan import Plan
from fxport.parallel.sizes import Smallest, limit_sizes

if TYPE_CHECKING:
    from fxport.passes.tensor_parallel.build import Prepared

__all__ = ["gather_state_dict", "parallelize", "parallelize_all", "plan", "shard_state_dict"]


def plan(model: nn.Module, world_size: int) -> Plan:
    """How `model` would be divided over `world_size` ranks.

    Raises:
        PortError: the model cannot be captured.
    """
    from fxport.capture.clone import uncompiled
    from fxport.parallel.drawing import drawn
    from fxport.passes.tensor_parallel.build import divide, prepare

    divided = divide(prepare(uncompiled(model)), ParallelContext(0, world_size))
    return dataclasses.replace(divided.plan, _draw=functools.partial(drawn, divided))


def parallelize(model: nn.Module, ctx: ParallelContext) -> fx.GraphModule:
    """This rank's part of `model`, trainable; ``module.plan`` says how it was divided.

    Parameters are copies of this rank's shards under their original qualified names; call it with
    the token ids ``[B, T]``. It is in the mode, training or eval, that the model is in. Dropout
    keeps the same elements for any number of ranks; its seed comes from torch's default generator
    on the CPU. What forward runs under `torch.utils.checkpoint` is computed again in backward.

    It raises `FxportError` for sizes of ``[B, T]`` that its graph was not shown to hold for: one
    row or one token where forward treats them otherwise, more tokens than were looked at.

    Beside FSDP2 or DDP, wrap the result as a whole: ``fully_shard(module, mesh=mesh["data"])``.

    Raises:
        PortError: the model cannot be captured, or a graph of it would have other gradients (a
            `torch.autograd.Function`, hooks on gradients).
        FxportError: the model does more in training mode than dropout and is in that mode, it
            chooses what a checkpoint keeps, or the emitted graph did not pass the independent
            check.
    """
    return parallelize_all(model, [ctx])[0]


def parallelize_all(model: nn.Module, contexts: Sequence[ParallelContext]) -> list[fx.GraphModule]:
    """`parallelize` for several ranks, or numbers of ranks, from one capture of the model.

    For `ParallelContext.simulated`, where one process holds every rank.

    Raises:
        As `parallelize`.
    """
    from fxport.capture.clone import uncompiled
    from fxport.parallel.modes import in_eval_mode, in_training_mode
    from fxport.parallel.ones import smallest_sizes
    from fxport.passes.tensor_parallel.build import prepare
    from fxport.passes.tensor_parallel.checkpoints import require_plain_checkpoints

    model = uncompiled(model)
    prepared = prepare(model, own_modes=True)
    if prepared.captured.untrainable:
        raise PortError(prepared.captured.untrainable)
    require_plain_checkpoints(prepared.graph.graph)
    differs = _training_differs(model, prepared)
    evaluating = prepared if differs is None else _evaluating(model, prepared)
    used = [in_eval_mode(model)]
    if model.training or differs is None:  # else it may be used in eval mode alone
        used.append(in_training_mode(model))
    smallest = smallest_sizes(used, evaluating)
    if model.training and differs is not None:
        _require_dropout_only(prepared, evaluating, differs)
    modules = [_divided(prepared, ctx, smallest) for ctx in contexts]
    for module in modules:
        if not model.training and differs is not None:
            module.add_module("eval_only", EvalOnly(differs))
        module.train(model.training)
    return modules


def _divided(prepared: Prepared, ctx: ParallelContext, smallest: Smallest) -> fx.GraphModule:
    """One rank's module, looked at by the checker."""
    from fxport.passes.tensor_parallel.build import divide, rank_module
    from fxport.passes.tensor_parallel.checker import check
    from fxport.passes.tensor_parallel.checkpoints import checkpoint_again
    from fxport.passes.tensor_parallel.numbers import check_numbers, check_values
    from fxport.passes.tensor_parallel.origins import check_origins

    divided = divide(prepared, ctx)
    module = rank_module(divided)
    found = check(module, divided.plan, ctx.rank)
    found += check_origins(prepared.graph.graph, module, divided.plan, ctx.rank)
    found += check_numbers(prepared.graph.graph, module)
    found += check_values(prepared.captured.parameters, module, divided.plan, ctx.rank)
    if found:
        raise FxportError("the division is wrong, nothing was emitted:\n" + "\n".join(found))
    checkpoint_again(module, divided.plan)
    limit_sizes(module, prepared.captured, smallest)
    module.plan = divided.plan  # type: ignore[assignment]  # no tensor, no module
    return module


def _training_differs(model: nn.Module, prepared: Prepared) -> str | None:
    """What runs in training mode only, in words; `prepared` in the modes that the model is in."""
    from torch._subclasses.fake_tensor import DataDependentOutputException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    from fxport.parallel.modes import (
        CHECKPOINTS_DIFFER,
        in_eval_mode,
        in_training_mode,
        same_at_every_size,
    )
    from fxport.parallel.modes import training_differs as differs_at_one_length
    from fxport.passes.tensor_parallel.build import prepare
    from fxport.passes.tensor_parallel.computations import computations

    training = in_training_mode(model)
    try:
        differs = differs_at_one_length(training)
        if differs is not None:
            return differs
        modes, longest = (training, in_eval_mode(model)), prepared.captured.limit
        if all(same_at_every_size(one, longest) for one in modes):
            return None
    except (DataDependentOutputException, GuardOnDataDependentSymNode):  # experts on their tokens
        pass
    try:
        other = prepared if model.training else prepare(training, own_modes=True)
    except PortError as error:  # layers dropped by chance, say
        return f"it cannot be captured ({error.reasons[0].message})"
    graphs = other.graph.graph, _evaluating(model, prepared).graph.graph
    found = [computations(graph) for graph in graphs]
    if found[0] == found[1]:
        return None
    plain = [[call[:2] for call in calls] for calls in found]
    return CHECKPOINTS_DIFFER if plain[0] == plain[1] else "the model runs other operations"


def _evaluating(model: nn.Module, prepared: Prepared) -> Prepared:
    """As `prepared`, with every module in eval mode."""
    from fxport.passes.tensor_parallel.build import prepare

    return prepare(model) if any(m.training for m in model.modules()) else prepared


def _require_dropout_only(training: Prepared, evaluating: Prepared, differs: str) -> None:
    """The module can be put into eval mode later: all but dropout must be alike there."""
    from fxport.passes.tensor_parallel.computations import computations

    graphs = training.graph.graph, evaluating.graph.graph
    one, other = (computations(graph, random=False) for graph in graphs)
    if one != other:
        raise FxportError(
            f"{differs} in training mode, and more than dropout is different there: "
            "a divided model has one graph for both modes. Call model.eval() first"
        )


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
                torch.arange(n) if index is None else torch.tensor(index, dtype=torch.int64)
                for n, index in zip(shard.shape, shard.indices[rank], strict=True)
            ]
            # one number has no dimension, and `meshgrid` wants one
            places = torch.meshgrid(*grid, indexing="ij") if grid else ()
            full[places] = part.detach().to(full.device)
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
