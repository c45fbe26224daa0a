"""The backward kernels for q, k, v and the ALiBi slopes. (The bias has its own: bias.py.)

Two passes, each with one owner for each number that it writes, hence without atomics and the same
bits every run: `key_kernel` goes down the rows for a block of keys (dk, dv), `query_kernel` along
the keys for a block of rows (dq). Both make the scores again from lse (Dao, arXiv:2307.08691)::

    p  = exp(s - norm)                    the weights
    dp = keep * <dout_i, v_j>            keep: 0 or 1 / (1 - dropout_p)
    ds = p * (dp - delta_i)              delta_i = <dout_i, out_i> - dlse_i, see delta_kernel
    dk_j = scale * sum_i ds' q_i         ds' = ds times the derivative of the soft cap
    dq_i = scale * sum_j ds' k_j
    dv_j = sum_i keep * p dout_i

Rows past the end, and rows that see nothing, have lse = +inf here (`norm`), so that p is zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxport.ops.triton.tiles import (
    FLOAT_BIAS,
    LOG2E,
    UNSPECIALIZED,
    bias_gradient_places,
    bias_of_head,
    bias_tile,
    columns_of_rows,
    interval_of_row,
    keep_tile,
    place_of_program,
    rows_of_columns,
    score_tile,
    store_bias_gradient,
)

__all__ = ["delta_kernel", "key_kernel", "query_kernel", "weight_tile"]


@triton.jit
def delta_kernel(
    out_desc, grad_desc, lse_ptr, grad_lse_ptr, norm_ptr, delta_ptr, heads, rows, line,
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, LSE_GRAD: tl.constexpr, LOG2: tl.constexpr,
):  # fmt: skip
    """One number each per row, in lines of `line` numbers (BLOCK_M divides it).

    delta: sum over d of out * grad_out, minus lse's own gradient; 0 beyond the last row.
    norm: lse in the units of the scores (LOG2: those of log 2); +inf for a row without weights and
    beyond the last row.

    The loads go through descriptors so that the order of the sum over d is that of the tile: with
    pointers, the strides would decide which thread holds what, and with it the last bits.
    """
    blocks = line // BLOCK_M
    batch = tl.program_id(0) // blocks // heads
    head = tl.program_id(0) // blocks % heads
    row = tl.program_id(0) % blocks * BLOCK_M
    out = out_desc.load([batch, head, row, 0]).reshape(BLOCK_M, BLOCK_DV)
    grad = grad_desc.load([batch, head, row, 0]).reshape(BLOCK_M, BLOCK_DV)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    i = row + tl.arange(0, BLOCK_M)
    entry = batch.to(tl.int64) * heads + head
    given = entry * rows + i
    norm = tl.load(lse_ptr + given, mask=i < rows, other=float("inf"))
    norm = tl.where(norm == float("-inf"), float("inf"), norm)
    if LOG2:
        norm *= LOG2E
    if LSE_GRAD:
        delta -= tl.load(grad_lse_ptr + given, mask=i < rows, other=0.0)
    made = entry * line + i
    tl.store(norm_ptr + made, norm)
    tl.store(delta_ptr + made, delta)


@triton.jit
def weight_tile(
    qk, norm, rest, bias, i, j, low_i, high_i, scale, softcap, slope, q_offset,
    MASKED: tl.constexpr, PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """The weights p of a tile, and the tanh of its soft cap. `rest`: see `exact_norm_kernel`."""
    if PLAIN:
        tanh = qk
        p = tl.exp2(qk * scale - norm)
    else:
        s, tanh = score_tile(qk, bias, i, j, scale, softcap, slope, q_offset, SOFTCAP, ALIBI, BIAS)
        if FLOAT_BIAS & BIAS:
            # one multiply-add; p <= 1, whatever the rounding
            s = tl.minimum((s - norm) * LOG2E - rest, 0.0)
        else:
            s -= norm
        p = tl.exp2(s)
    if MASKED:
        p = tl.where((j >= low_i) & (j < high_i), p, 0.0)
    return p, tanh


@triton.jit
def _down_the_rows(
    dk, dv, dbias, k, v, q_desc, grad_desc, norm_desc, rest_desc, delta_desc,
    batch, head, heads, global_head, column, j, begin, count, left, right_begin,
    rows, columns, low, high, first_ptr, end_ptr,
    scale, softcap, slope, q_offset, bias_ptr, bias_b, bias_h, bias_stride_i, bias_stride_j,
    seed, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, PACKED: tl.constexpr,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, BIAS_GRAD: tl.constexpr, OF_K: tl.constexpr, OF_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds `count` blocks of rows to dk, dv and dbias. Tiles are transposed: [keys, rows]."""
    for step in tl.range(0, count):
        block = begin + step
        if MASKED:
            block = tl.where(step < left, block, right_begin + step - left)
        row = block * BLOCK_M
        i = row + tl.arange(0, BLOCK_M)
        q = q_desc.load([batch, head, row, 0]).reshape(BLOCK_M, BLOCK_D)
        qk = tl.dot(k, q.T, input_precision=PRECISION)
        norm = norm_desc.load([batch * heads + head, row]).reshape(BLOCK_M)
        rest = norm
        if FLOAT_BIAS & BIAS:
            rest = rest_desc.load([batch * heads + head, row]).reshape(BLOCK_M)
        if MASKED:
            low_i, high_i = interval_of_row(
                i, rows, columns, low, high, first_ptr, end_ptr, HAS_LOW, HAS_HIGH, PACKED
            )
        else:
            low_i, high_i = i, i
        bias = bias_tile(
            bias_ptr, bias_b, bias_h, row, column, i[None, :], j[:, None],
            bias_stride_i, bias_stride_j, rows, columns, BLOCK_M, BLOCK_N, BIAS, True,
        )  # fmt: skip
        p, tanh = weight_tile(
            qk, norm[None, :], rest[None, :], bias, i[None, :], j[:, None],
            low_i[None, :], high_i[None, :], scale, softcap, slope, q_offset,
            MASKED, PLAIN, SOFTCAP, ALIBI, BIAS,
        )  # fmt: skip
        grad = grad_desc.load([batch, head, row, 0]).reshape(BLOCK_M, BLOCK_DV)
        kept = p
        if DROPOUT:
            keep = keep_tile(seed, batch, global_head, i, column, threshold, BLOCK_N, True)
            kept = tl.where(keep, p, 0.0)  # keep_scale: once, at the end
        if OF_V:
            dv = tl.dot(kept.to(grad.dtype), grad, dv, input_precision=PRECISION)
        if OF_K:
            dp = tl.dot(v, grad.T, input_precision=PRECISION)
            if DROPOUT:
                dp = tl.where(keep, dp * keep_scale, 0.0)
            delta = delta_desc.load([batch * heads + head, row]).reshape(BLOCK_M)
            ds = p * (dp - delta[None, :])
            if BIAS_GRAD:
                dbias += tl.sum(ds, 1)
            if SOFTCAP:
                ds *= 1.0 - tanh * tanh
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, dbias


