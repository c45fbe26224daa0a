"""Collectives with their conjugate in backward, as in Megatron-LM (Shoeybi et al., 2019, 3).

| function        | forward                    | backward                   |
| copy_to         | identity                   | all-reduce of the gradient |
| reduce_from     | all-reduce (sum)           | identity                   |
| reduce_both     | all-reduce (sum)           | all-reduce of the gradient |
| gather_from     | concatenate along `dim`    | this rank's slice          |
| scatter_to      | this rank's slice of `dim` | concatenate                |
| maximum_over    | all-reduce (max)           | none                       |

Which pair is right depends on what follows. ``reduce_from`` is for a sum that every rank then
uses **in the same way**: its gradient is the same everywhere. ``reduce_both`` is for a sum that
each rank uses **on its own shard** (the moments of a norm over a sharded feature): each rank holds
a part of the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxport.errors import FxportError
from fxport.parallel.context import ParallelContext

__all__ = [
    "copy_to",
    "gather_from",
    "maximum_over",
    "reduce_both",
    "reduce_from",
    "scatter_to",
]


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, context: ParallelContext) -> Tensor:
        ctx.context = context
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.context.transport.all_reduce(grad), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, context: ParallelContext) -> Tensor:
        return context.transport.all_reduce(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dim: int, context: ParallelContext) -> Tensor:
        ctx.dim, ctx.context = dim, context
        return torch.cat(context.transport.all_gather(value), dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _own_slice(grad, ctx.dim, ctx.context).contiguous(), None, None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dim: int, context: ParallelContext) -> Tensor:
        ctx.dim, ctx.context = dim, context
        return _own_slice(value, dim, context).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.cat(ctx.context.transport.all_gather(grad), ctx.dim), None, None


def _own_slice(value: Tensor, dim: int, context: ParallelContext) -> Tensor:
    size = value.shape[dim]
    if size % context.world_size:
        raise FxportError(f"{size} entries do not divide over {context.world_size} ranks")
    part = size // context.world_size
    return value.narrow(dim, context.rank * part, part)


def copy_to(value: Tensor, context: ParallelContext) -> Tensor:
    """A replicated value enters a part that each rank computes on its own shard. Any shape."""
    result: Tensor = _CopyTo.apply(value, context)
    return result


def reduce_from(value: Tensor, context: ParallelContext) -> Tensor:
    """Partial sums become the full, replicated value. Any shape."""
    result: Tensor = _ReduceFrom.apply(value, context)
    return result


def reduce_both(value: Tensor, context: ParallelContext) -> Tensor:
    """Partial sums become the full value, which each rank then uses on its own shard."""
    return copy_to(reduce_from(value, context), context)


def gather_from(value: Tensor, dim: int, context: ParallelContext) -> Tensor:
    """Equal shards ``[.., n, ..]`` become the replicated ``[.., n * world_size, ..]``."""
    result: Tensor = _GatherFrom.apply(value, dim, context)
    return result


def scatter_to(value: Tensor, dim: int, context: ParallelContext) -> Tensor:
    """This rank's contiguous shard of a replicated value.

    Raises:
        FxportError: `dim` does not divide by the number of ranks.
    """
    result: Tensor = _ScatterTo.apply(value, dim, context)
    return result


def maximum_over(value: Tensor, context: ParallelContext) -> Tensor:
    """Elementwise maximum over the ranks, without gradient (a softmax's shift needs none)."""
    with torch.no_grad():
        return context.transport.all_reduce(value, maximum=True)
