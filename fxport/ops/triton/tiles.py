"""What every Triton attention kernel does to one tile of scores, in either orientation.

A tile belongs to query rows ``i`` and key columns ``j``. The helpers take both as tensors that
broadcast against the tile (``i[:, None], j[None, :]`` or, in the kernel whose tiles are transposed,
``i[None, :], j[:, None]``), so that each formula is written once.

Scores are kept in units of log 2 (``exp2`` is the hardware's instruction) unless a floating bias is
given: ``finfo.min``, a common way to write "masked", overflows when multiplied by log2(e), so those
kernels keep natural units and multiply the difference ``s - max`` instead.

Each row sees one interval of columns, ``low_i <= j < high_i``: causality, windows, packed segments
and the end of k are all of this form, and both limits never decrease with i.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "BIAS_KEYS",
    "BIAS_ROWS",
    "BIAS_TILES",
    "BOOL_BIAS",
    "FLOAT_BIAS",
    "LOG2E",
    "UNSPECIALIZED",
    "bias_gradient_places",
    "bias_of_head",
    "bias_tile",
    "columns_of_rows",
    "interval_of_row",
    "keep_tile",
    "place_of_program",
    "rows_of_columns",
    "score_tile",
    "store_bias_gradient",
]

# compiled once for all values: lengths change from call to call
UNSPECIALIZED = [
    "rows", "columns", "section", "low", "high", "q_offset", "head_offset", "threshold",
]  # fmt: skip

LOG2E = tl.constexpr(1.4426950408889634)
# the kernels' BIAS is a sum of these; 0: no bias
FLOAT_BIAS = tl.constexpr(1)
BOOL_BIAS = tl.constexpr(2)
BIAS_ROWS = tl.constexpr(4)  # it varies along the rows
BIAS_KEYS = tl.constexpr(8)  # it varies along the keys
BIAS_TILES = tl.constexpr(16)  # it comes as a descriptor: whole tiles by bulk copies


@triton.jit
def interval_of_row(
    i, rows, columns, low, high, first_ptr, end_ptr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The columns ``[start, stop)`` that row `i` (a scalar or a vector) sees."""
    start = i * 0
    stop = start + columns
    if HAS_LOW:
        start = tl.maximum(start, i + low)
    if HAS_HIGH:
        stop = tl.minimum(stop, i + high + 1)
    if PACKED:
        token = tl.minimum(i, rows - 1)
        start = tl.maximum(start, tl.load(first_ptr + token))
        stop = tl.minimum(stop, tl.load(end_ptr + token))
    return start, stop


