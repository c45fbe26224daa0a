"""The plain forward kernel for Hopper, its warps with a trade each: in Gluon, Triton's lower level.

One warp loads blocks of k and v into a ring of shared memory; two groups of four warps take 64 rows
of q each. A group asks for the next block's scores before it adds this block's weights times v, so
that the matrix units work while it computes exponentials; and while one group does that, the other
has them too (Shah et al., "FlashAttention-3", arXiv:2407.08608).

Barriers, two for each place of the ring: `full` (its bytes have come) and `empty` (both groups have
read it). Block number n is in place n % STAGES, for the n // STAGES-th time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["GROUP_ROWS", "gluon_forward_kernel"]

LN2 = gl.constexpr(0.6931471805599453)
GROUP_ROWS = 64  # what a warp group's matrix instruction has
_ROWS = gl.constexpr(GROUP_ROWS)
_LOADER_REGISTERS = gl.constexpr(24)
_GROUP_REGISTERS = gl.constexpr(240)


@gluon.jit
def _tile(
    rows, columns, section, low, high, first_ptr, end_ptr, blocks, lines,
    BLOCK_N: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """This program's line (batch and head), first row, and blocks of keys, one at least.

    As `place_of_program` and `columns_of_rows`: ``(line, row, begin, full_begin, full_end, end)``.
    """
    program = gl.program_id(0)
    first = program // (blocks * section) * section
    inside = program - first * blocks
    width = gl.minimum(section, lines - first)
    row = (blocks - 1 - inside // width) * (2 * _ROWS)
    last = gl.minimum(row + 2 * _ROWS, rows) - 1
    begin, full_begin = row * 0, row * 0
    stop, full_stop = columns, columns
    if HAS_HIGH:
        stop = gl.maximum(gl.minimum(stop, last + high + 1), 0)
        full_stop = gl.maximum(gl.minimum(full_stop, row + high + 1), 0)
    if HAS_LOW:
        begin = gl.maximum(row + low, 0)
        full_begin = gl.maximum(last + low, 0)
    if PACKED:
        begin = gl.maximum(begin, gl.load(first_ptr + row))
        full_begin = gl.maximum(full_begin, gl.load(first_ptr + last))
        stop = gl.minimum(stop, gl.load(end_ptr + last))
        full_stop = gl.minimum(full_stop, gl.load(end_ptr + row))
    begin = begin // BLOCK_N
    full_begin = gl.cdiv(full_begin, BLOCK_N)
    end = gl.maximum(gl.cdiv(stop, BLOCK_N), begin + 1)
    full_begin = gl.minimum(full_begin, end)
    full_end = gl.maximum(gl.minimum(full_stop // BLOCK_N, end), full_begin)
    return first + inside % width, row, begin, full_begin, full_end, end


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q_place, k_ring, v_ring, q_full, k_full, k_empty, v_full, v_empty,
    batch, head, kv_head, row, begin, end, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies q, then the blocks of k and v from the last to the first."""
    for group in gl.static_range(2):
        mbarrier.expect(q_full.index(group), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            q_desc, [batch, head, row + _ROWS * group, 0], q_full.index(group), q_place.index(group)
        )
    for step in range(0, end - begin):
        column = (end - 1 - step) * BLOCK_N
        stage = step % STAGES
        round_before = (step // STAGES & 1) ^ 1
        mbarrier.wait(k_empty.index(stage), round_before)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            k_desc, [batch, kv_head, column, 0], k_full.index(stage), k_ring.index(stage)
        )
        mbarrier.wait(v_empty.index(stage), round_before)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            v_desc, [batch, kv_head, column, 0], v_full.index(stage), v_ring.index(stage)
        )


