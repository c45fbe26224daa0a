"""`fxport::attention` in plain torch, block by block: every feature, any device, any head size.

Forward keeps a running maximum and sum per row (online softmax: Milakov and Gimelshein 2018,
"Online normalizer calculation for softmax"; blocked over q and k as in FlashAttention, Dao et al.
2022). Backward recomputes the weights from lse. No tensor has two sequence lengths among its
dimensions: the largest is one tile ``[B, Hkv, G, block, block]`` with G = Hq / Hkv. Tiles that
causality, the window or the segments rule out are never computed.

Arithmetic is float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxport.ops.layout import empty_heads
from fxport.ops.params import AttentionParams
from fxport.ops.tiles import Tiles

__all__ = ["backward", "forward"]

_LARGE_LSE = 256.0  # float32 numbers of this size are 3e-5 apart: the relative error of a weight


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `fxport::attention`."""
    tiles = Tiles(q, k, v, bias, alibi_slopes, cu_seqlens, seed, params)
    batch, heads, length, _ = q.shape
    out = empty_heads(q, batch, heads, length, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=tiles.compute)
    for rows in tiles.row_blocks():
        query = tiles.query(rows)
        summed = query.new_zeros((*query.shape[:2], v.shape[3]))
        running = _Running.start(tiles, query, rows, sinks)
        for columns in tiles.column_blocks(rows):
            scores = tiles.scores(query, rows, columns).values
            weights, shrink = running.add(scores)
            keep = tiles.keep(rows, columns)
            if keep is not None:
                weights *= keep
            summed.mul_(shrink).baddbmm_(weights, tiles.values[:, columns.start : columns.stop])
        part = slice(rows.start, rows.stop)
        out[:, :, part] = tiles.unfold(summed / running.total.clamp(min=1))
        lse[:, :, part] = tiles.unfold(running.lse())[..., 0]
    return out, lse


