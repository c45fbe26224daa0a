"""One attention call cut into tiles: the pieces that the blocked forward and backward share.

Inside, query heads that share a kv head are folded into the rows, so that one batched product
serves them and k and v are never repeated: with N = B * Hkv and G = Hq / Hkv, a query block is
``[N, G * rows, D]``, a key block ``[N, columns, D]``, a tile of scores ``[N, G * rows, columns]``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fxport.ops.band import band_of
from fxport.ops.dropout import keep_mask, keep_scale
from fxport.ops.layout import in_heads_layout
from fxport.ops.params import AttentionParams

__all__ = ["Scores", "Tiles", "block_length"]

_TILE_ELEMENTS = 2**18  # of all heads together: 1 MiB in float32, so that passes over it hit cache
_SHORTEST_BLOCK, _LONGEST_BLOCK = 64, 256


def block_length(heads: int) -> int:
    """Rows (and columns) of a tile when `heads` = B * Hq tiles are worked on at once."""
    side = math.isqrt(max(1, _TILE_ELEMENTS // max(1, heads)))
    return min(_LONGEST_BLOCK, max(_SHORTEST_BLOCK, 1 << (side.bit_length() - 1)))


@dataclass(frozen=True)
class Scores:
    """A tile of scores, masked with -inf; `tanh` is set when they were capped."""

    values: Tensor
    tanh: Tensor | None


class Tiles:
    """The tensors of one call, prepared for tiling. Arguments as `fxport::attention`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        alibi_slopes: Tensor | None,
        cu_seqlens: Tensor | None,
        seed: Tensor | None,
        params: AttentionParams,
    ) -> None:
        self.compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.batch, self.q_heads, self.rows, _ = q.shape
        self.kv_heads, self.columns = k.shape[1], k.shape[2]
        self.groups = self.q_heads // self.kv_heads
        self.params = params
        self.band = band_of(params, self.rows, self.columns)
        self.block = block_length(self.batch * self.q_heads)
        self.borders = [0, self.rows] if cu_seqlens is None else cu_seqlens.tolist()
        self.packed = cu_seqlens is not None
        self.seed = seed
        self.q = q
        self.folded = self.batch * self.kv_heads
        self.keys = k.to(self.compute).reshape(self.folded, self.columns, k.shape[3])
        self.values = v.to(self.compute).reshape(self.folded, self.columns, v.shape[3])
        self.bias = None if bias is None else self._bias_by_group(bias)
        self.slopes = None
        if alibi_slopes is not None:
            slopes = alibi_slopes.to(self.compute)
            self.slopes = slopes.reshape(self.kv_heads, self.groups, 1, 1)

    # -- where the tiles lie ---------------------------------------------------------------------

    def row_blocks(self) -> Iterator[range]:
        """Ranges of rows; none crosses a segment's border, so no tile needs a segment mask."""
        for start, stop in pairwise(self.borders):
            for first in range(start, stop, self.block):
                yield range(first, min(stop, first + self.block))

    def column_blocks(self, rows: range) -> Iterator[range]:
        """The ranges of columns of which `rows` see anything."""
        seen = self.band.columns(rows, self.columns)
        if self.packed:
            segment = bisect_right(self.borders, rows.start)
            start = max(seen.start, self.borders[segment - 1])
            seen = range(start, max(start, min(seen.stop, self.borders[segment])))
        for first in range(seen.start, seen.stop, self.block):
            yield range(first, min(seen.stop, first + self.block))

    # -- folding heads ---------------------------------------------------------------------------

    def fold(self, x: Tensor, rows: range) -> Tensor:
        """``[B, Hq, Tq, size]`` -> the block ``[N, G * rows, size]`` in the compute dtype."""
        block = x[:, :, rows.start : rows.stop].to(self.compute)
        return block.reshape(self.folded, self.groups * len(rows), x.shape[3])

    def unfold(self, x: Tensor) -> Tensor:
        """``[N, G * rows, size]`` -> ``[B, Hq, rows, size]``."""
        rows = x.shape[1] // self.groups
        return x.reshape(self.batch, self.q_heads, rows, x.shape[2])

    def by_group(self, tile: Tensor) -> Tensor:
        """``[N, G * rows, columns]`` -> a view ``[B, Hkv, G, rows, columns]``."""
        rows = tile.shape[1] // self.groups
        return tile.view(self.batch, self.kv_heads, self.groups, rows, tile.shape[2])

    def per_row(self, x: Tensor, rows: range) -> Tensor:
        """One number per query head ``[Hq]`` -> ``[N, G * rows, 1]``."""
        x = x.to(self.compute)[None, :, None].expand(self.batch, -1, len(rows))
        return x.reshape(self.folded, self.groups * len(rows), 1)

    def sum_per_head(self, x: Tensor) -> Tensor:
        """``[N, G * rows, size]`` or its view by group -> ``[Hq]``."""
        return x.reshape(self.batch, self.q_heads, -1).sum((0, 2))

    # -- one tile --------------------------------------------------------------------------------

    def query(self, rows: range) -> Tensor:
        """``[N, G * rows, D]``, scaled."""
        return self.fold(self.q, rows) * self.params.scale

    def scores(self, query: Tensor, rows: range, columns: range) -> Scores:
        """The scores of a tile, everything applied, in memory of their own."""
        values = torch.bmm(query, self.keys[:, columns.start : columns.stop].mT)
        tanh = None
        if self.params.softcap > 0:
            tanh = values.div_(self.params.softcap).tanh_()
            values = tanh * self.params.softcap
        grouped = self.by_group(values)
        bias = self._bias_tile(rows, columns)
        if bias is not None and bias.dtype != torch.bool:
            grouped += bias
        if self.slopes is not None:
            grouped += self.slopes * self.distance(rows, columns)
        if bias is not None and bias.dtype == torch.bool:
            grouped.masked_fill_(~bias, -torch.inf)
        if not self.band.covers(rows, columns):
            grouped.masked_fill_(self._outside_band(rows, columns), -torch.inf)
        return Scores(values, tanh)

    def distance(self, rows: range, columns: range) -> Tensor:
        """``j - a`` in the compute dtype, ``[rows, columns]``."""
        return self._offsets(rows, columns).sub_(self.params.q_offset).to(self.compute)

    def keep(self, rows: range, columns: range) -> Tensor | None:
        """What dropout multiplies a tile of weights with: 0 or 1 / (1 - p); None without it."""
        p = self.params.dropout_p
        if p == 0:
            return None
        assert self.seed is not None
        first = self.params.head_offset
        heads = range(first, first + self.q_heads)
        kept = keep_mask(self.seed, p, range(self.batch), heads, rows, columns)
        tile = kept.reshape(self.folded, self.groups * len(rows), len(columns))
        return tile.to(self.compute).mul_(keep_scale(p))

    def _offsets(self, rows: range, columns: range) -> Tensor:
        i = torch.arange(rows.start, rows.stop, device=self.q.device)
        j = torch.arange(columns.start, columns.stop, device=self.q.device)
        return j[None, :] - i[:, None]

    def _outside_band(self, rows: range, columns: range) -> Tensor:
        offsets = self._offsets(rows, columns)
        outside = torch.zeros_like(offsets, dtype=torch.bool)
        if self.band.low is not None:
            outside |= offsets < self.band.low
        if self.band.high is not None:
            outside |= offsets > self.band.high
        return outside

    # -- bias ------------------------------------------------------------------------------------

    def _bias_by_group(self, bias: Tensor) -> Tensor:
        """A view ``[B or 1, Hkv or 1, G or 1, Tq or 1, Tk or 1]``."""
        bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
        if bias.shape[1] == self.q_heads:
            return bias.unflatten(1, (self.kv_heads, self.groups))
        return bias.unsqueeze(1)

    def _bias_tile(self, rows: range, columns: range) -> Tensor | None:
        if self.bias is None:
            return None
        tile = _cut(self.bias, rows, columns)
        return tile if tile.dtype == torch.bool else tile.to(self.compute)

    def bias_gradient(self) -> Tensor:
        """Zeros in the shape of the bias by group."""
        assert self.bias is not None
        return torch.zeros(self.bias.shape, dtype=self.compute, device=self.q.device)

    def add_bias_gradient(self, total: Tensor, grad: Tensor, rows: range, columns: range) -> None:
        """Add a tile's gradient to `total`, summed over what the bias is broadcast along."""
        target = _cut(total, rows, columns)
        grouped = self.by_group(grad)
        broadcast = [d for d in range(5) if target.shape[d] == 1 and grouped.shape[d] != 1]
        target += grouped.sum(broadcast, keepdim=True) if broadcast else grouped

    # -- results ---------------------------------------------------------------------------------

    def like_kv(self, grad: Tensor, kv: Tensor) -> Tensor:
        """``[N, Tk, size]`` -> ``[B, Hkv, Tk, size]`` in kv's dtype and the promised layout."""
        return in_heads_layout(grad.view(kv.shape).to(kv.dtype))


def _cut(bias: Tensor, rows: range, columns: range) -> Tensor:
    """A view of the part of a bias by group that a tile sees."""
    if bias.shape[3] != 1:
        bias = bias[..., rows.start : rows.stop, :]
    if bias.shape[4] != 1:
        bias = bias[..., columns.start : columns.stop]
    return bias
