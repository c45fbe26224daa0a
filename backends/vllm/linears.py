"""vLLM's linear and vocabulary layers for a rank's part of a weight.

| the plan's rows or columns of a weight     | layer                                             |
| all                                        | ReplicatedLinear                                  |
| rows, one run of equal length for each rank| ColumnParallelLinear                              |
| rows, several such runs (packed gate/up)   | MergedColumnParallelLinear                        |
| rows of packed q, k, v, few kv heads       | QKVParallelLinear                                 |
| columns, one run of equal length           | RowParallelLinear                                 |
| any other rows or columns                  | Column- or RowParallelLinear, padded, filled here |

The last line is exact (the padding is zero, its outputs are cut off), but vLLM's own loaders do
not know it: quantisation, which changes what is loaded, is refused for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from fxport.errors import FxportError
from fxport.parallel.plan import ParameterShard
from fxport.passes.tensor_parallel.boxes import Box
from fxport.passes.tensor_parallel.vocabulary import padding
from fxport.serving import AttentionLayer

__all__ = [
    "AllGather",
    "AllReduce",
    "Head",
    "Linear",
    "as_rows",
    "linear_layer",
    "vocabulary_layer",
]

Rows = tuple[tuple[int, ...], ...]


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``[..., C]`` -> ``[N, C]``, of neighbouring numbers: kernels do not take columns."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


class Linear(nn.Module):
    """vLLM's linear layer over ``[..., in]``; its kernels want two dimensions.

    Attributes:
        linear: vLLM's layer, its sizes possibly padded.
        out_features: of this rank, without padding.
        boxes: what this rank reads of weight and bias; None: vLLM's loader takes its own part.
    """

    def __init__(
        self, linear: nn.Module, out_features: int, in_padding: int, boxes: dict[str, Box | None]
    ) -> None:
        super().__init__()
        self.linear = linear
        self.out_features, self.in_padding, self.boxes = out_features, in_padding, boxes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = as_rows(x)
        if self.in_padding:
            flat = F.pad(flat, (0, self.in_padding))
        y = self.linear(flat)
        if y.shape[-1] != self.out_features:
            y = y[:, : self.out_features]
        return y.reshape(*x.shape[:-1], self.out_features)


@dataclass(frozen=True)
class _Maker:
    shard: ParameterShard
    dtype: torch.dtype
    bias: bool
    rank: int
    vllm_config: VllmConfig
    prefix: str

    def make(self, layer: type, *sizes: Any) -> nn.Module:
        made: nn.Module = layer(
            *sizes,
            bias=self.bias,
            params_dtype=self.dtype,
            quant_config=self.vllm_config.quant_config,
            prefix=self.prefix,
            return_bias=False,
        )
        return made

    def refuse_quantisation(self) -> None:
        if self.vllm_config.quant_config is not None:
            raise FxportError(
                f"`{self.shard.name}` is divided in a way that vLLM's layers do not know; "
                "with quantization it is served with tensor_parallel_size=1 only"
            )


def linear_layer(
    shard: ParameterShard,
    dtype: torch.dtype,
    bias: bool,
    rank: int,
    heads: Iterable[AttentionLayer],
    vllm_config: VllmConfig,
    prefix: str,
) -> Linear:
    """The layer for this rank's part of a weight ``[out, in]``.

    Args:
        heads: geometries of the model's attentions, to know packed q, k, v.

    Raises:
        FxportError: the part is none of vLLM's, and the weights are to be quantised.
    """
    maker = _Maker(shard, dtype, bias, rank, vllm_config, prefix)
    out_features, in_features = shard.shape
    rows = _indices(shard, 0)
    columns = _indices(shard, 1)
    if rows is not None:
        return _column(maker, rows, heads)
    if columns is not None:
        return _row(maker, columns)
    made = maker.make(ReplicatedLinear, in_features, out_features)
    return Linear(made, out_features, 0, {"weight": None, "bias": None})


def _indices(shard: ParameterShard, dim: int) -> Rows | None:
    """Every rank's positions of a divided dimension; None: it is whole on every rank."""
    found = [box[dim] for box in shard.indices]
    if all(index is None for index in found):
        return None
    every = tuple(range(shard.shape[dim]))
    return tuple(every if index is None else index for index in found)


