"""`fxport::attention` by ATen's CPU flash kernel, for the calls that it computes exactly.

It is the fastest path on CPU. Beyond what the kernel does itself (all keys, or causal from the
first row and column on), three things are built around it at no quadratic cost: kv heads are
repeated and their gradients summed; a sink rescales the output; packed segments are called one by
one. What torch 2.13's kernel gets wrong is kept from it or put right: an empty dimension ends the
process with SIGFPE, causality with a scale that is not positive gives NaN, and a row whose mask
forbids every column gets lse 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fxport.ops.band import Band, band_of
from fxport.ops.facts import Facts
from fxport.ops.layout import empty_heads, in_heads_layout, in_row_major_layout
from fxport.ops.params import AttentionParams

__all__ = ["backward", "forward", "refuses"]

_CAUSAL, _ALL = Band(None, 0), Band(None, None)
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def refuses(facts: Facts) -> str | None:
    """Why the kernel cannot compute a call; None if it can."""
    if facts.params.dropout_p > 0 or facts.params.softcap > 0 or facts.alibi_slopes:
        return "dropout, softcap and ALiBi are not in the kernel"
    if facts.q_shape[3] != facts.v_shape[3]:
        return "q and v have different head sizes"
    if 0 in facts.q_shape or 0 in facts.k_shape:
        return "a dimension is empty"
    if facts.params.scale <= 0:
        return "the kernel scales after it has filled in -inf, which gives NaN unless scale > 0"
    if facts.band not in (_CAUSAL, _ALL):
        return "the kernel knows all keys, or causal from the first row and column on"
    if facts.bias_dtype is not None and (
        facts.bias_dtype != torch.bool or facts.bias_shape[-2:-1] not in ((), (1,))
    ):
        return "of biases, only a bool mask of keys is used"
    if facts.bias_dtype is not None and (facts.packed or facts.band != _ALL):
        return "a mask of keys together with causality or packing can leave rows empty"
    if facts.lse_gradient:
        return "the kernel takes no gradient of lse"
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
    q, k, v = (_with_dense_rows(x) for x in (q, _per_query_head(k, q), _per_query_head(v, q)))
    mask, causal = _key_mask(bias, q), _is_causal(q, k, params)
    if cu_seqlens is None:
        out, lse = _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=params.scale)
    else:
        out, lse = empty_heads(q, *q.shape), q.new_empty(q.shape[:3], dtype=_compute_dtype(q))
        for part in _segments(cu_seqlens):
            out[:, :, part], lse[:, :, part] = _flash(
                q[:, :, part], k[:, :, part], v[:, :, part], 0.0, causal, scale=params.scale
            )
    if mask is not None:
        lse = lse.masked_fill(mask.amax(-1) == -torch.inf, -torch.inf)
    if sinks is not None:  # one more column in the denominator
        lse_without, lse = lse, torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        share = torch.exp(lse_without - lse).nan_to_num(0.0)  # both -inf: nothing has weight
        out = (out * share[..., None]).to(q.dtype)
    return in_heads_layout(out), in_row_major_layout(lse)


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
    """Gradients of q, k, v, bias, sinks, alibi_slopes; None where `needs` is False.

    The kernel computes ``p = exp(s - lse)`` and ``delta = <dO, O>``; given the out and the lse
    that include the sink, both are right without knowing of it.
    """
    grads: list[Tensor | None] = [None] * 6
    if any(needs[:3]):
        everything = _gradients(grad_out, q, k, v, out, lse, bias, cu_seqlens, params)
        for index, (grad, x) in enumerate(zip(everything, (q, k, v), strict=True)):
            if needs[index]:
                grads[index] = in_heads_layout(_sum_to_kv_heads(grad, x))
    if needs[4] and sinks is not None:
        delta = (grad_out.to(lse.dtype) * out).sum(-1)
        weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse).nan_to_num(0.0)  # as in forward
        grads[4] = -(weight * delta).sum((0, 2)).to(sinks.dtype)
    return tuple(grads)


def _gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    params: AttentionParams,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's gradients of q, k and v, the last two per query head."""
    k, v = _per_query_head(k, q), _per_query_head(v, q)
    grad_out, q, k, v, out = (_with_dense_rows(x) for x in (grad_out, q, k, v, out))
    mask, causal = _key_mask(bias, q), _is_causal(q, k, params)
    if mask is not None:  # a row may see nothing, and exp(-inf - 0) is 0, exp(-inf + inf) is not
        lse = lse.masked_fill(lse == -torch.inf, 0)
    if cu_seqlens is None:
        grads: tuple[Tensor, Tensor, Tensor] = _flash_backward(
            grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=params.scale
        )
        return grads
    grad_q, grad_k, grad_v = (empty_heads(x, *x.shape) for x in (q, k, v))
    for part in _segments(cu_seqlens):
        of_part = (x[:, :, part] for x in (grad_out, q, k, v, out, lse))
        grad_q[:, :, part], grad_k[:, :, part], grad_v[:, :, part] = _flash_backward(
            *of_part, 0.0, causal, scale=params.scale
        )
    return grad_q, grad_k, grad_v


def _is_causal(q: Tensor, k: Tensor, params: AttentionParams) -> bool:
    return band_of(params, q.shape[2], k.shape[2]) == _CAUSAL


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _with_dense_rows(x: Tensor) -> Tensor:
    """The kernel addresses rows as if their entries were neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _per_query_head(kv: Tensor, q: Tensor) -> Tensor:
    groups = q.shape[1] // kv.shape[1]
    return kv if groups == 1 else kv.repeat_interleave(groups, dim=1)


def _sum_to_kv_heads(grad: Tensor, x: Tensor) -> Tensor:
    """``[B, Hq, T, D]`` summed over the query heads that share a head of x, in float32."""
    if grad.shape == x.shape:
        return grad
    groups = grad.unflatten(1, (x.shape[1], -1))
    return groups.sum(2, dtype=_compute_dtype(x)).to(x.dtype)


def _segments(cu_seqlens: Tensor) -> Iterator[slice]:
    borders = cu_seqlens.tolist()
    for start, stop in pairwise(borders):
        if start < stop:
            yield slice(start, stop)


def _key_mask(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """A bool mask of keys as the kernel wants it: 4 dims, 0 where allowed, -inf where not."""
    if bias is None:
        return None
    allowed = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    return torch.zeros_like(allowed, dtype=_compute_dtype(q)).masked_fill_(~allowed, -torch.inf)
