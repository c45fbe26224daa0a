"""`fxport::attention` by Triton kernels of our own, forward and backward: the host side.

Covers the whole op for head sizes up to 256, except float64 and empty tensors. Backward is
deterministic. Memory beside the results is linear in the lengths; a bias gets a gradient of its own
shape, no larger.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fxport.ops.facts import Facts
from fxport.ops.layout import addressable, empty_heads
from fxport.ops.params import AttentionParams
from fxport.ops.triton_backward import delta_kernel, key_kernel, query_kernel
from fxport.ops.triton_bias import bias_kernel, exact_norm_kernel
from fxport.ops.triton_call import FARTHEST, INTERPRETED, Call, Incoming, tile_descriptor
from fxport.ops.triton_config import group_parts, padded_head_size
from fxport.ops.triton_forward import forward_kernel
from fxport.ops.triton_tiles import FLOAT_BIAS

__all__ = ["backward", "forward", "refuses"]

MAX_HEAD_SIZE = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DELTA_ROWS = 32
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
    blocks = call.blocks("forward_bias" if call.has_bias_tiles else "forward")
    forward_kernel[(triton.cdiv(rows, blocks.m) * batch * heads,)](
        out_ptr=out,
        lse_ptr=lse,
        sinks_ptr=call.sinks,
        out_stride_b=out.stride(0),
        out_stride_h=out.stride(1),
        out_stride_t=out.stride(2),
        heads=heads,
        v_size=v.shape[3],
        PLAIN=call.plain,
        SINKS=sinks is not None,
        RAGGED=k.shape[2] % blocks.n != 0,
        **call.arguments(blocks),
    )
    return out, lse


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
    lse = lse.contiguous()
    incoming = _incoming(call, out, lse, grad_out, grad_lse)
    dq = dk = dv = dbias = dsinks = dslopes = None
    if needs[0] or needs[5]:
        dq, dslopes = _query_gradients(call, incoming, needs[5])
    if needs[1] or needs[2]:
        dk, dv = _key_gradients(call, incoming)
    if needs[3] and bias is not None:
        dbias = _bias_gradient(call, bias, incoming)
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
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> Incoming:
    """out's gradient, lse and delta in the form that the kernels read."""
    batch, heads, rows, v_size = out.shape
    line = triton.cdiv(rows, _LINE) * _LINE
    norm = lse.new_empty((batch * heads, line))
    delta = torch.empty_like(norm)
    grad = addressable(grad_out)
    width = padded_head_size(v_size)
    delta_kernel[(line // _DELTA_ROWS * batch * heads,)](
        tile_descriptor(addressable(out), _DELTA_ROWS, width),
        tile_descriptor(grad, _DELTA_ROWS, width),
        lse, None if grad_lse is None else grad_lse.contiguous(), norm, delta, heads, rows, line,
        BLOCK_M=_DELTA_ROWS, BLOCK_DV=width, LSE_GRAD=grad_lse is not None,
        LOG2=not call.bias_kind & FLOAT_BIAS.value,
    )  # fmt: skip
    rest = _split_norm(call, norm) if call.bias_kind & FLOAT_BIAS.value else None
    return Incoming(grad, norm, delta, rest)


def _split_norm(call: Call, norm: Tensor) -> Tensor:
    """`exact_norm_kernel`: changes norm, returns rest."""
    blocks = call.blocks("bias")
    rest = torch.empty_like(norm)
    exact_norm_kernel[(norm.shape[1] // blocks.m * norm.shape[0],)](
        norm_ptr=norm,
        rest_ptr=rest,
        sinks_ptr=call.sinks,
        heads=call.q.shape[1],
        line_length=norm.shape[1],
        SINKS=call.sinks is not None,
        **call.arguments(blocks),
    )
    return rest


def _query_gradients(call: Call, incoming: Incoming, slopes: bool) -> tuple[Tensor, Tensor | None]:
    """dq, and the slopes' gradient [Hq] in float32 if wanted."""
    batch, heads, rows, size = call.q.shape
    dq = empty_heads(call.q, batch, heads, rows, size)
    dslope = incoming.delta.new_empty((batch, heads, rows)) if slopes else None
    blocks = call.blocks("query")
    query_kernel[(triton.cdiv(rows, blocks.m) * batch * heads,)](
        dq_ptr=dq,
        dslope_ptr=dslope,
        dq_stride_b=dq.stride(0),
        dq_stride_h=dq.stride(1),
        dq_stride_t=dq.stride(2),
        heads=heads,
        size=size,
        grad_scale=call.params.scale,
        PLAIN=call.plain,
        RAGGED=call.k.shape[2] % blocks.n != 0,
        SLOPE_GRAD=slopes,
        **call.arguments(blocks, incoming),
    )
    return dq, None if dslope is None else dslope.sum((0, 2))


def _key_gradients(call: Call, incoming: Incoming) -> tuple[Tensor, Tensor]:
    """dk and dv."""
    batch, kv_heads, columns, size = call.k.shape
    v_size = call.v.shape[3]
    group = call.q.shape[1] // kv_heads
    blocks = call.blocks("key")
    tiles = triton.cdiv(columns, blocks.n)
    parts = group_parts(batch * kv_heads * tiles, group, INTERPRETED)
    if parts == 1:
        dk = empty_heads(call.k, batch, kv_heads, columns, size)[None]
        dv = empty_heads(call.v, batch, kv_heads, columns, v_size)[None]
    else:
        dk = call.k.new_empty((parts, *call.k.shape), dtype=torch.float32)
        dv = call.v.new_empty((parts, *call.v.shape), dtype=torch.float32)
    key_kernel[(tiles * batch * kv_heads, parts)](
        dk_ptr=dk,
        dv_ptr=dv,
        **{f"dk_stride_{name}": stride for name, stride in zip("sbht", dk.stride(), strict=False)},
        **{f"dv_stride_{name}": stride for name, stride in zip("sbht", dv.stride(), strict=False)},
        kv_heads=kv_heads,
        group_part=group // parts,
        size=size,
        v_size=v_size,
        grad_scale=call.params.scale,
        PLAIN=call.plain,
        **call.arguments(blocks, incoming),
    )
    if parts == 1:
        return dk[0], dv[0]
    summed_k = empty_heads(call.k, batch, kv_heads, columns, size).copy_(dk.sum(0))
    return summed_k, empty_heads(call.v, batch, kv_heads, columns, v_size).copy_(dv.sum(0))


def _bias_gradient(call: Call, bias: Tensor, incoming: Incoming) -> Tensor:
    """The gradient of a floating bias, in its shape and dtype."""
    batch, heads, rows, _ = call.q.shape
    columns = call.k.shape[2]
    shape = torch.Size([1] * (4 - bias.dim()) + list(bias.shape))
    sum_rows = shape[2] == 1 and rows > 1
    sum_keys = shape[3] == 1 and columns > 1
    whole = not (sum_rows or sum_keys)
    blocks = call.blocks("bias")
    if whole:
        dbias = bias.new_empty(shape)
    else:
        line = (rows, 1) if sum_keys else (1, columns)
        dbias = bias.new_empty((batch, heads, *line), dtype=torch.float32)
    key_blocks = 1 if sum_keys else triton.cdiv(columns, blocks.n)
    row_blocks = 1 if sum_rows and not sum_keys else triton.cdiv(rows, blocks.m)
    bias_kernel[(row_blocks * key_blocks, dbias.shape[0] * dbias.shape[1])](
        dbias_ptr=dbias,
        heads=heads,
        bias_heads=dbias.shape[1],
        served_batches=batch // dbias.shape[0],
        served_heads=heads // dbias.shape[1],
        SUM_ROWS=sum_rows,
        SUM_KEYS=sum_keys,
        **call.arguments(blocks, incoming),
    )
    if whole:
        return dbias.view(bias.shape)
    return dbias.sum_to_size(shape).to(bias.dtype).view(bias.shape)