@triton.jit(do_not_specialize=UNSPECIALIZED)
def key_kernel(
    q_desc, k_desc, v_desc, grad_desc, norm_desc, rest_desc, delta_desc, dk_ptr, dv_ptr, dbias_ptr,
    bias_ptr, slopes_ptr, seed_ptr, first_ptr, end_ptr,
    dk_stride_s, dk_stride_b, dk_stride_h, dk_stride_t,
    dv_stride_s, dv_stride_b, dv_stride_h, dv_stride_t,
    bias_stride_b, bias_stride_h, bias_stride_i, bias_stride_j,
    kv_heads, group, group_part, rows, columns, section, size, v_size, low, high, q_offset,
    head_offset, scale, grad_scale, softcap, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, PACKED: tl.constexpr,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, BIAS_GRAD: tl.constexpr, OF_K: tl.constexpr, OF_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (OF_K), dv (OF_V). Grid (blocks of keys * batch * kv_heads, parts of the group of heads).

    Each program sums over `group_part` query heads of its key head; with several parts the caller
    adds them up. No mask for keys past the end: they only reach rows of dk and dv not written.

    With BIAS_GRAD also the gradient of a bias that is the same in all rows, as one line ``[B, Hq,
    Tk]`` that the caller reduces.
    """
    blocks = tl.cdiv(columns, BLOCK_N)
    lines = tl.num_programs(0) // blocks
    line, block = place_of_program(tl.program_id(0), blocks, lines, section)
    batch = line // kv_heads
    kv_head = line % kv_heads
    column = block * BLOCK_N
    part = tl.program_id(1)
    heads = kv_heads * group
    j = column + tl.arange(0, BLOCK_N)
    begin, full_begin, full_end, end = rows_of_columns(
        column, rows, columns, low, high, first_ptr, end_ptr, BLOCK_M, BLOCK_N,
        HAS_LOW, HAS_HIGH, PACKED,
    )  # fmt: skip
    k = k_desc.load([batch, kv_head, column, 0]).reshape(BLOCK_N, BLOCK_D)
    v = v_desc.load([batch, kv_head, column, 0]).reshape(BLOCK_N, BLOCK_DV) if OF_K else k
    seed = tl.load(seed_ptr) if DROPOUT else 0
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, group_part):
        head = kv_head * group + part * group_part + member
        slope = tl.load(slopes_ptr + head).to(tl.float32) if ALIBI else 0.0
        bias, bias_b, bias_h = bias_ptr, batch, head
        if BIAS:
            bias, bias_b, bias_h = bias_of_head(
                bias_ptr, batch, head, bias_stride_b, bias_stride_h, BIAS
            )
        dbias = tl.zeros([BLOCK_N], tl.float32)
        dk, dv, dbias = _down_the_rows(
            dk, dv, dbias, k, v, q_desc, grad_desc, norm_desc, rest_desc, delta_desc,
            batch, head, heads, head + head_offset, column, j,
            full_begin, full_end - full_begin, 0, 0,
            rows, columns, low, high, first_ptr, end_ptr, scale, softcap, slope, q_offset,
            bias, bias_b, bias_h, bias_stride_i, bias_stride_j, seed, threshold, keep_scale,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, HAS_LOW, HAS_HIGH, PACKED,
            PLAIN, SOFTCAP, ALIBI, BIAS, DROPOUT, BIAS_GRAD, OF_K, OF_V, PRECISION,
        )  # fmt: skip
        if HAS_LOW or HAS_HIGH or PACKED:
            left = full_begin - begin
            dk, dv, dbias = _down_the_rows(
                dk, dv, dbias, k, v, q_desc, grad_desc, norm_desc, rest_desc, delta_desc,
                batch, head, heads, head + head_offset, column, j,
                begin, left + end - full_end, left, full_end,
                rows, columns, low, high, first_ptr, end_ptr, scale, softcap, slope, q_offset,
                bias, bias_b, bias_h, bias_stride_i, bias_stride_j, seed, threshold, keep_scale,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_LOW, HAS_HIGH, PACKED,
                PLAIN, SOFTCAP, ALIBI, BIAS, DROPOUT, BIAS_GRAD, OF_K, OF_V, PRECISION,
            )  # fmt: skip
        if BIAS_GRAD:
            at = (batch * heads + head).to(tl.int64) * columns + j
            tl.store(dbias_ptr + at, dbias, mask=j < columns)

    j64 = j.to(tl.int64)[:, None]
    if OF_K:
        d = tl.arange(0, BLOCK_D)[None, :]
        dk_ptr += part.to(tl.int64) * dk_stride_s + batch.to(tl.int64) * dk_stride_b
        dk_ptr += kv_head.to(tl.int64) * dk_stride_h
        tl.store(
            dk_ptr + j64 * dk_stride_t + d,
            (dk * grad_scale).to(dk_ptr.dtype.element_ty),
            mask=(j64 < columns) & (d < size),
        )
    if OF_V:
        if DROPOUT:
            dv *= keep_scale
        d = tl.arange(0, BLOCK_DV)[None, :]
        dv_ptr += part.to(tl.int64) * dv_stride_s + batch.to(tl.int64) * dv_stride_b
        dv_ptr += kv_head.to(tl.int64) * dv_stride_h
        tl.store(
            dv_ptr + j64 * dv_stride_t + d,
            dv.to(dv_ptr.dtype.element_ty),
            mask=(j64 < columns) & (d < v_size),
        )


@triton.jit
def _along_the_keys(
    dq, dslope, q, grad, norm, rest, delta, k_desc, v_desc, batch, head, heads, kv_head,
    global_head, dbias_b, row, i, low_i, high_i, begin, count, left, right_begin, rows, columns,
    scale, softcap, slope, q_offset, bias_ptr, bias_b, bias_h, bias_stride_i, bias_stride_j,
    seed, threshold, keep_scale, dbias_ptr, dbias_desc,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr, PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, SLOPE_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr,
    GRAD_TILES: tl.constexpr, GRAD_ADDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds `count` blocks of keys to dq (and to each row's part of the slope's gradient).

    BIAS_GRAD: writes the bias' gradient; GRAD_ADDS: added to what is there.
    """
    for step in tl.range(0, count):
        block = begin + step
        if MASKED:
            block = tl.where(step < left, block, right_begin + step - left)
        column = block * BLOCK_N
        j = column + tl.arange(0, BLOCK_N)
        k = k_desc.load([batch, kv_head, column, 0]).reshape(BLOCK_N, BLOCK_D)
        v = v_desc.load([batch, kv_head, column, 0]).reshape(BLOCK_N, BLOCK_DV)
        if GRAD_ADDS:  # asked for first: it is there when the products are
            places, inside = bias_gradient_places(
                dbias_ptr, dbias_b, head, heads, row, column, rows, columns,
                BLOCK_M, BLOCK_N, GRAD_TILES,
            )  # fmt: skip
            before = tl.load(places, mask=inside, other=0.0)
        qk = tl.dot(q, k.T, input_precision=PRECISION)
        dp = tl.dot(grad, v.T, input_precision=PRECISION)
        bias = bias_tile(
            bias_ptr, bias_b, bias_h, row, column, i[:, None], j[None, :],
            bias_stride_i, bias_stride_j, rows, columns, BLOCK_M, BLOCK_N, BIAS, False,
        )  # fmt: skip
        p, tanh = weight_tile(
            qk, norm[:, None], rest[:, None], bias, i[:, None], j[None, :],
            low_i[:, None], high_i[:, None], scale, softcap, slope, q_offset,
            MASKED, PLAIN, SOFTCAP, ALIBI, BIAS,
        )  # fmt: skip
        if DROPOUT:
            keep = keep_tile(seed, batch, global_head, i, column, threshold, BLOCK_N, False)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if SLOPE_GRAD:
            dslope += tl.sum(ds * (j[None, :] - (i + q_offset)[:, None]).to(tl.float32), 1)
        if BIAS_GRAD:
            written = ds
            if GRAD_ADDS:
                written += before.to(tl.float32)
            store_bias_gradient(
                dbias_ptr, dbias_desc, dbias_b, head, heads, row, column, rows, columns, written,
                BLOCK_M, BLOCK_N, GRAD_TILES,
            )  # fmt: skip
        if SOFTCAP:
            ds *= 1.0 - tanh * tanh
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, dslope


@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_kernel(
    q_desc, k_desc, v_desc, grad_desc, norm_desc, rest_desc, delta_desc, dq_ptr, dslope_ptr,
    dbias_ptr, dbias_desc, bias_ptr, slopes_ptr, seed_ptr, first_ptr, end_ptr,
    dq_stride_b, dq_stride_h, dq_stride_t, dbias_stride_b,
    bias_stride_b, bias_stride_h, bias_stride_i, bias_stride_j,
    first_line, heads, group, rows, columns, section, size, low, high, q_offset, head_offset,
    scale, grad_scale, softcap, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, SLOPE_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr,
    GRAD_TILES: tl.constexpr, GRAD_ADDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and per row the sum over j of ds * (j - a). Grid as in forward.

    With BIAS_GRAD also the gradient of a bias of all heads and both lengths. Where all batches
    share it, each is a launch (`first_line`: its first head); those after the first add to what is
    there (GRAD_ADDS).
    """
    blocks = tl.cdiv(rows, BLOCK_M)
    lines = tl.num_programs(0) // blocks
    line, block = place_of_program(tl.program_id(0), blocks, lines, section)
    line += first_line
    batch = line // heads
    head = line % heads
    dbias_b = tl.where(dbias_stride_b == 0, 0, batch)
    kv_head = head // group
    row = (blocks - 1 - block) * BLOCK_M  # the longest first, as in forward
    i = row + tl.arange(0, BLOCK_M)
    low_i, high_i = interval_of_row(
        i, rows, columns, low, high, first_ptr, end_ptr, HAS_LOW, HAS_HIGH, PACKED
    )
    begin, full_begin, full_end, end = columns_of_rows(
        row, rows, columns, low, high, first_ptr, end_ptr, BLOCK_M, BLOCK_N,
        HAS_LOW, HAS_HIGH, PACKED,
    )  # fmt: skip
    slope = tl.load(slopes_ptr + head).to(tl.float32) if ALIBI else 0.0
    seed = tl.load(seed_ptr) if DROPOUT else 0
    if BIAS_GRAD and not GRAD_ADDS:
        for step in tl.range(0, tl.cdiv(columns, BLOCK_N) - (end - begin)):  # what no row sees
            column = tl.where(step < begin, step, step + end - begin) * BLOCK_N
            places, inside = bias_gradient_places(
                dbias_ptr, dbias_b, head, heads, row, column, rows, columns,
                BLOCK_M, BLOCK_N, GRAD_TILES,
            )  # fmt: skip
            zero = tl.zeros([BLOCK_M, BLOCK_N], dbias_ptr.dtype.element_ty)
            tl.store(places, zero, mask=inside)
    norm = norm_desc.load([line, row]).reshape(BLOCK_M)
    rest = norm
    if FLOAT_BIAS & BIAS:
        rest = rest_desc.load([line, row]).reshape(BLOCK_M)
    delta = delta_desc.load([line, row]).reshape(BLOCK_M)
    bias_b, bias_h = batch, head
    if BIAS:
        bias_ptr, bias_b, bias_h = bias_of_head(
            bias_ptr, batch, head, bias_stride_b, bias_stride_h, BIAS
        )
    q = q_desc.load([batch, head, row, 0]).reshape(BLOCK_M, BLOCK_D)
    grad = grad_desc.load([batch, head, row, 0]).reshape(BLOCK_M, BLOCK_DV)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dslope = tl.zeros([BLOCK_M], tl.float32)

    dq, dslope = _along_the_keys(
        dq, dslope, q, grad, norm, rest, delta, k_desc, v_desc, batch, head, heads, kv_head,
        head + head_offset, dbias_b, row, i, low_i, high_i,
        full_begin, full_end - full_begin, 0, 0, rows, columns,
        scale, softcap, slope, q_offset, bias_ptr, bias_b, bias_h, bias_stride_i, bias_stride_j,
        seed, threshold, keep_scale, dbias_ptr, dbias_desc,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False,
        PLAIN, SOFTCAP, ALIBI, BIAS, DROPOUT, SLOPE_GRAD, BIAS_GRAD, GRAD_TILES, GRAD_ADDS,
        PRECISION,
    )  # fmt: skip
    if HAS_LOW or HAS_HIGH or PACKED or RAGGED:
        left = full_begin - begin
        dq, dslope = _along_the_keys(
            dq, dslope, q, grad, norm, rest, delta, k_desc, v_desc, batch, head, heads, kv_head,
            head + head_offset, dbias_b, row, i, low_i, high_i,
            begin, left + end - full_end, left, full_end, rows, columns,
            scale, softcap, slope, q_offset, bias_ptr, bias_b, bias_h, bias_stride_i, bias_stride_j,
            seed, threshold, keep_scale, dbias_ptr, dbias_desc,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True,
            PLAIN, SOFTCAP, ALIBI, BIAS, DROPOUT, SLOPE_GRAD, BIAS_GRAD, GRAD_TILES, GRAD_ADDS,
            PRECISION,
        )  # fmt: skip

    d = tl.arange(0, BLOCK_D)[None, :]
    dq_ptr += batch.to(tl.int64) * dq_stride_b + head.to(tl.int64) * dq_stride_h
    tl.store(
        dq_ptr + i.to(tl.int64)[:, None] * dq_stride_t + d,
        (dq * grad_scale).to(dq_ptr.dtype.element_ty),
        mask=(i[:, None] < rows) & (d < size),
    )
    if SLOPE_GRAD:
        tl.store(dslope_ptr + line.to(tl.int64) * rows + i, dslope, mask=i < rows)