def _column(maker: _Maker, rows: Rows, heads: Iterable[AttentionLayer]) -> Linear:
    out_features, in_features = maker.shard.shape
    here = len(rows[maker.rank])
    own: dict[str, Box | None] = {"weight": None, "bias": None}
    sizes = packed_sizes(rows, out_features)
    if sizes is not None and len(sizes) == 1:
        return Linear(maker.make(ColumnParallelLinear, in_features, out_features), here, 0, own)
    if sizes is not None:
        return Linear(maker.make(MergedColumnParallelLinear, in_features, sizes), here, 0, own)
    for layer in heads:
        if layer.head_size == layer.head_size_v and _packed_heads(layer, len(rows)) == rows:
            geometry = (in_features, layer.head_size, layer.num_heads, layer.num_kv_heads)
            return Linear(maker.make(QKVParallelLinear, *geometry), here, 0, own)
    maker.refuse_quantisation()
    widest = max(map(len, rows))
    made = maker.make(ColumnParallelLinear, in_features, widest * len(rows))
    index = rows[maker.rank]
    return Linear(made, here, 0, {"weight": (index, None), "bias": (index,)})


def _row(maker: _Maker, columns: Rows) -> Linear:
    out_features, in_features = maker.shard.shape
    own: dict[str, Box | None] = {"weight": None, "bias": None}
    if packed_sizes(columns, in_features) == [in_features]:
        made = maker.make(RowParallelLinear, in_features, out_features)
        return Linear(made, out_features, 0, own)
    maker.refuse_quantisation()
    widest = max(map(len, columns))
    made = maker.make(RowParallelLinear, widest * len(columns), out_features)
    index = columns[maker.rank]
    own["weight"] = (None, index)
    return Linear(made, out_features, widest - len(index), own)


def packed_sizes(rows: Rows, size: int) -> list[int] | None:
    """Sizes of the packed parts of which every rank holds its equal, contiguous share, or None."""
    ranks = len(rows)
    starts = [
        i for i, row in enumerate(rows[0]) if i == 0 or row != rows[0][i - 1] + 1
    ] + [len(rows[0])]  # fmt: skip
    sizes = [(b - a) * ranks for a, b in itertools.pairwise(starts)]
    if sum(sizes) != size:
        return None
    offsets = list(itertools.accumulate(sizes, initial=0))
    for rank, found in enumerate(rows):
        wanted: list[int] = []
        for offset, part in zip(offsets, sizes, strict=False):
            share = part // ranks
            wanted += range(offset + rank * share, offset + (rank + 1) * share)
        if tuple(wanted) != found:
            return None
    return sizes


def _packed_heads(layer: AttentionLayer, ranks: int) -> Rows | None:
    """The rows that QKVParallelLinear gives each rank; None where it refuses the numbers."""
    heads, kv_heads, size = layer.num_heads, layer.num_kv_heads, layer.head_size
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        return None
    share, kv_share = heads // ranks, max(1, kv_heads // ranks)
    replicas = max(1, ranks // kv_heads)
    result = []
    for rank in range(ranks):
        rows = list(range(rank * share * size, (rank + 1) * share * size))
        for offset in (heads, heads + kv_heads):
            first = (offset + rank // replicas * kv_share) * size
            rows += range(first, first + kv_share * size)
        result.append(tuple(rows))
    return tuple(result)


def vocabulary_layer(
    shard: ParameterShard, dtype: torch.dtype, vllm_config: VllmConfig, prefix: str
) -> VocabParallelEmbedding:
    """The token embedding whose rows are divided as `fxport.passes...vocabulary` says."""
    size, width = shard.shape
    return VocabParallelEmbedding(
        size,
        width,
        params_dtype=dtype,
        padding_size=padding(size, len(shard.indices)),
        quant_config=vllm_config.quant_config,
        prefix=prefix,
    )


class Head(nn.Module):
    """The vocabulary projection: this rank's logits, gathered to all of them on every rank."""

    def __init__(
        self,
        shard: ParameterShard,
        dtype: torch.dtype,
        bias: bool,
        tied: VocabParallelEmbedding | None,
        vllm_config: VllmConfig,
        prefix: str,
    ) -> None:
        super().__init__()
        self.size, width = shard.shape
        self.lm_head = ParallelLMHead(
            self.size,
            width,
            bias=bias,
            params_dtype=dtype,
            padding_size=padding(self.size, len(shard.indices)),
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )
        if tied is not None:
            self.lm_head = self.lm_head.tie_weights(tied)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., C]`` -> ``[..., V]``"""
        flat = as_rows(x)
        logits = self.lm_head.quant_method.apply(self.lm_head, flat, bias=self.lm_head.bias)
        logits = tensor_model_parallel_all_gather(logits)[:, : self.size]
        return logits.reshape(*x.shape[:-1], self.size)


class AllReduce(nn.Module):
    """The sum over vLLM's tensor-parallel ranks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return tensor_model_parallel_all_reduce(x)


class AllGather(nn.Module):
    """Concatenates the ranks' last dimensions, whose sizes may differ."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        widest = max(self.sizes)
        whole = tensor_model_parallel_all_gather(F.pad(x, (0, widest - x.shape[-1])))
        parts = whole.split(widest, dim=-1)
        return torch.cat([p[..., :n] for p, n in zip(parts, self.sizes, strict=True)], dim=-1)
