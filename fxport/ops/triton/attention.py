"""`fxport::attention` by Triton kernels of our own, forward and backward: the host side.

Covers the whole op for head sizes up to 256, except float64 and empty tensors. The same bits every
run, except dq where the kernel in Gluon makes it (`gluon`); under
``torch.use_deterministic_algorithms`` that one is not used. Memory beside the results is linear in
the lengths; a bias gets a gradient of its own shape, no larger.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from fxport.ops.facts import Facts
from fxport.ops.layout import addressable, empty_heads
from fxport.ops.params import AttentionParams
from fxport.ops.triton import gluon
from fxport.ops.triton.backward import delta_kernel, key_kernel, query_kernel
from fxport.ops.triton.bias import bias_kernel, exact_norm_kernel
from fxport.ops.triton.call import (
    FARTHEST,
    INTERPRETED,
    Call,
    Incoming,
    comes_in_tiles,
    layout_of,
    tile_descriptor,
)
from fxport.ops.triton.config import Blocks, fills_the_gpu, group_parts, padded_head_size
from fxport.ops.triton.forward import forward_kernel
from fxport.ops.triton.launch import Launches, on_device_of_first
from fxport.ops.triton.tiles import FLOAT_BIAS

__all__ = ["backward", "forward", "refuses"]

MAX_HEAD_SIZE = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DELTA_ROWS = 32
# 16-bit sums of so few are as near as eager's, which rounds each batch's part
_ADDED_BATCHES = 8
_QKV = (True, True, True, False, False, False)
_LINE = 128  # every kernel's block of rows divides it


def refuses(facts: Facts) -> str | None:
    """Why these kernels cannot compute a call; None if they can."""
    if facts.dtype not in _DTYPES:
        return f"no Triton kernel for {facts.dtype}"
    if max(facts.q_shape[3], facts.v_shape[3]) > MAX_HEAD_SIZE:
        return f"head size above {MAX_HEAD_SIZE}"
    if 0 in (*facts.q_shape, *facts.k_shape, *facts.v_shape):
        return "an empty tensor has no tiles"
    if max(facts.q_shape[2], facts.k_shape[2]) >= FARTHEST:
        return f"length of {FARTHEST} or more"
    return None


@on_device_of_first
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
    batch, heads, rows, _ = q.shape
    out = empty_heads(q, batch, heads, rows, v.shape[3])
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
    call = Call.of(q, k, v, bias, sinks, alibi_slopes, cu_seqlens, seed, params)
    tensors = {**call.tensors(), "out_ptr": out, "lse_ptr": lse, "sinks_ptr": call.sinks}

    def prepare() -> tuple[tuple[int], dict[str, Any]]:
        blocks = call.blocks("forward")
        return (triton.cdiv(rows, blocks.m) * batch * heads,), {
            "out_stride_b": out.stride(0),
            "out_stride_h": out.stride(1),
            "out_stride_t": out.stride(2),
            "heads": heads,
            "v_size": v.shape[3],
            "PLAIN": call.plain,
            "SINKS": sinks is not None,
            "section": batch * heads,
            "RAGGED": k.shape[2] % blocks.n != 0,
            **call.arguments(blocks, tensors),
        }

    if gluon.refuses(call) is None:
        gluon.forward(call, call.launches(), out, lse)
    else:
        call.launches().launch(forward_kernel, tensors, prepare)
    return out, lse


@on_device_of_first
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
    """Gradients of (q, k, v, bias, sinks, alibi_slopes); None where `needs` is False.

    The sinks' gradient needs no kernel: a sink is a key with value zero, so its dp is zero and its
    ds is ``-exp(sink - lse) * delta``.
    """
    call = Call.of(q, k, v, bias, sinks, alibi_slopes, cu_seqlens, seed, params)
    lse, out, grad = lse.contiguous(), addressable(out), addressable(grad_out)
    bias_shape = None if bias is None else bias.shape  # `call` has it expanded
    launches = call.launches(needs, bias_shape, *map(layout_of, (out, lse, grad, grad_lse)))
    incoming = _incoming(call, launches, out, lse, grad, grad_lse)
    dq = dk = dv = dbias = dsinks = dslopes = None
    of_keys = needs[3] and bias is not None and _same_in_all_rows(bias, call)
    of_queries = needs[3] and bias is not None and _made_with_dq(bias, call)
    if bias is not None and of_queries:
        dbias = bias.new_empty(_leading(bias))
    if all(needs[:3]) and gluon.refuses_backward(call, dbias) is None:
        dq, dk, dv = gluon.backward(call, launches, incoming, dbias)
    elif needs[0] or needs[5] or of_queries:
        dq, dslopes = _query_gradients(call, launches, incoming, needs[5], dbias)
    if bias is not None and dbias is not None:
        dbias = dbias.view(bias.shape)
    if dk is None and (needs[1] or needs[2] or of_keys):
        dk, dv, line = _key_gradients(call, launches, incoming, of_keys)
        if bias is not None and line is not None:
            dbias = _summed(line, bias)
    if needs[3] and bias is not None and not of_keys and not of_queries:
        dbias = _bias_gradient(call, launches, bias, incoming)
    if needs[4] and sinks is not None:
        weight = torch.exp(sinks.float()[:, None] - lse.masked_fill(lse == -torch.inf, torch.inf))
        dsinks = (
            -(weight * incoming.delta.view(*lse.shape[:2], -1)[..., : lse.shape[2]])
            .sum((0, 2))
            .to(sinks.dtype)
        )
    if dslopes is not None and alibi_slopes is not None:
        dslopes = dslopes.to(alibi_slopes.dtype)
    found = (dq, dk, dv, dbias, dsinks, dslopes)
    return tuple(x if need else None for x, need in zip(found, needs, strict=True))


def _incoming(
    call: Call, launches: Launches, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None
) -> Incoming:
    """out's gradient, lse and delta in the form that the kernels read."""
    batch, heads, rows, v_size = out.shape
    line = triton.cdiv(rows, _LINE) * _LINE
    norm = lse.new_empty((batch * heads, line))
    delta = torch.empty_like(norm)
    tensors = {
        "out_desc": out,
        "grad_desc": grad,
        "lse_ptr": lse,
        "grad_lse_ptr": None if grad_lse is None else grad_lse.contiguous(),
        "norm_ptr": norm,
        "delta_ptr": delta,
    }

    def prepare() -> tuple[tuple[int], dict[str, Any]]:
        width = padded_head_size(v_size)
        return (line // _DELTA_ROWS * batch * heads,), {
            **tensors,
            "out_desc": tile_descriptor(out, _DELTA_ROWS, width),
            "grad_desc": tile_descriptor(grad, _DELTA_ROWS, width),
            "heads": heads,
            "rows": rows,
            "line": line,
            "BLOCK_M": _DELTA_ROWS,
            "BLOCK_DV": width,
            "LSE_GRAD": grad_lse is not None,
            "LOG2": not call.bias_kind & FLOAT_BIAS.value,
        }

    launches.launch(delta_kernel, tensors, prepare)
    rest = _split_norm(call, launches, norm) if call.bias_kind & FLOAT_BIAS.value else None
    return Incoming(grad, norm, delta, rest)


