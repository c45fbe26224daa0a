"""Collectives as modules, so that a graph can hold them together with their context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fxport.parallel.collectives import copy_to, gather_from, reduce_from
from fxport.parallel.context import ParallelContext

__all__ = ["CopyTo", "Gather", "ReduceFrom", "SharedGradient"]


class CopyTo(nn.Module):
    """Identity; sums the gradient over the ranks."""

    def __init__(self, context: ParallelContext) -> None:
        super().__init__()
        self.context = context

    def forward(self, value: Tensor) -> Tensor:
        return copy_to(value, self.context)


class ReduceFrom(nn.Module):
    """Sums over the ranks; the gradient passes."""

    def __init__(self, context: ParallelContext) -> None:
        super().__init__()
        self.context = context

    def forward(self, value: Tensor) -> Tensor:
        return reduce_from(value, self.context)


class Gather(nn.Module):
    """Concatenates shards ``[.., n_rank]`` of the last dimension; sizes may differ by rank."""

    def __init__(self, context: ParallelContext, sizes: Sequence[int]) -> None:
        super().__init__()
        self.context, self.sizes = context, tuple(sizes)

    def forward(self, value: Tensor) -> Tensor:
        widest = max(self.sizes)
        padded = torch.nn.functional.pad(value, (0, widest - value.shape[-1]))
        parts = gather_from(padded, -1, self.context).split(widest, dim=-1)
        return torch.cat([p[..., :n] for p, n in zip(parts, self.sizes, strict=True)], dim=-1)


class _SharedGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shard: Tensor, dim: int, index: Tensor, size: int, context: Any
    ) -> Tensor:
        ctx.dim, ctx.index, ctx.size, ctx.context = dim, index, size, context
        return shard.view_as(shard)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        shape = list(grad.shape)
        shape[ctx.dim] = ctx.size
        full = grad.new_zeros(shape).index_copy(ctx.dim, ctx.index, grad)
        return ctx.context.transport.all_reduce(full).index_select(ctx.dim, ctx.index), *[None] * 4


class SharedGradient(nn.Module):
    """Identity on a shard some of whose positions other ranks hold too; sums their gradients.

    Args:
        dim: the divided dimension.
        index: positions of the full dimension that this rank holds.
        size: of the full dimension.
    """

    index: Tensor

    def __init__(self, context: ParallelContext, dim: int, index: Sequence[int], size: int) -> None:
        super().__init__()
        self.context, self.dim, self.size = context, dim, size
        self.register_buffer("index", torch.tensor(index), persistent=False)

    def forward(self, shard: Tensor) -> Tensor:
        result: Tensor = _SharedGradient.apply(shard, self.dim, self.index, self.size, self.context)
        return result