@dataclass
class _Running:
    """The softmax of a block of rows so far.

    Attributes:
        top: ``[N, G * rows, 1]``, the largest score seen; -inf before the first.
        total: sum of ``exp(score - top)``: 0 before the first score, at least 1 after it.
    """

    top: Tensor
    total: Tensor

    @staticmethod
    def start(tiles: Tiles, query: Tensor, rows: range, sinks: Tensor | None) -> _Running:
        """Nothing seen; or the sink, which is a column that has no value."""
        if sinks is None:
            top = torch.full_like(query[..., :1], -torch.inf)
        else:
            top = tiles.per_row(sinks, rows)
        return _Running(top, (top > -torch.inf).to(top.dtype))

    def add(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in a tile of scores, and overwrites it.

        Returns the tile's ``exp(score - top)``, and what earlier weights must be multiplied with.
        """
        top = torch.maximum(self.top, scores.amax(-1, keepdim=True))
        base = top.masked_fill(top == -torch.inf, 0)  # still nothing: exp(-inf - 0) = 0
        shrink = torch.exp(self.top - base)
        weights = _exp_(scores.sub_(base))
        self.total = self.total * shrink + weights.sum(-1, keepdim=True)
        self.top = top
        return weights, shrink

    def lse(self) -> Tensor:
        """log of the sum of exp(score); -inf where nothing was seen."""
        return self.top + self.total.clamp(min=1).log()


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    params: AttentionParams,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, bias, sinks, alibi_slopes; None where `needs` is False.

    With weights p, dP = dropout(dO V^T) and delta = <dO, O> - dlse per row, the gradient of the
    scores is ``p * (dP - delta)`` (FlashAttention, appendix B; dlse enters because
    d lse / d s = p), and that of a sink, which has a weight but no value, is ``-p_sink * delta``.
    """
    tiles = Tiles(q, k, v, bias, alibi_slopes, cu_seqlens, seed, params)
    totals = _Totals.zeros(tiles, needs)
    weighed = any(needs[:4]) or needs[5]  # a sink's gradient alone needs no tile
    for rows in tiles.row_blocks():
        query, d_out = tiles.query(rows), tiles.fold(grad_out, rows)
        delta = (d_out * tiles.fold(out, rows)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta -= tiles.fold(grad_lse[..., None], rows)
        base, factor = _normaliser(tiles, query, rows, sinks, tiles.fold(lse[..., None], rows))
        block = _RowBlock(rows, query, d_out, delta, base, factor, torch.zeros_like(query))
        for columns in tiles.column_blocks(rows) if weighed else ():
            _add_tile(tiles, totals, block, columns)
        if totals.q is not None:
            totals.q[:, :, rows.start : rows.stop] = tiles.unfold(block.d_query * params.scale)
        if totals.sinks is not None and sinks is not None:
            sink_weights = torch.exp(tiles.per_row(sinks, rows) - base) * factor
            totals.sinks.sub_(tiles.sum_per_head(sink_weights * delta))
    return (
        totals.q,
        None if totals.k is None else tiles.like_kv(totals.k, k),
        None if totals.v is None else tiles.like_kv(totals.v, v),
        None if totals.bias is None or bias is None else _like(totals.bias, bias),
        None if totals.sinks is None or sinks is None else _like(totals.sinks, sinks),
        None
        if totals.slopes is None or alibi_slopes is None
        else _like(totals.slopes, alibi_slopes),
    )


@dataclass(frozen=True)
class _Totals:
    """The gradients so far, changed in place; None where not wanted."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    slopes: Tensor | None

    @staticmethod
    def zeros(tiles: Tiles, needs: tuple[bool, ...]) -> _Totals:
        need_q, need_k, need_v, need_bias, need_sinks, need_slopes = needs
        q = tiles.q
        return _Totals(
            q=empty_heads(q, *q.shape) if need_q else None,
            k=torch.zeros_like(tiles.keys) if need_k else None,
            v=torch.zeros_like(tiles.values) if need_v else None,
            bias=tiles.bias_gradient() if need_bias else None,
            sinks=q.new_zeros(q.shape[1], dtype=tiles.compute) if need_sinks else None,
            slopes=q.new_zeros(q.shape[1], dtype=tiles.compute) if need_slopes else None,
        )


@dataclass(frozen=True)
class _RowBlock:
    """A block of rows in backward, folded; ``p = exp(score - base) * factor``."""

    rows: range
    query: Tensor
    d_out: Tensor
    delta: Tensor
    base: Tensor
    factor: Tensor | float
    d_query: Tensor  # running total, without the scale


def _add_tile(tiles: Tiles, totals: _Totals, block: _RowBlock, columns: range) -> None:
    """Add what the tile of `block` and `columns` contributes to every gradient wanted."""
    part = slice(columns.start, columns.stop)
    scores = tiles.scores(block.query, block.rows, columns)
    weights = _exp_(scores.values.sub_(block.base))
    if isinstance(block.factor, Tensor):
        weights *= block.factor
    keep = tiles.keep(block.rows, columns)
    if totals.v is not None:
        kept = weights if keep is None else weights * keep
        totals.v[:, part].baddbmm_(kept.mT, block.d_out)
    if totals.q is totals.k is totals.bias is totals.slopes is None:
        return
    grad = torch.bmm(block.d_out, tiles.values[:, part].mT)
    if keep is not None:
        grad *= keep
    grad.sub_(block.delta).mul_(weights)
    if totals.bias is not None:
        tiles.add_bias_gradient(totals.bias, grad, block.rows, columns)
    if totals.slopes is not None:
        distance = tiles.distance(block.rows, columns)
        totals.slopes.add_(tiles.sum_per_head(tiles.by_group(grad) * distance))
    if scores.tanh is not None:
        grad *= 1 - scores.tanh.square_()
    if totals.q is not None:
        block.d_query.baddbmm_(grad, tiles.keys[:, part])
    if totals.k is not None:  # the query block is scaled already
        totals.k[:, part].baddbmm_(grad.mT, block.query)


def _exp_(x: Tensor) -> Tensor:
    """exp in place of scores less their maximum or lse; 0 for weights under 2**-102 (float32).

    ALiBi and wide scores have many of those. Kept, they and their products with gradients would be
    subnormal numbers, with which a matrix product is five times slower.
    """
    smallest = math.log(torch.finfo(x.dtype).tiny) + 24 * math.log(2)
    return torch.threshold_(x, smallest, -torch.inf).exp_()


def _like(total: Tensor, x: Tensor) -> Tensor:
    return total.to(x.dtype).view(x.shape)


def _normaliser(
    tiles: Tiles, query: Tensor, rows: range, sinks: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor | float]:
    """(base, factor) with ``p = exp(score - base) * factor``: normally lse and 1.

    A large lse does not determine the weights: in a row whose scores are all ``finfo.min`` they are
    1 / n each, but lse has rounded log(n) away. Such rows' maximum and sum are computed again.
    """
    if not _may_be_large(lse):
        return lse.masked_fill(lse == -torch.inf, torch.inf), 1.0  # rows that see nothing: p = 0
    running = _Running.start(tiles, query, rows, sinks)
    for columns in tiles.column_blocks(rows):
        running.add(tiles.scores(query, rows, columns).values)
    base = running.top.masked_fill(running.top == -torch.inf, torch.inf)
    return base, 1.0 / running.total.clamp(min=1)


def _may_be_large(lse: Tensor) -> bool:
    """Whether some lse has rounded much away; a CUDA graph cannot ask, and serves any values."""
    if lse.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    return bool((lse.abs().masked_fill(lse == -torch.inf, 0) > _LARGE_LSE).any())