def _split_norm(call: Call, launches: Launches, norm: Tensor) -> Tensor:
    """`exact_norm_kernel`: changes norm, returns rest."""
    rest = torch.empty_like(norm)
    tensors = {**call.tensors(), "norm_ptr": norm, "rest_ptr": rest, "sinks_ptr": call.sinks}

    def prepare() -> tuple[tuple[int], dict[str, Any]]:
        blocks = call.blocks("bias_line")
        return (norm.shape[1] // blocks.m * norm.shape[0],), {
            "heads": call.q.shape[1],
            "line_length": norm.shape[1],
            "SINKS": call.sinks is not None,
            **call.arguments(blocks, tensors),
        }

    launches.launch(exact_norm_kernel, tensors, prepare)
    return rest


def _query_gradients(
    call: Call, launches: Launches, incoming: Incoming, slopes: bool, dbias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """dq; if wanted, the slopes' gradient [Hq] in float32. Writes dbias, see `_made_with_dq`."""
    batch, heads, rows, size = call.q.shape
    dq = empty_heads(call.q, batch, heads, rows, size)
    dslope = incoming.delta.new_empty((batch, heads, rows)) if slopes else None
    tensors = {
        **call.tensors(incoming),
        "dq_ptr": dq,
        "dslope_ptr": dslope,
        "dbias_ptr": dbias,
        "dbias_desc": dbias,
    }
    shared = dbias is not None and dbias.shape[0] < batch

    def prepare(kernel: str, first: int, batches: int) -> tuple[tuple[int], dict[str, Any]]:
        blocks = call.blocks(kernel)
        return (triton.cdiv(rows, blocks.m) * batches * heads,), {
            "dq_stride_b": dq.stride(0),
            "dq_stride_h": dq.stride(1),
            "dq_stride_t": dq.stride(2),
            "dbias_stride_b": 0 if dbias is None or shared else dbias.stride(0),
            "first_line": first * heads,
            "heads": heads,
            "size": size,
            "section": call.section(call.k, call.v) * (heads // call.k.shape[1]),
            "grad_scale": call.params.scale,
            "PLAIN": call.plain,
            "RAGGED": call.k.shape[2] % blocks.n != 0,
            "SLOPE_GRAD": slopes,
            "BIAS_GRAD": dbias is not None,
            "GRAD_ADDS": first > 0,
            **call.arguments(blocks, tensors),
            **_written(dbias, blocks),
        }

    each = 1 if shared else batch
    for first in range(0, batch, each):
        kernel = "query" if dbias is None else "query_add" if first else "query_grad"
        prepared = partial(prepare, kernel, first, each)
        launches.launch(query_kernel, tensors, prepared, f"{kernel} {first}")
    return dq, None if dslope is None else dslope.sum((0, 2))


def _key_gradients(
    call: Call, launches: Launches, incoming: Incoming, bias_too: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dk, dv and, if wanted, the gradient of a bias that is the same in all rows: `_summed`."""
    batch, kv_heads, columns, size = call.k.shape
    v_size = call.v.shape[3]
    group = call.q.shape[1] // kv_heads
    kernels = ("key_only", "value_only") if call.keys_apart else ("key",)
    tiles = triton.cdiv(columns, call.blocks(kernels[0]).n)
    parts = group_parts(batch * kv_heads * tiles, group, INTERPRETED)
    if parts == 1:
        dk = empty_heads(call.k, batch, kv_heads, columns, size)[None]
        dv = empty_heads(call.v, batch, kv_heads, columns, v_size)[None]
    else:
        dk = call.k.new_empty((parts, *call.k.shape), dtype=torch.float32)
        dv = call.v.new_empty((parts, *call.v.shape), dtype=torch.float32)
    heads = call.q.shape[1]
    line = incoming.delta.new_empty((batch, heads, 1, columns)) if bias_too else None
    tensors = {**call.tensors(incoming), "dk_ptr": dk, "dv_ptr": dv, "dbias_ptr": line}

    def prepare(kernel: str) -> tuple[tuple[int, int], dict[str, Any]]:
        strides = {}
        for name, x in (("dk", dk), ("dv", dv)):
            letters = zip("sbht", x.stride(), strict=False)
            strides.update({f"{name}_stride_{letter}": stride for letter, stride in letters})
        blocks = call.blocks(kernel)
        return (triton.cdiv(columns, blocks.n) * batch * kv_heads, parts), {
            **strides,
            "kv_heads": kv_heads,
            "group_part": group // parts,
            "section": call.section(call.q, incoming.grad),
            "BIAS_GRAD": bias_too and kernel != "value_only",
            "OF_K": kernel != "value_only",
            "OF_V": kernel != "key_only",
            "size": size,
            "v_size": v_size,
            "grad_scale": call.params.scale,
            "PLAIN": call.plain,
            **call.arguments(blocks, tensors),
        }

    for kernel in kernels:
        launches.launch(key_kernel, tensors, partial(prepare, kernel), kernel)
    if parts == 1:
        return dk[0], dv[0], line
    summed_k = empty_heads(call.k, batch, kv_heads, columns, size).copy_(dk.sum(0))
    summed_v = empty_heads(call.v, batch, kv_heads, columns, v_size).copy_(dv.sum(0))
    return summed_k, summed_v, line


def _leading(bias: Tensor) -> tuple[int, ...]:
    """The four dimensions of a bias."""
    return (*[1] * (4 - bias.dim()), *bias.shape)


def _made_with_dq(bias: Tensor, call: Call) -> bool:
    """Whether a bias' gradient is written where dq is made.

    For a bias of all heads and both lengths, which belongs to one batch, or to a few: those come
    one after the other and add up in the bias' dtype.
    """
    batch, heads, rows, _ = call.q.shape
    lead = _leading(bias)
    if lead[1:] != (heads, rows, call.k.shape[2]):
        return False
    if lead[0] == batch:
        return True
    blocks = call.blocks_or_none("query_add")
    in_tiles = lead[3] * bias.element_size() % 16 == 0
    if blocks is None or batch > _ADDED_BATCHES or not in_tiles:
        return False
    return fills_the_gpu(triton.cdiv(rows, blocks.m) * heads, INTERPRETED)


def _same_in_all_rows(bias: Tensor, call: Call) -> bool:
    """Whether a bias is broadcast over rows, and over rows only."""
    rows, columns = call.q.shape[2], call.k.shape[2]
    one_row = bias.dim() < 2 or bias.shape[-2] == 1
    return one_row and rows > 1 and bias.shape[-1:] == (columns,) and columns > 1


def _written(dbias: Tensor | None, blocks: Blocks) -> dict[str, Any]:
    """How kernels write the bias' gradient [.., .., Tq, Tk]: in whole tiles, where they can."""
    if dbias is None or not comes_in_tiles(dbias):
        return {"dbias_desc": None, "GRAD_TILES": False}
    return {"dbias_desc": tile_descriptor(dbias, blocks.m, blocks.n), "GRAD_TILES": True}


def _summed(line: Tensor, bias: Tensor) -> Tensor:
    """A bias' gradient from that of every batch and head."""
    return line.sum_to_size(_leading(bias)).to(bias.dtype).view(bias.shape)


def _bias_gradient(call: Call, launches: Launches, bias: Tensor, incoming: Incoming) -> Tensor:
    """The gradient of a floating bias, in its shape and dtype; not `_same_in_all_rows`."""
    batch, heads, rows, _ = call.q.shape
    columns = call.k.shape[2]
    shape = _leading(bias)
    sum_keys = shape[3] == 1 and columns > 1
    if sum_keys:
        dbias = bias.new_empty((batch, heads, rows, 1), dtype=torch.float32)
    else:
        dbias = bias.new_empty(shape)
    lines = {"norm_ptr": incoming.norm, "rest_ptr": incoming.rest, "delta_ptr": incoming.delta}
    tensors = {**call.tensors(), "grad_desc": incoming.grad, **lines, "dbias_ptr": dbias}
    tensors["dbias_desc"] = None if sum_keys else dbias

    def prepare() -> tuple[tuple[int, int], dict[str, Any]]:
        blocks = call.blocks("bias_line" if sum_keys else "bias")
        key_blocks = 1 if sum_keys else triton.cdiv(columns, blocks.n)
        return (triton.cdiv(rows, blocks.m) * key_blocks, dbias.shape[0] * dbias.shape[1]), {
            "heads": heads,
            "line_length": incoming.norm.shape[1],
            "bias_heads": dbias.shape[1],
            "served_batches": batch // dbias.shape[0],
            "served_heads": heads // dbias.shape[1],
            "SUM_KEYS": sum_keys,
            **call.arguments(blocks, tensors),
            **_written(None if sum_keys else dbias, blocks),
        }

    launches.launch(bias_kernel, tensors, prepare)
    return _summed(dbias, bias) if sum_keys else dbias.view(bias.shape)
