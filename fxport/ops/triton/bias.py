"""What backward does for an additive bias alone: its gradient, and large scores.

The gradient is ds (see backward.py), summed over broadcast dimensions.
Only numbers of the bias's own shape are ever stored, plus, for a bias that is broadcast over rows
or columns, one line ``[B, H, Tq or Tk]`` that the caller reduces. One program owns each number, so
there are no atomics. The price is one more pass that makes the scores again: two of backward's
nine matrix products. A bias that is the same in all rows has no such price: `key_kernel` adds its
gradient up on the way.

A program adds up tiles, all at the same place in its accumulator:

* neither length broadcast: tile (rows, keys) of the bias, over the batches and heads it serves;
* broadcast over keys (SUM_KEYS): a block of rows of one (batch, head), over its blocks of keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxport.ops.triton.backward import weight_tile
from fxport.ops.triton.tiles import (
    LOG2E,
    UNSPECIALIZED,
    bias_of_head,
    bias_tile,
    columns_of_rows,
    interval_of_row,
    keep_tile,
    rows_of_columns,
    score_tile,
    store_bias_gradient,
)

__all__ = ["bias_kernel", "exact_norm_kernel"]

LARGE = tl.constexpr(256.0)  # float32 numbers of this size are 3e-5 apart: the error of a weight


@triton.jit(do_not_specialize=UNSPECIALIZED)
def exact_norm_kernel(
    q_desc, k_desc, v_desc, norm_ptr, rest_ptr,
    bias_ptr, sinks_ptr, slopes_ptr, seed_ptr, first_ptr, end_ptr,
    bias_stride_b, bias_stride_h, bias_stride_i, bias_stride_j,
    heads, group, rows, columns, line_length, low, high, q_offset, head_offset,
    scale, softcap, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, SINKS: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Splits lse where it is too large to say what the weights are: ``exp(s - norm) / 2**rest``.

    In a row whose scores are all finfo.min the weights are 1 / n each, but lse has rounded log(n)
    away. For such rows norm becomes the largest score and rest the log2 of the sum, made again from
    the scores; for all others rest is zero. Grid as in forward, over whole lines.
    """
    lines = tl.num_programs(0) // (line_length // BLOCK_M)
    line = tl.program_id(0) % lines
    batch = line // heads
    head = line % heads
    row = tl.program_id(0) // lines * BLOCK_M
    i = row + tl.arange(0, BLOCK_M)
    at = line.to(tl.int64) * line_length + i
    norm = tl.load(norm_ptr + at)
    rest = tl.zeros([BLOCK_M], tl.float32)
    large = (tl.abs(norm) > LARGE) & (norm != float("inf"))
    if tl.max(large.to(tl.int32), 0) > 0:
        low_i, high_i = interval_of_row(
            i, rows, columns, low, high, first_ptr, end_ptr, HAS_LOW, HAS_HIGH, PACKED
        )
        begin, _full_begin, _full_end, end = columns_of_rows(
            row, rows, columns, low, high, first_ptr, end_ptr, BLOCK_M, BLOCK_N,
            HAS_LOW, HAS_HIGH, PACKED,
        )  # fmt: skip
        bias_ptr, bias_b, bias_h = bias_of_head(
            bias_ptr, batch, head, bias_stride_b, bias_stride_h, BIAS
        )
        slope = tl.load(slopes_ptr + head).to(tl.float32) if ALIBI else 0.0
        sink = tl.load(sinks_ptr + head).to(tl.float32) if SINKS else float("-inf")
        peak = tl.zeros([BLOCK_M], tl.float32) + sink
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
        q = q_desc.load([batch, head, row, 0]).reshape(BLOCK_M, BLOCK_D)
        for block in tl.range(begin, end):
            column = block * BLOCK_N
            j = column + tl.arange(0, BLOCK_N)
            k = k_desc.load([batch, head // group, column, 0])
            qk = tl.dot(q, k.reshape(BLOCK_N, BLOCK_D).T, input_precision=PRECISION)
            bias = bias_tile(
                bias_ptr, bias_b, bias_h, row, column, i[:, None], j[None, :],
                bias_stride_i, bias_stride_j, rows, columns, BLOCK_M, BLOCK_N, BIAS, False,
            )  # fmt: skip
            s, _tanh = score_tile(
                qk, bias, i[:, None], j[None, :], scale, softcap, slope, q_offset,
                SOFTCAP, ALIBI, BIAS,
            )  # fmt: skip
            seen = (j[None, :] >= low_i[:, None]) & (j[None, :] < high_i[:, None])
            s = tl.where(seen, s, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(s, 1))
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            shrink = tl.exp2((peak - base) * LOG2E)
            total = total * shrink + tl.sum(tl.exp2((s - base[:, None]) * LOG2E), 1)
            peak = new_peak
        norm = tl.where(large, peak, norm)
        rest = tl.where(large, tl.log2(tl.maximum(total, 1.0)), 0.0)
    tl.store(norm_ptr + at, norm)
    tl.store(rest_ptr + at, rest)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def bias_kernel(
    q_desc, k_desc, v_desc, grad_desc, norm_ptr, rest_ptr, delta_ptr, dbias_ptr, dbias_desc,
    bias_ptr, slopes_ptr, seed_ptr, first_ptr, end_ptr,
    bias_stride_b, bias_stride_h, bias_stride_i, bias_stride_j,
    heads, group, line_length, bias_heads, served_batches, served_heads, rows, columns,
    low, high, q_offset, head_offset, scale, softcap, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    SUM_KEYS: tl.constexpr, GRAD_TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows * blocks of keys, lead), with one block of keys where they are summed.

    `lead` counts (batch, head): those of the bias, where keys are not summed (then
    `served_batches` and `served_heads` belong to each), else all.
    """
    # an axis of the bias has one entry that serves all, or one for each
    batch = tl.program_id(1) // bias_heads
    head = tl.program_id(1) % bias_heads
    key_blocks = 1 if SUM_KEYS else tl.cdiv(columns, BLOCK_N)
    row_block = tl.program_id(0) // key_blocks
    row = row_block * BLOCK_M
    column = tl.program_id(0) % key_blocks * BLOCK_N
    if SUM_KEYS:
        first, _full_first, _full_stop, stop = columns_of_rows(
            row, rows, columns, low, high, first_ptr, end_ptr, BLOCK_M, BLOCK_N,
            HAS_LOW, HAS_HIGH, PACKED,
        )  # fmt: skip
        steps = stop - first
    else:
        first, _full_first, _full_stop, stop = rows_of_columns(
            column, rows, columns, low, high, first_ptr, end_ptr, BLOCK_M, BLOCK_N,
            HAS_LOW, HAS_HIGH, PACKED,
        )  # fmt: skip
        reached = (row_block >= first) & (row_block < stop)
        steps = tl.where(reached, served_batches * served_heads, 0)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, steps):
        b, h, m, n = batch, head, row, column
        if SUM_KEYS:
            n = (first + step) * BLOCK_N
        else:
            b = batch + step // served_heads
            h = head + step % served_heads
        i = m + tl.arange(0, BLOCK_M)
        j = n + tl.arange(0, BLOCK_N)
        kv_head = h // group
        at = (b * heads + h).to(tl.int64) * line_length + i  # asked for first: nothing waits yet
        norm = tl.load(norm_ptr + at)
        rest = tl.load(rest_ptr + at)
        delta = tl.load(delta_ptr + at)
        q = q_desc.load([b, h, m, 0]).reshape(BLOCK_M, BLOCK_D)
        k = k_desc.load([b, kv_head, n, 0]).reshape(BLOCK_N, BLOCK_D)
        qk = tl.dot(q, k.T, input_precision=PRECISION)
        slope = tl.load(slopes_ptr + h).to(tl.float32) if ALIBI else 0.0
        low_i, high_i = interval_of_row(
            i, rows, columns, low, high, first_ptr, end_ptr, HAS_LOW, HAS_HIGH, PACKED
        )
        start, bias_b, bias_h = bias_of_head(bias_ptr, b, h, bias_stride_b, bias_stride_h, BIAS)
        bias = bias_tile(
            start, bias_b, bias_h, m, n, i[:, None], j[None, :],
            bias_stride_i, bias_stride_j, rows, columns, BLOCK_M, BLOCK_N, BIAS, False,
        )  # fmt: skip
        p, _tanh = weight_tile(
            qk, norm[:, None], rest[:, None], bias, i[:, None], j[None, :],
            low_i[:, None], high_i[:, None], scale, softcap, slope, q_offset,
            True, False, SOFTCAP, ALIBI, BIAS,
        )  # fmt: skip
        grad = grad_desc.load([b, h, m, 0]).reshape(BLOCK_M, BLOCK_DV)
        v = v_desc.load([b, kv_head, n, 0]).reshape(BLOCK_N, BLOCK_DV)
        dp = tl.dot(grad, v.T, input_precision=PRECISION)
        if DROPOUT:
            keep = keep_tile(seed, b, h + head_offset, i, n, threshold, BLOCK_N, False)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        total += p * (dp - delta[:, None])

    if SUM_KEYS:
        i = row + tl.arange(0, BLOCK_M)
        dbias_ptr += tl.program_id(1).to(tl.int64) * rows
        tl.store(dbias_ptr + i, tl.sum(total, 1), mask=i < rows)
    else:
        store_bias_gradient(
            dbias_ptr, dbias_desc, batch, head, bias_heads, row, column, rows, columns, total,
            BLOCK_M, BLOCK_N, GRAD_TILES,
        )  # fmt: skip
