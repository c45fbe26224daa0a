"""An embedding table whose vocabulary is divided over the ranks; also the output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxport.nn.shards import Shard, ShardedModule
from fxport.parallel.collectives import copy_to, gather_from, reduce_from
from fxport.parallel.context import ParallelContext

__all__ = ["VocabParallelEmbedding"]


class VocabParallelEmbedding(ShardedModule):
    """A table ``[V, C]``; each rank holds ``ceil(V / world_size)`` rows, the last ones padded.

    Padding rows are zero, get no gradient, and are neither saved nor loaded. Called, it looks up
    tokens; `logits` uses the same table as the output projection (weight tying: use one module
    for both, or assign ``head.weight = embedding.weight``).

    Args:
        num_embeddings: V, any number.
        embedding_dim: C.
        std: of the normal distribution that the table is drawn from.
        parallel_context: None is one rank.
    """

    weight: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        std: float = 1.0,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(parallel_context)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        part = -(-num_embeddings // self.parallel_context.world_size)
        table = torch.empty(num_embeddings, embedding_dim).normal_(std=std)
        self.add_parameter("weight", table, Shard(0, num_embeddings, part))

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 or int32 ``[..]`` -> ``[.., C]``, replicated."""
        context = self.parallel_context
        if context.world_size == 1:
            return F.embedding(input_ids, self.weight)
        start, stop = self.shards["weight"].span(context.rank)
        here = (input_ids >= start) & (input_ids < stop)
        found = F.embedding((input_ids - start).where(here, 0), self.weight)
        return reduce_from(found * here[..., None].to(found.dtype), context)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[.., C]``, replicated -> ``[.., V]``, replicated."""
        context = self.parallel_context
        own = F.linear(copy_to(hidden, context), self.weight)
        return gather_from(own, -1, context)[..., : self.num_embeddings]
