"""Gradient clipping by the norm of the whole model, not of one rank's shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxport.errors import FxportError
from fxport.nn.shards import shards_of
from fxport.parallel.context import ParallelContext
from fxport.parallel.plan import ParameterShard, Plan
from fxport.parallel.transport import DistributedTransport

__all__ = ["clip_grad_norm_"]


def clip_grad_norm_(
    module: nn.Module,
    max_norm: float,
    parallel_context: ParallelContext,
    norm_type: float = 2.0,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for a model divided over ranks.

    A collective (all-reduces of one number): every rank calls it, once the gradients are
    complete. Each position of each parameter counts once, on however many ranks it is held.
    Gradients that FSDP2 divides over another dimension of the mesh are summed over that, too.

    Args:
        module: from `fxport.parallelize`, of `fxport.nn`'s blocks, or a module around them (DDP).
            Parameters of other modules count as replicated, with the same gradient everywhere.
        max_norm: gradients are multiplied, in place, by ``min(1, max_norm / (norm + 1e-6))``.
        parallel_context: the one that divided the model.
        norm_type: p of the p-norm, above 0; ``float("inf")`` for the maximum.

    Returns:
        The norm before clipping, a scalar, equal on every rank; float32 (float64 when a gradient
        is).

    Raises:
        FxportError: the model was divided over another number of ranks, or a gradient is neither a
            plain tensor nor one that FSDP2 made.
    """
    with torch.no_grad():
        parts = [
            _part(p.grad, copies)
            for p, copies in _held(module, parallel_context)
            if p.grad is not None
        ]
        total = _norm(parts, parallel_context, norm_type, next(module.parameters()).device)
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for part in parts:
            part.grad.mul_(factor.to(part.grad.device, part.grad.dtype))
    return total


@dataclass(frozen=True)
class _Part:
    """What this process holds of a gradient.

    Attributes:
        copies: how many ranks hold each of its positions; broadcastable.
        groups: process groups, besides the context's, over which the gradient is divided.
    """

    grad: Tensor
    copies: Tensor | int
    groups: tuple[Any, ...] = ()


def _part(grad: Tensor, copies: Tensor | int) -> _Part:
    if type(grad) is Tensor:
        return _Part(grad, copies)
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(grad, DTensor) or any(p.is_partial() for p in grad.placements):
        raise FxportError(f"cannot clip gradients of type {type(grad).__name__}")
    mesh, placements = grad.device_mesh, grad.placements
    if isinstance(copies, Tensor):
        everywhere = copies.expand(grad.shape).contiguous()
        divided = distribute_tensor(everywhere, mesh, placements, src_data_rank=None)
        copies = divided.to_local()
    groups = tuple(mesh.get_group(d) for d, p in enumerate(placements) if p.is_shard())
    return _Part(grad.to_local(), copies, groups)


def _norm(
    parts: list[_Part], context: ParallelContext, norm_type: float, device: torch.device
) -> Tensor:
    double = any(part.grad.dtype == torch.float64 for part in parts)
    dtype = torch.float64 if double else torch.float32
    maximum = norm_type == float("inf")
    totals: dict[tuple[Any, ...], Tensor] = {(): torch.zeros((), dtype=dtype, device=device)}
    for part in parts:
        total = totals.setdefault(part.groups, torch.zeros_like(totals[()]))
        if maximum:
            if part.grad.numel():
                torch.maximum(total, part.grad.abs().amax().to(total), out=total)
        else:
            powers = part.grad.to(dtype).abs().pow(norm_type)
            total += (powers / part.copies).sum().to(total)
    result = totals.pop(())
    for groups, total in totals.items():
        for group in groups:
            total = DistributedTransport(group).all_reduce(total, maximum)
        result = torch.maximum(result, total) if maximum else result + total
    result = context.transport.all_reduce(result, maximum)
    return result if maximum else result.pow(1 / norm_type)


def _held(module: nn.Module, context: ParallelContext) -> list[tuple[nn.Parameter, Tensor | int]]:
    """Every parameter once, with how many ranks hold each of its positions (broadcastable)."""
    copies: dict[int, Tensor | int] = {}
    named = dict(module.named_parameters(remove_duplicate=False))
    for name, (shard, divided) in shards_of(module).items():
        _check(divided.world_size, context)
        copies[id(named[name])] = shard.replicas
    for part in module.modules():
        plan = getattr(part, "plan", None)
        if isinstance(plan, Plan):
            _check(plan.world_size, context)
            for record in plan.parameters:
                parameter = part.get_parameter(record.name)
                copies[id(parameter)] = _copies(record, context.rank, parameter.device)
    return [(p, copies.get(id(p), context.world_size)) for p in module.parameters()]


def _check(world_size: int, context: ParallelContext) -> None:
    if world_size != context.world_size:
        raise FxportError(
            f"the model is divided over {world_size} ranks, the context has {context.world_size}"
        )


def _copies(shard: ParameterShard, rank: int, device: torch.device) -> Tensor:
    """For each position that `rank` holds: how many ranks hold it."""
    total = torch.zeros([1] * len(shard.shape), device=device)
    for other in shard.indices:
        shared = torch.ones_like(total)
        for dim, theirs in enumerate(other):
            if theirs is None:
                continue
            own = shard.indices[rank][dim]
            held = [*range(shard.shape[dim])] if own is None else own
            positions, others = (torch.tensor(i, dtype=torch.int64) for i in (held, theirs))
            along = torch.isin(positions, others).to(shared)
            shape = [1] * len(shard.shape)
            shape[dim] = -1
            shared = shared * along.view(shape)
        total = total + shared
    return total
