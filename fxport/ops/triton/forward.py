"""The forward kernel: one program per (batch, query head, block of query rows).

The tiling and the running softmax follow Dao, "FlashAttention-2" (arXiv:2307.08691). A program
first takes the blocks of keys that all its rows see whole, without any mask, then the few at the
edges of the mask. Tensor descriptors (TMA) do the loads: they fill what lies past the ends with
zeros, so head sizes and lengths need not be multiples of the blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxport.ops.triton.tiles import (
    FLOAT_BIAS,
    LOG2E,
    UNSPECIALIZED,
    bias_of_head,
    bias_tile,
    columns_of_rows,
    interval_of_row,
    keep_tile,
    place_of_program,
    score_tile,
)

__all__ = ["forward_kernel"]

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    acc, total, peak, q, k_desc, v_desc, batch, kv_head, head, row, i, low_i, high_i,
    begin, count, left, right_begin,
    scale, softcap, slope, q_offset,
    bias_ptr, bias_b, bias_h, bias_stride_i, bias_stride_j, rows, columns, seed, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, LEFT_EDGE: tl.constexpr, PLAIN: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`count` blocks of keys from block `begin` on; after `left` of them go on at `right_begin`."""
    unit: tl.constexpr = LOG2E if FLOAT_BIAS & BIAS else 1.0
    for step in tl.range(0, count):
        block = begin + step
        if MASKED:
            block = tl.where(step < left, block, right_begin + step - left)
        column = block * BLOCK_N
        j = column + tl.arange(0, BLOCK_N)
        k = k_desc.load([batch, kv_head, column, 0]).reshape(BLOCK_N, BLOCK_D)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        if not PLAIN:
            bias = bias_tile(
                bias_ptr, bias_b, bias_h, row, column, i[:, None], j[None, :],
                bias_stride_i, bias_stride_j, rows, columns, BLOCK_M, BLOCK_N, BIAS, False,
            )  # fmt: skip
            s, _ = score_tile(
                s, bias, i[:, None], j[None, :], scale, softcap, slope, q_offset,
                SOFTCAP, ALIBI, BIAS,
            )  # fmt: skip
        if MASKED:
            seen = j[None, :] < high_i[:, None]
            if LEFT_EDGE:
                seen = seen & (j[None, :] >= low_i[:, None])
            s = tl.where(seen, s, float("-inf"))
        highest = tl.max(s, 1)
        if PLAIN:  # the factor is positive: the maximum may be taken before it
            highest = highest * scale
        new_peak = tl.maximum(peak, highest)
        base = new_peak
        if MASKED or BIAS:  # a row that has seen no column yet
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        # (the first form is one multiply-add)
        p = tl.exp2(s * scale - base[:, None] if PLAIN else (s - base[:, None]) * unit)
        shrink = tl.exp2((peak - base) * unit)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            keep = keep_tile(seed, batch, head, i, column, threshold, BLOCK_N, False)
            p = tl.where(keep, p, 0.0)
        acc = acc * shrink[:, None]
        v = v_desc.load([batch, kv_head, column, 0]).reshape(BLOCK_N, BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr,
    bias_ptr, sinks_ptr, slopes_ptr, seed_ptr, first_ptr, end_ptr,
    out_stride_b, out_stride_h, out_stride_t,
    bias_stride_b, bias_stride_h, bias_stride_i, bias_stride_j,
    heads, group, rows, columns, section, v_size, low, high, q_offset, head_offset,
    scale, softcap, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    SINKS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes out and lse.

    Grid (blocks of rows * batch * heads), heads fastest. `low` and `high` limit ``j - i``;
    `first_ptr` and `end_ptr` hold each packed token's segment. PLAIN: nothing but a positive scale
    happens to the scores, and `scale` then includes log2(e). RAGGED: the last block of keys is not
    full.
    """
    blocks = tl.cdiv(rows, BLOCK_M)
    lines = tl.num_programs(0) // blocks
    line, block = place_of_program(tl.program_id(0), blocks, lines, section)
    batch = line // heads
    head = line % heads
    kv_head = head // group
    # the last rows of a causal call see the most keys: they start first, so that none is left alone
    row = (blocks - 1 - block) * BLOCK_M
    i = row + tl.arange(0, BLOCK_M)
    batch64 = batch.to(tl.int64)
    head64 = head.to(tl.int64)
    low_i, high_i = interval_of_row(
        i, rows, columns, low, high, first_ptr, end_ptr, HAS_LOW, HAS_HIGH, PACKED
    )
    begin, full_begin, full_end, end = columns_of_rows(
        row, rows, columns, low, high, first_ptr, end_ptr, BLOCK_M, BLOCK_N,
        HAS_LOW, HAS_HIGH, PACKED,
    )  # fmt: skip

    slope = tl.load(slopes_ptr + head).to(tl.float32) if ALIBI else 0.0
    seed = tl.load(seed_ptr) if DROPOUT else 0
    bias_b, bias_h = batch, head
    if BIAS:
        bias_ptr, bias_b, bias_h = bias_of_head(
            bias_ptr, batch, head, bias_stride_b, bias_stride_h, BIAS
        )
    if SINKS:  # the sink is a first key with value zero
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        sink = sink if FLOAT_BIAS & BIAS else sink * LOG2E
        peak = tl.zeros([BLOCK_M], tl.float32) + sink
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
    else:
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    q = q_desc.load([batch, head, row, 0]).reshape(BLOCK_M, BLOCK_D)

    acc, total, peak = _attend(
        acc, total, peak, q, k_desc, v_desc, batch, kv_head, head + head_offset,
        row, i, low_i, high_i, full_begin, full_end - full_begin, 0, 0,
        scale, softcap, slope, q_offset,
        bias_ptr, bias_b, bias_h, bias_stride_i, bias_stride_j, rows, columns,
        seed, threshold, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, False,
        PLAIN, SOFTCAP, ALIBI, BIAS, DROPOUT, PRECISION,
    )  # fmt: skip
    if HAS_LOW or HAS_HIGH or PACKED or RAGGED:
        left = full_begin - begin
        acc, total, peak = _attend(
            acc, total, peak, q, k_desc, v_desc, batch, kv_head, head + head_offset,
            row, i, low_i, high_i, begin, left + end - full_end, left, full_end,
            scale, softcap, slope, q_offset,
            bias_ptr, bias_b, bias_h, bias_stride_i, bias_stride_j, rows, columns,
            seed, threshold, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_LOW or PACKED,
            PLAIN, SOFTCAP, ALIBI, BIAS, DROPOUT, PRECISION,
        )  # fmt: skip

    if not (FLOAT_BIAS & BIAS):
        peak *= LN2
    lse = tl.where(total == 0.0, float("-inf"), peak + tl.log(total))
    tl.store(lse_ptr + line.to(tl.int64) * rows + i, lse, mask=i < rows)
    factor = (keep_scale if DROPOUT else 1.0) / tl.where(total == 0.0, 1.0, total)
    column_v = tl.arange(0, BLOCK_DV)
    out_ptr += batch64 * out_stride_b + head64 * out_stride_h
    tl.store(
        out_ptr + i.to(tl.int64)[:, None] * out_stride_t + column_v[None, :],
        (acc * factor[:, None]).to(out_ptr.dtype.element_ty),
        mask=(i[:, None] < rows) & (column_v[None, :] < v_size),
    )
