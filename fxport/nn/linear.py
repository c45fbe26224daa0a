"""Linear layers divided over the ranks of a tensor-parallel group, as in Megatron-LM.

A column-parallel layer followed by a row-parallel one needs one all-reduce forward (after the
second) and one backward (before the first).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fxport.errors import FxportError
from fxport.nn.shards import Shard, ShardedModule
from fxport.parallel.collectives import copy_to, gather_from, reduce_from, scatter_to
from fxport.parallel.context import ParallelContext
from fxport.parallel.modules import SharedGradient

__all__ = ["ColumnParallelLinear", "RowParallelLinear"]


def _initial(out_features: int, in_features: int, bias: bool) -> tuple[Tensor, Tensor | None]:
    """Full values with `torch.nn.Linear`'s distribution and order of draws."""
    bound = 1 / math.sqrt(in_features)
    weight = torch.empty(out_features, in_features).uniform_(-bound, bound)
    return weight, torch.empty(out_features).uniform_(-bound, bound) if bias else None


class ColumnParallelLinear(ShardedModule):
    """``y = x W^T + b`` with the rows of W (the output features) divided over the ranks.

    Parameters of this rank: weight ``[out / parts, in]``, bias ``[out / parts]``; in checkpoints
    weight ``[out, in]``, bias ``[out]``. ``parts = world_size / replicas``.

    Args:
        in_features, out_features: of the whole layer.
        gather_output: give every rank the full ``[.., out]`` instead of its own part.
        replicas: this many neighbouring ranks hold the same rows, and their gradients are summed
            (key/value heads that are fewer than the ranks).
        disable_grad_reduce: do not sum the input's gradient over the ranks. For layers that share
            their input: the caller passes it through ``copy_to`` once, which costs one all-reduce
            instead of one a layer. Without that ``copy_to`` the gradient is wrong.
        parallel_context: None is one rank.

    Raises:
        FxportError: the sizes do not divide.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gather_output: bool = False,
        replicas: int = 1,
        disable_grad_reduce: bool = False,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(parallel_context)
        context = self.parallel_context
        if replicas < 1 or context.world_size % replicas or (gather_output and replicas > 1):
            raise FxportError(f"{replicas} replicas do not fit {context.world_size} ranks")
        parts = context.world_size // replicas
        if out_features % parts:
            raise FxportError(f"{out_features} output features do not divide over {parts} ranks")
        self.in_features, self.out_features = in_features, out_features
        self.gather_output, self.disable_grad_reduce = gather_output, disable_grad_reduce
        shard = Shard(0, out_features, out_features // parts, replicas)
        weight, offset = _initial(out_features, in_features, bias)
        self.add_parameter("weight", weight, shard)
        if offset is None:
            self.register_parameter("bias", None)
        else:
            self.add_parameter("bias", offset, shard)
        start, stop = shard.span(context.rank)
        self.shared = (
            SharedGradient(context, 0, range(start, stop), out_features) if replicas > 1 else None
        )

    def forward(self, value: Tensor) -> Tensor:
        """``[.., in]``, replicated -> ``[.., out / parts]``, or ``[.., out]`` when gathered."""
        weight, bias = self.weight, self.bias
        if self.shared is not None:
            weight = self.shared(weight)
            bias = None if bias is None else self.shared(bias)
        if not self.disable_grad_reduce:
            value = copy_to(value, self.parallel_context)
        result = F.linear(value, weight, bias)
        return gather_from(result, -1, self.parallel_context) if self.gather_output else result


class RowParallelLinear(ShardedModule):
    """``y = x W^T + b`` with the columns of W (the input features) divided over the ranks.

    Parameters of this rank: weight ``[out, in / world_size]``, bias ``[out]`` (replicated, added
    once, after the sum); in checkpoints weight ``[out, in]``, bias ``[out]``.

    Args:
        in_features, out_features: of the whole layer.
        input_is_parallel: x is this rank's ``[.., in / world_size]``; else the full ``[.., in]``,
            of which each rank takes its part.
        parallel_context: None is one rank.

    Raises:
        FxportError: `in_features` does not divide by the number of ranks.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        input_is_parallel: bool = True,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(parallel_context)
        ranks = self.parallel_context.world_size
        if in_features % ranks:
            raise FxportError(f"{in_features} input features do not divide over {ranks} ranks")
        self.in_features, self.out_features = in_features, out_features
        self.input_is_parallel = input_is_parallel
        weight, offset = _initial(out_features, in_features, bias)
        self.add_parameter("weight", weight, Shard(1, in_features, in_features // ranks))
        if offset is None:
            self.register_parameter("bias", None)
        else:
            self.add_parameter("bias", offset, None)

    def forward(self, value: Tensor) -> Tensor:
        """``[.., in / world_size]`` -> ``[.., out]``, replicated."""
        if not self.input_is_parallel:
            value = scatter_to(value, -1, self.parallel_context)
        result = reduce_from(F.linear(value, self.weight), self.parallel_context)
        return result if self.bias is None else result + self.bias