@triton.jit
def columns_of_rows(
    row, rows, columns, low, high, first_ptr, end_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Blocks of columns for the rows from `row` on: ``(begin, full_begin, full_end, end)``.

    Blocks in ``[full_begin, full_end)`` are seen whole by every row; the others need a mask.
    """
    last = tl.minimum(row + BLOCK_M, rows) - 1
    begin, full_stop = interval_of_row(
        row, rows, columns, low, high, first_ptr, end_ptr, HAS_LOW, HAS_HIGH, PACKED
    )
    full_begin, stop = interval_of_row(
        last, rows, columns, low, high, first_ptr, end_ptr, HAS_LOW, HAS_HIGH, PACKED
    )
    begin = begin // BLOCK_N
    end = tl.maximum(begin, tl.cdiv(tl.maximum(stop, 0), BLOCK_N))
    full_begin = tl.minimum(tl.cdiv(full_begin, BLOCK_N), end)
    full_end = tl.minimum(tl.maximum(full_stop, 0) // BLOCK_N, end)
    return begin, full_begin, tl.maximum(full_begin, full_end), end


@triton.jit
def rows_of_columns(
    column, rows, columns, low, high, first_ptr, end_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Blocks of rows that see columns from `column` on: ``(begin, full_begin, full_end, end)``.

    Rows past the end count as seeing everything (their weights are zero anyway, see the kernels).
    """
    last = tl.minimum(column + BLOCK_N, columns) - 1
    begin = column * 0
    full_begin = begin
    stop = begin + rows
    full_stop = stop
    if HAS_HIGH:
        begin = tl.maximum(begin, column - high)
        full_begin = tl.maximum(full_begin, last - high)
    if HAS_LOW:
        stop = tl.minimum(stop, last - low + 1)
        full_stop = tl.minimum(full_stop, column - low + 1)
    if PACKED:
        begin = tl.maximum(begin, tl.load(first_ptr + column))
        full_begin = tl.maximum(full_begin, tl.load(first_ptr + last))
        stop = tl.minimum(stop, tl.load(end_ptr + last))
        full_stop = tl.minimum(full_stop, tl.load(end_ptr + column))
    full_stop = tl.where(full_stop >= rows, tl.cdiv(rows, BLOCK_M) * BLOCK_M, full_stop)
    begin = begin // BLOCK_M
    end = tl.maximum(begin, tl.cdiv(tl.maximum(stop, 0), BLOCK_M))
    full_begin = tl.minimum(tl.cdiv(full_begin, BLOCK_M), end)
    full_end = tl.minimum(tl.maximum(full_stop, 0) // BLOCK_M, end)
    return begin, full_begin, tl.maximum(full_begin, full_end), end


@triton.jit
def place_of_program(program, blocks, lines, section):
    """The line (batch and head) and the block of a program: line by line in sections of lines.

    Programs that run at the same time are neighbours. A section is as many lines as the second
    level cache holds what they read (`lines_together`); in it, all first blocks come first.
    """
    first = program // (blocks * section) * section
    inside = program - first * blocks
    width = tl.minimum(section, lines - first)
    return first + inside % width, inside // width


@triton.jit
def bias_of_head(bias_ptr, batch, head, stride_b, stride_h, BIAS: tl.constexpr):
    """Where a head's bias is: a pointer to it, and its place in a descriptor."""
    if not (BIAS_TILES & BIAS):
        bias_ptr += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    return bias_ptr, tl.where(stride_b == 0, 0, batch), tl.where(stride_h == 0, 0, head)


@triton.jit
def bias_tile(
    bias_ptr, bias_b, bias_h, row, column, i, j, stride_i, stride_j, rows, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The bias of a tile, zero outside of it; see `bias_of_head`. (None of these: any number.)"""
    bias = row
    if BIAS_TILES & BIAS:
        bias = bias_ptr.load([bias_b, bias_h, row, column]).reshape(BLOCK_M, BLOCK_N)
        if TRANSPOSED:
            bias = bias.T
    elif BIAS:
        # a broadcast axis is not loaded again for each entry
        offsets = tl.zeros([1, 1], tl.int64)
        inside = offsets == 0
        if BIAS_ROWS & BIAS:
            offsets += i.to(tl.int64) * stride_i
            inside = inside & (i < rows)
        if BIAS_KEYS & BIAS:
            offsets += j.to(tl.int64) * stride_j
            inside = inside & (j < columns)
        bias = tl.load(bias_ptr + offsets, mask=inside, other=0)
    return bias


@triton.jit
def score_tile(
    qk, bias, i, j, scale, softcap, slope, q_offset,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Scores from ``qk = <q_i, k_j>``, and the tanh of the soft cap (its derivative needs it).

    Units of log 2, or natural ones with a floating bias.
    """
    unit: tl.constexpr = 1.0 if FLOAT_BIAS & BIAS else LOG2E
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x)); exp may overflow to inf, which gives 1 as it should.
        # (the square of rsqrt: cheaper than a division)
        root = tl.rsqrt(1.0 + tl.exp2(qk * (scale * (2.0 * LOG2E) / softcap)))
        tanh = 1.0 - 2.0 * (root * root)
        s = tanh * (softcap * unit)
    else:
        tanh = qk
        s = qk * (scale * unit)
    if BIAS:
        s = s + bias.to(tl.float32) if FLOAT_BIAS & BIAS else tl.where(bias != 0, s, float("-inf"))
    if ALIBI:
        # subtracted before it is multiplied: slope * j alone would lose the low bits
        s += (slope * unit) * (j.to(tl.float32) - (i + q_offset).to(tl.float32))
    return s, tanh


@triton.jit
def keep_tile(
    seed, batch, head, i, column, threshold, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """Dropout's decision for rows `i` (a vector) and BLOCK_N columns from `column` (4 divides it).

    The recipe of `fxport.ops.dropout`: one Philox call gives the words of 4 neighbouring columns.
    """
    groups = column // 4 + tl.arange(0, BLOCK_N // 4)
    if TRANSPOSED:
        c0 = groups[:, None] + tl.zeros_like(i)[None, :]
        c1 = tl.zeros_like(groups)[:, None] + i[None, :]
    else:
        c0 = groups[None, :] + tl.zeros_like(i)[:, None]
        c1 = tl.zeros_like(groups)[None, :] + i[:, None]
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + head, zero + batch)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [.., .., a, b] is word 2 a + b
    words = (words.to(tl.uint32, bitcast=True) >> 1).to(tl.int32, bitcast=True)
    if TRANSPOSED:
        words = tl.permute(words, (0, 2, 3, 1)).reshape(BLOCK_N, i.shape[0])
    else:
        words = words.reshape(i.shape[0], BLOCK_N)
    return words >= threshold


@triton.jit
def bias_gradient_places(
    dbias_ptr, batch, head, heads, row, column, rows, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Pointers to a tile of the bias' gradient [.., heads, rows, columns], and which are inside.

    TILES: rows are aligned to 16 bytes. The compiler, which does not know `columns`, has to be told
    or it moves number by number.
    """
    unit: tl.constexpr = 128 // dbias_ptr.dtype.element_ty.primitive_bitwidth if TILES else 1
    length = columns // unit * unit
    i = row + tl.arange(0, BLOCK_M)
    j = column + tl.arange(0, BLOCK_N)
    line = (batch.to(tl.int64) * heads + head) * rows * length
    places = dbias_ptr + line + i.to(tl.int64)[:, None] * length + j[None, :]
    return places, (i[:, None] < rows) & (j[None, :] < length)


@triton.jit
def store_bias_gradient(
    dbias_ptr, dbias_desc, batch, head, heads, row, column, rows, columns, tile,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Writes a tile of the bias' gradient: as a whole by a bulk copy, where TILES."""
    tile = tile.to(dbias_ptr.dtype.element_ty)
    if TILES:
        dbias_desc.store([batch, head, row, column], tile.reshape(1, 1, BLOCK_M, BLOCK_N))
    else:
        places, inside = bias_gradient_places(
            dbias_ptr, batch, head, heads, row, column, rows, columns, BLOCK_M, BLOCK_N, TILES
        )
        tl.store(places, tile, mask=inside)
