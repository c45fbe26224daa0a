"""The op `fxport::attention` and its backward: schemas, kernels, fake kernels, autograd, autocast.

Both are opaque to tracing: a graph holds one node per call, whatever implementation
`fxport.ops.dispatch` chooses when it runs. What the arguments mean is said in `fxport.ops.params`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxport.ops import dispatch
from fxport.ops.chunks import Chunks
from fxport.ops.facts import Needs
from fxport.ops.layout import empty_heads
from fxport.ops.opaque import Below, autocast, differentiate, opaque_op
from fxport.ops.params import AttentionParams
from fxport.ops.plans import plan
from fxport.ops.validate import check_arguments, check_segments, check_transforms

__all__ = ["attention"]

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, {saved}"
    "Tensor? bias, Tensor? sinks, Tensor? alibi_slopes, Tensor? cu_seqlens, Tensor? seed, "
)
_NUMBERS = (
    "float scale, bool causal, SymInt window_left, SymInt window_right, float softcap, "
    "float dropout_p, SymInt q_offset, SymInt head_offset, SymInt chunk{default}"
)
_FORWARD_SCHEMA = (
    f"({_TENSORS.format(saved='')}{_NUMBERS.format(default='=0')}) -> (Tensor out, Tensor lse)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_lse, "
    f"{_TENSORS.format(saved='Tensor out, Tensor lse, ')}{_NUMBERS.format(default='')}, "
    "bool[] needs) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, "
    "Tensor grad_bias, Tensor grad_sinks, Tensor grad_alibi_slopes)"
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seed: Tensor | None = None,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """Softmax attention as `AttentionParams` defines it; calls ``torch.ops.fxport.attention``.

    Every floating argument is differentiable, and so is lse; once only (no double backward).

    Args:
        q: ``[B, Hq, Tq, D]``, float32, float64, bfloat16 or float16.
        k: ``[B, Hkv, Tk, D]`` with ``Hq % Hkv == 0``; query head h uses ``h // (Hq // Hkv)``.
        v: ``[B, Hkv, Tk, Dv]``.
        bias: broadcastable to ``[B, Hq, Tq, Tk]``; floating: added after the softcap; bool: False
            forbids.
        sinks: ``[Hq]``, floating.
        alibi_slopes: ``[Hq]``, floating.
        cu_seqlens: int32 ``[N + 1]``, rising from 0 to Tq == Tk, with B == 1: row i sees only the
            columns of its own segment. Values are checked on CPU only: elsewhere the check would
            wait for the device.
        seed: int64 ``[1]``; required with dropout. Same seed, same mask: `fxport.ops.dropout`.
        params: the numbers of the call.

    Returns:
        out ``[B, Hq, Tq, Dv]`` in q's dtype, always laid out as ``[B, Tq, Hq, Dv]`` in memory, so
        that ``out.transpose(1, 2).reshape(B, Tq, -1)`` copies nothing (the gradients of q, k and v
        likewise); lse ``[B, Hq, Tq]``, contiguous, float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument is outside the above; the message names it.
        NotImplementedError: under ``torch.vmap`` or forward-mode differentiation.

    Under autocast q, k and v are cast to autocast's dtype, as in
    ``F.scaled_dot_product_attention``; the other arguments keep theirs, since softmax runs in
    float32 anyway. float64 inputs are left alone, again as there.
    """
    return torch.ops.fxport.attention(
        q, k, v, bias, sinks, alibi_slopes, cu_seqlens, seed, *_numbers(params)
    )


def _numbers(params: AttentionParams) -> tuple[float, bool, int, int, float, float, int, int, int]:
    """The scalar arguments of the schemas, in order."""
    return (
        params.scale,
        params.causal,
        params.window_left,
        params.window_right,
        params.softcap,
        params.dropout_p,
        params.q_offset,
        params.head_offset,
        params.chunk,
    )


# -- forward -----------------------------------------------------------------------------------


@opaque_op("fxport::attention", _FORWARD_SCHEMA)
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    *numbers: Any,
) -> tuple[Tensor, Tensor]:
    check_transforms()
    chunks = Chunks.of(q, cu_seqlens, numbers)
    if chunks is not None:
        params = AttentionParams(*numbers)
        check_arguments(q, k, v, bias, sinks, alibi_slopes, cu_seqlens, seed, params)
        folded = [chunks.fold(x) for x in (q, k, v)]
        borders = chunks.borders(q.device)
        others = (None, sinks, alibi_slopes, borders, seed)
        out, lse = _attention(*folded, *others, *chunks.numbers(numbers))
        return chunks.unfold(out), chunks.unfold_rows(lse)
    tensors = (q, k, v, bias, sinks, alibi_slopes, cu_seqlens, seed)
    params, chosen = plan(tensors, numbers)
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        check_segments(cu_seqlens, q.shape[2])
    dispatch.calls[f"{chosen.name}.forward"] += 1
    return chosen.forward(*tensors, params)


@torch.library.register_fake("fxport::attention")
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    *numbers: Any,
) -> tuple[Tensor, Tensor]:
    params = AttentionParams(*numbers)
    check_transforms()
    check_arguments(q, k, v, bias, sinks, alibi_slopes, cu_seqlens, seed, params)
    batch, heads, rows, _ = q.shape
    out = empty_heads(q, batch, heads, rows, v.shape[3])
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty((batch, heads, rows), dtype=compute)


# -- backward ----------------------------------------------------------------------------------


@opaque_op("fxport::attention_backward", _BACKWARD_SCHEMA)
def _attention_backward(
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
    *numbers_and_needs: Any,
) -> tuple[Tensor, ...]:
    *numbers, wanted = numbers_and_needs
    needs: Needs = tuple(wanted)
    chunks = Chunks.of(q, cu_seqlens, numbers)
    if chunks is not None:
        grad_out, q, k, v, out = (chunks.fold(x) for x in (grad_out, q, k, v, out))
        lse = chunks.fold_rows(lse)
        grad_lse = None if grad_lse is None else chunks.fold_rows(grad_lse)
        borders = chunks.borders(q.device)
        folded = (None, sinks, alibi_slopes, borders, seed)
        grads = _attention_backward(
            grad_out, grad_lse, q, k, v, out, lse, *folded, *chunks.numbers(numbers), wanted
        )
        operands = zip(grads[:3], needs, strict=False)
        return (*(chunks.unfold(g) if need else g for g, need in operands), *grads[3:])
    others = (bias, sinks, alibi_slopes, cu_seqlens, seed)
    params, chosen = plan((q, k, v, *others), tuple(numbers), needs, grad_lse is not None)
    dispatch.calls[f"{chosen.name}.backward"] += 1
    grads = chosen.backward(grad_out, grad_lse, q, k, v, out, lse, *others, params, needs)
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("fxport::attention_backward")
def _attention_backward_fake(
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
    *numbers_and_needs: Any,
) -> tuple[Tensor, ...]:
    needs: Needs = tuple(numbers_and_needs[-1])
    grads: list[Tensor] = []
    for x, need in zip((q, k, v, bias, sinks, alibi_slopes), needs, strict=True):
        if x is None or not need:
            grads.append(q.new_empty(0))
        elif len(grads) < 3:
            batch, heads, length, size = x.shape
            grads.append(empty_heads(x, batch, heads, length, size))
        else:
            grads.append(x.new_empty(x.shape))
    return tuple(grads)


# -- autograd, autocast, vmap --------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """Forward saves what was given and computed, backward is one call of the other op."""

    @staticmethod
    def forward(ctx: Any, below: Below, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = below(*arguments)
        ctx.numbers = (*arguments[8:], 0)[:9]  # no default of the schema is passed on
        ctx.save_for_backward(*arguments[:8], out, lse)
        ctx.set_materialize_grads(False)  # an unused lse gives no gradient instead of zeros
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, *others, out, lse = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:7])
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = torch.ops.fxport.attention_backward.default(
            grad_out, grad_lse, q, k, v, out, lse, *others, *ctx.numbers, needs
        )
        wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return (None, *wanted, *([None] * (len(ctx.needs_input_grad) - 7)))


class _AttentionBackward(torch.autograd.Function):
    """Second derivatives are refused."""

    @staticmethod
    def forward(ctx: Any, below: Below, *arguments: Any) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = below(*arguments)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "fxport::attention has no second derivatives (create_graph=True): differentiate the "
            "original model, whose attention is written out"
        )


differentiate("fxport::attention", _Attention)
differentiate("fxport::attention_backward", _AttentionBackward)
autocast("fxport::attention", operands=3)


def _refuse_vmap(*_: Any) -> Any:
    raise NotImplementedError(
        "fxport::attention has no vmap rule: make the mapped dimension part of the batch"
    )


torch.library.register_vmap("fxport::attention", _refuse_vmap)
torch.library.register_vmap("fxport::attention_backward", _refuse_vmap)