@gluon.jit
def _weights(
    s, peak, i, column, columns, low, high, first_ptr, end_ptr, scale, SCORES: gl.constexpr,
    BLOCK_N: gl.constexpr, MASKED: gl.constexpr,
    HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Weights of a tile of scores, the new peak, and the factor of what was summed before."""
    if MASKED:
        j = column + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        stop = i * 0 + columns
        if HAS_HIGH:
            stop = gl.minimum(stop, i + high + 1)
        if PACKED:  # as many rows as columns
            token = gl.minimum(i, columns - 1)
            stop = gl.minimum(stop, gl.load(end_ptr + token))
        seen = j[None, :] < stop[:, None]
        if HAS_LOW:
            seen = seen & (j[None, :] >= (i + low)[:, None])
        if PACKED:
            seen = seen & (j[None, :] >= gl.load(first_ptr + token)[:, None])
        s = gl.where(seen, s, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(s, 1) * scale)
    base = new_peak
    if MASKED:  # a row that has seen no column yet
        base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    return gl.exp2(s * scale - base[:, None]), new_peak, gl.exp2(peak - base)


@gluon.jit
def _attend(
    acc, total, peak, weights, number, q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    i, block, count, columns, low, high, first_ptr, end_ptr, scale,
    SCORES: gl.constexpr, OUT: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """`count` blocks of keys from `block` down; `weights`: of the one before, not in acc yet."""
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    SIZE: gl.constexpr = v_ring.shape[4]
    for step in range(0, count):
        stage, before = number % STAGES, (number - 1) % STAGES
        before_round = (number - 1) // STAGES & 1
        mbarrier.wait(k_full.index(stage), number // STAGES & 1)
        k = k_ring.index(stage).reshape([BLOCK_N, SIZE]).permute((1, 0))
        zero = gl.zeros([_ROWS, BLOCK_N], gl.float32, layout=SCORES)
        s_token = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), before_round)
        v = v_ring.index(before).reshape([BLOCK_N, SIZE])
        acc_token = warpgroup_mma(weights, v, acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_token])
        mbarrier.arrive(k_empty.index(stage), count=1)
        p, peak, shrink = _weights(
            s, peak, i, (block - step) * BLOCK_N, columns, low, high, first_ptr, end_ptr, scale,
            SCORES, BLOCK_N, MASKED, HAS_LOW, HAS_HIGH, PACKED,
        )  # fmt: skip
        total = total * shrink + gl.sum(p, 1)
        next_weights = gl.convert_layout(p.to(v_ring.dtype), WEIGHTS)
        # It has come long ago. But a loop ends the assembler's block of code here, in which it
        # would else put the wait for acc first and all of the above after it.
        mbarrier.wait(v_full.index(before), before_round)
        acc, weights = warpgroup_mma_wait(0, deps=[acc_token, weights])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
        weights = next_weights
        number += 1
    return acc, total, peak, weights, number


@gluon.jit
def _rows_of_group(
    out_desc, lse_ptr, q_place, k_ring, v_ring, q_full, k_full, k_empty, v_full, v_empty,
    line, heads, row, rows, columns, low, high, first_ptr, end_ptr, scale,
    begin, full_begin, full_end, end,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """One group's 64 rows: the last block of keys, with a mask; the others; out and lse."""
    SIZE: gl.constexpr = v_ring.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    row += _ROWS * GROUP
    i = row + gl.arange(0, _ROWS, layout=BY_ROW)
    peak = gl.full([_ROWS], float("-inf"), gl.float32, layout=BY_ROW)
    acc = gl.zeros([_ROWS, SIZE], gl.float32, layout=OUT)
    mbarrier.wait(q_full.index(GROUP), 0)
    q = q_place.index(GROUP).reshape([_ROWS, SIZE])
    mbarrier.wait(k_full.index(0), 0)
    k = k_ring.index(0).reshape([BLOCK_N, SIZE]).permute((1, 0))
    zero = gl.zeros([_ROWS, BLOCK_N], gl.float32, layout=SCORES)
    s = warpgroup_mma_wait(0, deps=[warpgroup_mma(q, k, zero, use_acc=False, is_async=True)])
    mbarrier.arrive(k_empty.index(0), count=1)
    p, peak, _ = _weights(
        s, peak, i, (end - 1) * BLOCK_N, columns, low, high, first_ptr, end_ptr, scale,
        SCORES, BLOCK_N, True, HAS_LOW, HAS_HIGH, PACKED,
    )  # fmt: skip
    total = gl.sum(p, 1)
    weights = gl.convert_layout(p.to(v_ring.dtype), gl.DotOperandLayout(0, OUT, 2))
    number = 1
    full_end = gl.minimum(full_end, end - 1)
    full_begin = gl.minimum(full_begin, full_end)
    acc, total, peak, weights, number = _attend(
        acc, total, peak, weights, number, q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
        i, end - 2, end - 1 - full_end, columns, low, high, first_ptr, end_ptr, scale,
        SCORES, OUT, BLOCK_N, STAGES, True, HAS_LOW, HAS_HIGH, PACKED,
    )  # fmt: skip
    acc, total, peak, weights, number = _attend(
        acc, total, peak, weights, number, q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
        i, full_end - 1, full_end - full_begin, columns, low, high, first_ptr, end_ptr, scale,
        SCORES, OUT, BLOCK_N, STAGES, False, HAS_LOW, HAS_HIGH, PACKED,
    )  # fmt: skip
    if HAS_LOW or PACKED:
        acc, total, peak, weights, number = _attend(
            acc, total, peak, weights, number, q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
            i, full_begin - 1, full_begin - begin, columns, low, high, first_ptr, end_ptr, scale,
            SCORES, OUT, BLOCK_N, STAGES, True, HAS_LOW, HAS_HIGH, PACKED,
        )  # fmt: skip
    before = (number - 1) % STAGES
    mbarrier.wait(v_full.index(before), (number - 1) // STAGES & 1)
    v = v_ring.index(before).reshape([BLOCK_N, SIZE])
    acc, weights = warpgroup_mma_wait(
        0, deps=[warpgroup_mma(weights, v, acc, is_async=True), weights]
    )
    lse = gl.where(total == 0.0, float("-inf"), peak * LN2 + gl.log(total))
    gl.store(lse_ptr + line.to(gl.int64) * rows + i, lse, mask=i < rows)
    factor = 1.0 / gl.where(total == 0.0, 1.0, total)
    out = acc * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
    q.store(out.to(q_place.dtype))  # q is not needed any more
    fence_async_shared()
    tma.async_copy_shared_to_global(
        out_desc, [line // heads, line % heads, row, 0], q_place.index(GROUP)
    )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "columns", "section", "low", "high"])
def gluon_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, first_ptr, end_ptr,
    heads, group, rows, columns, section, low, high, scale,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Writes out and lse: as `forward_kernel` where that is PLAIN, with head size 128.

    Grid (blocks of 128 rows * batch * heads). Descriptors have tiles of 64 rows of q and out,
    BLOCK_N of k and v. `scale` includes log2(e).
    """
    blocks = gl.cdiv(rows, 2 * _ROWS)
    lines = gl.num_programs(0) // blocks
    line, row, begin, full_begin, full_end, end = _tile(
        rows, columns, section, low, high, first_ptr, end_ptr, blocks, lines,
        BLOCK_N, HAS_LOW, HAS_HIGH, PACKED,
    )  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    SIZE: gl.constexpr = q_desc.block_type.shape[3]
    q_place = gl.allocate_shared_memory(dtype, [2, 1, 1, _ROWS, SIZE], q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, SIZE], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, SIZE], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(2):
        mbarrier.init(q_full.index(n), count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(k_empty.index(n), count=2)
        mbarrier.init(v_empty.index(n), count=2)
    gl.warp_specialize(
        [
            (_rows_of_group, (
                out_desc, lse_ptr, q_place, k_ring, v_ring, q_full, k_full, k_empty, v_full,
                v_empty, line, heads, row, rows, columns, low, high, first_ptr, end_ptr, scale,
                begin, full_begin, full_end, end, 0, BLOCK_N, STAGES, HAS_LOW, HAS_HIGH, PACKED,
            )),
            (_rows_of_group, (
                out_desc, lse_ptr, q_place, k_ring, v_ring, q_full, k_full, k_empty, v_full,
                v_empty, line, heads, row, rows, columns, low, high, first_ptr, end_ptr, scale,
                begin, full_begin, full_end, end, 1, BLOCK_N, STAGES, HAS_LOW, HAS_HIGH, PACKED,
            )),
            (_load, (
                q_desc, k_desc, v_desc, q_place, k_ring, v_ring, q_full, k_full, k_empty, v_full,
                v_empty, line // heads, line % heads, line % heads // group, row, begin, end,
                BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [_GROUP_REGISTERS, _LOADER_REGISTERS],
    )  # fmt: skip
