"""Triton kernels of `fxport::expert_linear`: grouped products that never wait for the device.

Rows are put in the order of their experts by one small kernel; nothing is copied into that order,
since the products gather rows and scatter results by it. Every expert's rows are padded to whole
blocks: how many blocks there are at most follows from shapes alone, and each program finds its own
from the experts' ends. So CUDA graphs hold for every choice of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxport.ops.triton.launch import on_device_of_first

__all__ = ["outer", "product", "supports"]

_CHUNK = 8192  # rows that are ordered at a time
_SIDE_BY_SIDE = 8  # blocks of rows that share a tile of the weights while it is in the L2 cache
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels compute in it; sums are in float32."""
    return dtype in _DTYPES


# -- the order of rows -------------------------------------------------------------------------


@triton.jit
def order_kernel(chosen, order, ends, rows, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """One program an expert, and one for the rows of experts that do not exist: they come last."""
    own = tl.program_id(0)
    place = tl.zeros([], tl.int32)
    for start in range(0, rows, CHUNK):
        expert = _experts(chosen, start, rows, EXPERTS, CHUNK)
        place += tl.sum((expert < own).to(tl.int32))
    for start in range(0, rows, CHUNK):
        expert = _experts(chosen, start, rows, EXPERTS, CHUNK)
        mine = (expert == own).to(tl.int32)
        row = start + tl.arange(0, CHUNK)
        tl.store(order + place + tl.cumsum(mine) - 1, row, mask=expert == own)
        place += tl.sum(mine)
    tl.store(ends + own, place)


@triton.jit
def _experts(chosen, start, rows, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    row = start + tl.arange(0, CHUNK)
    expert = tl.load(chosen + row, mask=row < rows, other=0)
    expert = tl.where((expert >= 0) & (expert < EXPERTS), expert, EXPERTS)
    return tl.where(row < rows, expert, EXPERTS + 1).to(tl.int32)


def _ordered(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Rows in the order of experts, and where each expert's end (the last are no expert's)."""
    order = torch.empty_like(chosen, dtype=torch.int32)
    ends = torch.empty(experts + 1, dtype=torch.int32, device=chosen.device)
    chunk = min(_CHUNK, triton.next_power_of_2(max(len(chosen), 16)))
    warps = 8 if chunk > 1024 else 4
    order_kernel[(experts + 1,)](chosen, order, ends, len(chosen), experts, chunk, num_warps=warps)
    return order, ends


# -- products ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """Rows, outputs and summed features of a tile; warps; stages of the load pipeline."""

    rows: int
    out: int
    summed: int
    warps: int
    stages: int


def _product_blocks(rows: int, experts: int, dtype: torch.dtype) -> _Blocks:
    """For so many rows an expert on average; a table, as in `config`."""
    each = rows // experts
    if dtype == torch.float32:
        return _Blocks(16, 64, 32, 4, 3) if each < 16 else _Blocks(64, 64, 32, 4, 3)
    if each < 16:
        return _Blocks(16, 64, 128, 4, 4)
    if each < 64:
        return _Blocks(64, 64, 128, 4, 3)
    return _Blocks(128, 128, 64, 8, 3) if each < 128 else _Blocks(128, 256, 64, 8, 4)


@triton.jit
def product_kernel(
    x, weight, found, order, ends, N, K,
    x_row, x_in, w_expert, w_out, w_in, found_row,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, REPEATS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """``found[r] = weight[expert of r] @ x[r // REPEATS]`` for a block of rows of one expert.

    BESIDE blocks of rows go through the columns together.
    """
    across = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) // (BESIDE * across) * BESIDE + tl.program_id(0) % BESIDE
    column = tl.program_id(0) // BESIDE % across
    expert = tl.arange(0, PADDED)
    last = tl.load(ends + expert, mask=expert <= EXPERTS, other=0)
    first = tl.load(ends + expert - 1, mask=(expert > 0) & (expert <= EXPERTS), other=0)
    blocks = tl.where(expert <= EXPERTS, tl.cdiv(last - first, BLOCK_M), 0)
    block_ends = tl.cumsum(blocks)
    mine = (block_ends - blocks <= block) & (block < block_ends)  # true of one at most
    own = tl.sum(tl.where(mine, expert, 0))
    start = tl.sum(tl.where(mine, first + (block - block_ends + blocks) * BLOCK_M, 0))
    end = tl.sum(tl.where(mine, last, 0))
    if start < end:
        place = start + tl.arange(0, BLOCK_M)
        row = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
        out = column * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if own < EXPERTS:
            left = x + (row // REPEATS)[:, None] * x_row + inner[None, :] * x_in
            right = weight + own.to(tl.int64) * w_expert
            right += out[None, :] * w_out + inner[:, None] * w_in
            for k in range(0, K, BLOCK_K):
                a = tl.load(left, mask=(place < end)[:, None] & (inner < K - k)[None, :], other=0.0)
                b = tl.load(right, mask=(out < N)[None, :] & (inner < K - k)[:, None], other=0.0)
                sums = tl.dot(a, b, sums, input_precision=PRECISION)
                left += BLOCK_K * x_in
                right += BLOCK_K * w_in
        else:  # no such expert: nobody may take the result for one
            sums += float("nan")
        target = found + row[:, None] * found_row + out[None, :]
        mask = (place < end)[:, None] & (out < N)[None, :]
        tl.store(target, sums.to(found.dtype.element_ty), mask=mask)


@on_device_of_first
def product(x: Tensor, weight: Tensor, chosen: Tensor, blocks: _Blocks | None = None) -> Tensor:
    """``[S, I]``, ``[E, O, I]``, ``[S * n]`` -> ``[S * n, O]``: n experts for each row of x.

    NaN for an expert that does not exist.
    """
    rows, experts, width = len(chosen), len(weight), weight.shape[1]
    found = x.new_empty(rows, width)
    if not found.numel():
        return found
    blocks = blocks or _product_blocks(rows, experts, x.dtype)
    order, ends = _ordered(chosen, experts)
    most = rows // blocks.rows + min(rows, experts + 1)  # whole blocks, and one that is not
    beside = min(_SIDE_BY_SIDE, triton.next_power_of_2(most))
    product_kernel[(triton.cdiv(width, blocks.out) * triton.cdiv(most, beside) * beside,)](
        x, weight, found, order, ends, width, x.shape[1],
        *x.stride(), *weight.stride(), found.stride(0),
        experts, triton.next_power_of_2(experts + 1), rows // len(x), _precision(x.dtype),
        blocks.rows, blocks.out, blocks.summed, beside,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return found


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"  # tf32 says nothing of other types


# -- the gradient of the weights ---------------------------------------------------------------


def _outer_blocks(dtype: torch.dtype) -> _Blocks:
    return _Blocks(32, 64, 64, 4, 3) if dtype == torch.float32 else _Blocks(64, 128, 256, 8, 4)


@triton.jit
def outer_kernel(
    grad, x, found, order, ends, N, K,
    grad_row, grad_out, x_row, x_in, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``found[e] = sum over the rows r of e: grad[r] outer x[r]``, one tile."""
    own = tl.program_id(1)
    tile = tl.program_id(0)
    across = tl.cdiv(K, BLOCK_K)
    out = tile // across * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tile % across * BLOCK_K + tl.arange(0, BLOCK_K)
    start = tl.load(ends + own - 1, mask=own > 0, other=0)
    end = tl.load(ends + own)
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    place = start + tl.arange(0, BLOCK_M)
    following = tl.load(order + place, mask=place < end, other=0)
    for at in range(start, end, BLOCK_M):
        place = at + tl.arange(0, BLOCK_M)
        row = following.to(tl.int64)  # known a step early, so that only the tiles are waited for
        following = tl.load(order + place + BLOCK_M, mask=place + BLOCK_M < end, other=0)
        left = grad + row[None, :] * grad_row + out[:, None] * grad_out
        right = x + row[:, None] * x_row + inner[None, :] * x_in
        a = tl.load(left, mask=(out < N)[:, None] & (place < end)[None, :], other=0.0)
        b = tl.load(right, mask=(place < end)[:, None] & (inner < K)[None, :], other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    target = found + own.to(tl.int64) * N * K + out[:, None].to(tl.int64) * K + inner[None, :]
    mask = (out < N)[:, None] & (inner < K)[None, :]
    tl.store(target, sums.to(found.dtype.element_ty), mask=mask)


@on_device_of_first
def outer(
    grad: Tensor, x: Tensor, chosen: Tensor, experts: int, blocks: _Blocks | None = None
) -> Tensor:
    """``[S, O]``, ``[S, I]``, ``[S]`` -> ``[experts, O, I]``."""
    height, width = grad.shape[1], x.shape[1]
    found = x.new_empty(experts, height, width)
    if not found.numel():
        return found
    order, ends = _ordered(chosen, experts)
    blocks = blocks or _outer_blocks(x.dtype)
    tiles = triton.cdiv(height, blocks.out) * triton.cdiv(width, blocks.summed)
    outer_kernel[(tiles, experts)](
        grad, x, found, order, ends, height, width,
        *grad.stride(), *x.stride(), _precision(x.dtype), blocks.rows, blocks.out, blocks.summed,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return found
