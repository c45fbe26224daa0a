"""The backward kernel for Hopper, in one pass: dk, dv, dq and dbias of a tile together. In Gluon.

The two kernels of backward.py make the scores, and dout times v, once each: seven matrix products a
tile. Here they are made once, five in all, and dq is added to a float32 buffer by bulk reductions
in whatever order the programs come: **the last bits of dq differ from run to run**. Everything else
is as there, and so are the names. A bias comes in whole tiles, of the dtype of q; its gradient is
the tile ds itself, on its way to dq.

One warp loads; eight compute, 128 keys by 64 rows. Barriers as in gluon_forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fxport.ops.triton.tiles import LOG2E

__all__ = ["ADDED", "STORED", "gluon_backward_kernel", "scale_kernel"]

# the kernel's BIAS_GRAD; 0: none
STORED = gl.constexpr(1)
ADDED = gl.constexpr(2)  # to that of other batches

_LOADER_REGISTERS = gl.constexpr(24)


@builtin
def _add_to_global(descriptor, place, tile, _semantic=None):
    """Starts to add a tile in shared memory to a tensor; Gluon lacks the name, not the operation.

    Waited for as for `tma.async_copy_shared_to_global`.
    """
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, place, tile.handle)


@gluon.jit
def _tile(
    rows, columns, section, low, high, first_ptr, end_ptr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, PACKED: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """This program's line (batch and key head), first key, and the blocks of rows that see it.

    As `place_of_program` and `rows_of_columns`: ``(line, column, begin, full_begin, full_end,
    end)``; with keys past the end in the block, all rows count as at the mask's edge.
    """
    program = gl.program_id(0)
    blocks = gl.cdiv(columns, BLOCK_N)
    lines = gl.num_programs(0) // blocks
    first = program // (blocks * section) * section
    inside = program - first * blocks
    width = gl.minimum(section, lines - first)
    column = inside // width * BLOCK_N
    last = gl.minimum(column + BLOCK_N, columns) - 1
    begin, full_begin = column * 0, column * 0
    stop, full_stop = begin + rows, begin + rows
    if HAS_HIGH:
        begin = gl.maximum(begin, column - high)
        full_begin = gl.maximum(full_begin, last - high)
    if HAS_LOW:
        stop = gl.minimum(stop, gl.maximum(last - low + 1, 0))
        full_stop = gl.minimum(full_stop, gl.maximum(column - low + 1, 0))
    if PACKED:
        begin = gl.maximum(begin, gl.load(first_ptr + column))
        full_begin = gl.maximum(full_begin, gl.load(first_ptr + last))
        stop = gl.minimum(stop, gl.load(end_ptr + last))
        full_stop = gl.minimum(full_stop, gl.load(end_ptr + column))
    # rows past the end have no weights: the last block may be whole
    full_end = gl.where(full_stop >= rows, gl.cdiv(rows, BLOCK_M), full_stop // BLOCK_M)
    begin = begin // BLOCK_M
    end = gl.maximum(gl.cdiv(stop, BLOCK_M), begin)
    full_begin = gl.minimum(gl.cdiv(full_begin, BLOCK_M), end)
    full_end = gl.maximum(gl.minimum(full_end, end), full_begin)
    if RAGGED:
        ragged = column + BLOCK_N > columns
        full_begin = gl.where(ragged, end, full_begin)
        full_end = gl.where(ragged, end, full_end)
    return first + inside % width, column, begin, full_begin, full_end, end


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, grad_desc, norm_desc, rest_desc, delta_desc, bias_desc,
    k_place, v_place, q_ring, grad_ring, norm_ring, rest_ring, delta_ring, bias_ring,
    k_full, v_full, q_full, q_empty, grad_full, grad_empty,
    batch, kv_head, kv_heads, group, bias_batch, bias_per_head, column, begin, end,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """Copies k and v, then for each head of the group what belongs to the blocks of its rows."""
    LINES: gl.constexpr = norm_desc.block_type.nbytes * (2 if BIAS else 1)
    BIAS_TILE: gl.constexpr = bias_desc.block_type.nbytes if BIAS else 0
    mbarrier.expect(k_full, k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [batch, kv_head, column, 0], k_full, k_place)
    mbarrier.expect(v_full, v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(v_desc, [batch, kv_head, column, 0], v_full, v_place)
    number = 0
    for member in range(0, group):
        head = kv_head * group + member
        line = (batch * kv_heads + kv_head) * group + member
        for block in range(begin, end):
            row = block * BLOCK_M
            stage = number % STAGES
            round_before = (number // STAGES & 1) ^ 1
            full = q_full.index(stage)
            mbarrier.wait(q_empty.index(stage), round_before)
            mbarrier.expect(full, q_desc.block_type.nbytes + LINES + BIAS_TILE)
            tma.async_copy_global_to_shared(
                q_desc, [batch, head, row, 0], full, q_ring.index(stage)
            )
            tma.async_copy_global_to_shared(norm_desc, [line, row], full, norm_ring.index(stage))
            if BIAS:
                bias = [bias_batch, head * bias_per_head, row, column]
                tma.async_copy_global_to_shared(bias_desc, bias, full, bias_ring.index(stage))
                rest = rest_ring.index(stage)
                tma.async_copy_global_to_shared(rest_desc, [line, row], full, rest)
            full = grad_full.index(stage)
            mbarrier.wait(grad_empty.index(stage), round_before)
            mbarrier.expect(full, grad_desc.block_type.nbytes + delta_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                grad_desc, [batch, head, row, 0], full, grad_ring.index(stage)
            )
            tma.async_copy_global_to_shared(delta_desc, [line, row], full, delta_ring.index(stage))
            number += 1


@gluon.jit
def _down_the_rows(
    dk, dv, number, dq_desc, dbias_desc, k, v, q_ring, grad_ring, norm_ring, rest_ring, delta_ring,
    bias_ring, ds_place, dq_place, q_full, q_empty, grad_full, grad_empty,
    batch, head, bias_batch, column, columns, begin, end, low, high, first_ptr, end_ptr, scale,
    SCORES: gl.constexpr, BY_KEY: gl.constexpr, BY_ROW: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, PACKED: gl.constexpr,
    BIAS: gl.constexpr, BIAS_GRAD: gl.constexpr,
):  # fmt: skip
    """Adds the blocks of rows from `begin` to `end` to dk and dv, and their part to dq.

    Tiles are transposed: [keys, rows]; dq's are not (BY_ROW).
    """
    LEFT: gl.constexpr = gl.DotOperandLayout(0, BY_KEY, 2)
    OF_ROWS: gl.constexpr = gl.SliceLayout(0, SCORES)
    SIZE: gl.constexpr = q_ring.shape[4]
    for block in range(begin, end):
        row = block * BLOCK_M
        stage = number % STAGES
        this_round = number // STAGES & 1
        q = q_ring.index(stage).reshape([BLOCK_M, SIZE])
        grad = grad_ring.index(stage).reshape([BLOCK_M, SIZE])
        zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=SCORES)
        mbarrier.wait(q_full.index(stage), this_round)
        s_token = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        norm = norm_ring.index(stage).reshape([BLOCK_M]).load(OF_ROWS)
        mbarrier.wait(grad_full.index(stage), this_round)
        dp_token = warpgroup_mma(v, grad.permute((1, 0)), zero, use_acc=False, is_async=True)
        if BIAS:
            bias = bias_ring.index(stage).reshape([BLOCK_M, BLOCK_N]).permute((1, 0)).load(SCORES)
            rest = rest_ring.index(stage).reshape([BLOCK_M]).load(OF_ROWS)
        s = warpgroup_mma_wait(1, deps=[s_token])
        if BIAS:
            s = s * scale + bias.to(gl.float32)
            s = (s - norm[None, :]) * LOG2E - rest[None, :]
            p = gl.exp2(gl.minimum(s, 0.0))
        else:
            p = gl.exp2(s * scale - norm[None, :])
        if MASKED:
            j = column + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, SCORES))
            i = row + gl.arange(0, BLOCK_M, layout=OF_ROWS)
            seen = (j < columns)[:, None]
            if HAS_HIGH:
                seen = seen & (j[:, None] <= (i + high)[None, :])
            if HAS_LOW:
                seen = seen & (j[:, None] >= (i + low)[None, :])
            if PACKED:
                token = gl.minimum(i, columns - 1)
                seen = seen & (j[:, None] >= gl.load(first_ptr + token)[None, :])
                seen = seen & (j[:, None] < gl.load(end_ptr + token)[None, :])
            p = gl.where(seen, p, 0.0)
        weights = gl.convert_layout(p.to(q_ring.dtype), LEFT)
        delta = delta_ring.index(stage).reshape([BLOCK_M]).load(OF_ROWS)
        # Waits for what has come long ago end the assembler's block of code, see gluon_forward.
        mbarrier.wait(grad_full.index(stage), this_round)
        dv_token = warpgroup_mma(weights, grad, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp_token])
        ds = (p * (dp - delta[None, :])).to(q_ring.dtype)
        ds_of_rows = ds_place.reshape([BLOCK_M, BLOCK_N])
        ds_of_rows.permute((1, 0)).store(ds)
        ds_left = gl.convert_layout(ds, LEFT)
        fence_async_shared()
        gl.thread_barrier()
        if BIAS_GRAD == STORED:
            place = [bias_batch, head, row, column]
            tma.async_copy_shared_to_global(dbias_desc, place, ds_place)
        if BIAS_GRAD == ADDED:
            _add_to_global(dbias_desc, [bias_batch, head, row, column], ds_place)
        zero = gl.zeros([BLOCK_M, SIZE], gl.float32, layout=BY_ROW)
        dq_token = warpgroup_mma(ds_of_rows, k, zero, use_acc=False, is_async=True)
        dk_token = warpgroup_mma(ds_left, q, dk, is_async=True)
        dv, weights = warpgroup_mma_wait(2, deps=[dv_token, weights])
        mbarrier.arrive(grad_empty.index(stage), count=1)
        dq = warpgroup_mma_wait(1, deps=[dq_token])
        tma.store_wait(0)  # the last tile has been read, and this one's ds
        gl.thread_barrier()
        dq_place.reshape([BLOCK_M, SIZE]).store(dq)
        fence_async_shared()
        gl.thread_barrier()
        _add_to_global(dq_desc, [batch, head, row, 0], dq_place)
        mbarrier.wait(q_full.index(stage), this_round)
        dk, ds_left = warpgroup_mma_wait(0, deps=[dk_token, ds_left])
        mbarrier.arrive(q_empty.index(stage), count=1)
        number += 1
    return dk, dv, number


@gluon.jit
def _store_zeros(
    dbias_desc, place, batch, head, column, begin, end, blocks,
    SCORES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The gradient of a bias in the blocks of rows that do not see this block of keys."""
    zeros = gl.zeros([BLOCK_N, BLOCK_M], place.dtype, layout=SCORES)
    place.reshape([BLOCK_M, BLOCK_N]).permute((1, 0)).store(zeros)
    fence_async_shared()
    gl.thread_barrier()
    for step in range(0, blocks - (end - begin)):
        row = gl.where(step < begin, step, step + end - begin) * BLOCK_M
        tma.async_copy_shared_to_global(dbias_desc, [batch, head, row, column], place)
    tma.store_wait(0)
    gl.thread_barrier()


@gluon.jit
def _compute(
    dq_desc, dk_desc, dv_desc, dbias_desc, k_place, v_place, q_ring, grad_ring, norm_ring,
    rest_ring, delta_ring, bias_ring, ds_place, dq_place, k_full, v_full, q_full, q_empty,
    grad_full, grad_empty, batch, kv_head, group, bias_batch, rows, column, columns,
    begin, full_begin, full_end, end, low, high, first_ptr, end_ptr, scale, grad_scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, PACKED: gl.constexpr, RAGGED: gl.constexpr,
    BIAS: gl.constexpr, BIAS_GRAD: gl.constexpr,
):  # fmt: skip
    """One block of keys: all rows that see it, of all heads of its group; then dk and dv."""
    SIZE: gl.constexpr = q_ring.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    BY_KEY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, SIZE, 16])
    BY_ROW: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, SIZE // 2, 16])
    k = k_place.reshape([BLOCK_N, SIZE])
    v = v_place.reshape([BLOCK_N, SIZE])
    dk = gl.zeros([BLOCK_N, SIZE], gl.float32, layout=BY_KEY)
    dv = gl.zeros([BLOCK_N, SIZE], gl.float32, layout=BY_KEY)
    number = 0
    if BIAS_GRAD == STORED:
        for member in range(0, group):
            _store_zeros(
                dbias_desc, ds_place, bias_batch, kv_head * group + member, column,
                begin, end, gl.cdiv(rows, BLOCK_M), SCORES, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    mbarrier.wait(k_full, 0)
    mbarrier.wait(v_full, 0)
    for member in range(0, group):
        head = kv_head * group + member
        if HAS_HIGH or HAS_LOW or PACKED or RAGGED:
            dk, dv, number = _down_the_rows(
                dk, dv, number, dq_desc, dbias_desc, k, v, q_ring, grad_ring, norm_ring, rest_ring,
                delta_ring, bias_ring, ds_place, dq_place, q_full, q_empty, grad_full, grad_empty,
                batch, head, bias_batch, column, columns, begin, full_begin, low, high,
                first_ptr, end_ptr, scale, SCORES, BY_KEY, BY_ROW, BLOCK_M, BLOCK_N, STAGES, True,
                HAS_LOW, HAS_HIGH, PACKED, BIAS, BIAS_GRAD,
            )  # fmt: skip
        dk, dv, number = _down_the_rows(
            dk, dv, number, dq_desc, dbias_desc, k, v, q_ring, grad_ring, norm_ring, rest_ring,
            delta_ring, bias_ring, ds_place, dq_place, q_full, q_empty, grad_full, grad_empty,
            batch, head, bias_batch, column, columns, full_begin, full_end, low, high,
            first_ptr, end_ptr, scale, SCORES, BY_KEY, BY_ROW, BLOCK_M, BLOCK_N, STAGES, False,
            HAS_LOW, HAS_HIGH, PACKED, BIAS, BIAS_GRAD,
        )  # fmt: skip
        if HAS_LOW or PACKED:
            dk, dv, number = _down_the_rows(
                dk, dv, number, dq_desc, dbias_desc, k, v, q_ring, grad_ring, norm_ring, rest_ring,
                delta_ring, bias_ring, ds_place, dq_place, q_full, q_empty, grad_full, grad_empty,
                batch, head, bias_batch, column, columns, full_end, end, low, high,
                first_ptr, end_ptr, scale, SCORES, BY_KEY, BY_ROW, BLOCK_M, BLOCK_N, STAGES, True,
                HAS_LOW, HAS_HIGH, PACKED, BIAS, BIAS_GRAD,
            )  # fmt: skip
    k.store((dk * grad_scale).to(k_place.dtype))  # neither k nor v is needed any more
    v.store(dv.to(v_place.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(dk_desc, [batch, kv_head, column, 0], k_place)
    tma.async_copy_shared_to_global(dv_desc, [batch, kv_head, column, 0], v_place)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "columns", "section", "low", "high"])
def gluon_backward_kernel(
    q_desc, k_desc, v_desc, grad_desc, norm_desc, rest_desc, delta_desc, bias_desc,
    dq_desc, dk_desc, dv_desc, dbias_desc, first_ptr, end_ptr,
    first_line, bias_per_batch, bias_per_head,
    kv_heads, group, rows, columns, section, low, high, scale, grad_scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, PACKED: gl.constexpr, RAGGED: gl.constexpr,
    BIAS: gl.constexpr, BIAS_GRAD: gl.constexpr,
):  # fmt: skip
    """Writes dk and dv and adds to dq, float32 and not yet scaled; head size 64 or 128.

    Grid (blocks of keys * batch * kv_heads). The arguments are those of `key_kernel`. Where batches
    share a bias that gets its gradient, each is a launch (`first_line`: its first key head); those
    after the first add to what is there. `bias_per_batch`, `bias_per_head`: 1, or 0 where shared.
    """
    line, column, begin, full_begin, full_end, end = _tile(
        rows, columns, section, low, high, first_ptr, end_ptr,
        BLOCK_M, BLOCK_N, HAS_LOW, HAS_HIGH, PACKED, RAGGED,
    )  # fmt: skip
    line += first_line
    batch = line // kv_heads
    kv_head = line % kv_heads
    bias_batch = batch * bias_per_batch
    dtype: gl.constexpr = q_desc.dtype
    SIZE: gl.constexpr = q_desc.block_type.shape[3]
    k_place = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_N, SIZE], k_desc.layout)
    v_place = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_N, SIZE], v_desc.layout)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, SIZE], q_desc.layout)
    grad_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, SIZE], grad_desc.layout)
    norm_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], norm_desc.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], delta_desc.layout)
    ds_place = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_M, BLOCK_N], q_desc.layout)
    dq_place = gl.allocate_shared_memory(gl.float32, [1, 1, BLOCK_M, SIZE], dq_desc.layout)
    rest_ring, bias_ring = norm_ring, q_ring  # not read without a bias
    if BIAS:
        rest_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], rest_desc.layout)
        bias_ring = gl.allocate_shared_memory(
            dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_N], bias_desc.layout
        )
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    grad_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    grad_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(q_full.index(n), count=1)
        mbarrier.init(q_empty.index(n), count=1)
        mbarrier.init(grad_full.index(n), count=1)
        mbarrier.init(grad_empty.index(n), count=1)
    gl.warp_specialize(
        [
            (_compute, (
                dq_desc, dk_desc, dv_desc, dbias_desc, k_place, v_place, q_ring, grad_ring,
                norm_ring, rest_ring, delta_ring, bias_ring, ds_place, dq_place, k_full, v_full,
                q_full, q_empty, grad_full, grad_empty, batch, kv_head, group, bias_batch, rows,
                column, columns, begin, full_begin, full_end, end, low, high, first_ptr, end_ptr,
                scale, grad_scale, BLOCK_M, BLOCK_N, STAGES, HAS_LOW, HAS_HIGH, PACKED, RAGGED,
                BIAS, BIAS_GRAD,
            )),
            (_load, (
                q_desc, k_desc, v_desc, grad_desc, norm_desc, rest_desc, delta_desc, bias_desc,
                k_place, v_place, q_ring, grad_ring, norm_ring, rest_ring, delta_ring, bias_ring,
                k_full, v_full, q_full, q_empty, grad_full, grad_empty,
                batch, kv_head, kv_heads, group, bias_batch, bias_per_head, column, begin, end,
                BLOCK_M, STAGES, BIAS,
            )),
        ],
        [1],
        [_LOADER_REGISTERS],
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def scale_kernel(
    sum_ptr, dq_ptr, dq_stride_b, dq_stride_h, dq_stride_t, heads, rows, grad_scale,
    BLOCK_M: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """dq from its sum [B, Hq, Tq, SIZE] in float32. Grid (blocks of rows * batch * heads)."""
    blocks = tl.cdiv(rows, BLOCK_M)
    line = tl.program_id(0) // blocks
    i = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    d = tl.arange(0, SIZE)[None, :]
    inside = i < rows
    total = tl.load(sum_ptr + (line.to(tl.int64) * rows + i) * SIZE + d, mask=inside, other=0.0)
    dq_ptr += (line // heads).to(tl.int64) * dq_stride_b + (line % heads).to(tl.int64) * dq_stride_h
    place = dq_ptr + i.to(tl.int64) * dq_stride_t + d
    tl.store(place, (total * grad_scale).to(dq_ptr.dtype.element_ty), mask=inside)
