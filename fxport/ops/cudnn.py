"""`fxport::attention` by cuDNN's fused kernels (through ATen), where they were measured faster.

Covers what those kernels compute exactly: causal from the first row and column on, or every column,
nothing else done to the scores. They are called below ``scaled_dot_product_attention``, which
returns no lse and may choose another kernel. Their backward adds up dq in no fixed order, so calls
under ``torch.use_deterministic_algorithms`` are left to our own kernels, whose bits do not change
from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxport.ops.band import Band, band_of
from fxport.ops.facts import Facts
from fxport.ops.fused import not_for_libraries
from fxport.ops.layout import addressable, in_heads_layout
from fxport.ops.params import AttentionParams

__all__ = ["backward", "forward", "refuses"]

_CAUSAL, _ALL = Band(None, 0), Band(None, None)
_cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


@dataclass(frozen=True)
class _Faster:
    """From which length on the kernels beat ours, for head sizes up to `size`."""

    size: int
    forward: int
    backward: int


# By compute capability; `python -m fxport.tools.bench_attention_gpu libraries` shows the figures
# (docs/performance.md). A capability that is not here was not measured: our kernels run.
_MEASURED: dict[tuple[int, int], tuple[_Faster, ...]] = {
    (9, 0): (_Faster(64, 128, 128), _Faster(128, 128, 128), _Faster(256, 128, 128)),
}


def refuses(facts: Facts) -> str | None:
    """Why a call is not for these kernels: they do not cover it, or are not faster."""
    return (
        not_for_libraries(facts) or _not_covered(facts) or _not_exact(facts) or _not_faster(facts)
    )


def _not_covered(facts: Facts) -> str | None:
    if facts.bias_dtype is not None or facts.alibi_slopes or facts.sinks or facts.packed:
        return "bias, ALiBi, sinks and packing are not in the kernels"
    if facts.params.softcap > 0 or facts.params.dropout_p > 0:
        return "softcap is not in the kernels, and dropout would have other random numbers"
    rows, columns = facts.q_shape[2], facts.k_shape[2]
    if facts.band != _ALL and not (facts.band == _CAUSAL and rows == columns):
        return "the kernels are used for all columns, or causal with as many rows as columns"
    if facts.q_shape[3] % 8:
        return "a head size that 8 divides"
    return None


def _not_exact(facts: Facts) -> str | None:
    if facts.lse_gradient:
        return "the kernels take no gradient of lse"
    if facts.deterministic and facts.needs is not None:
        return "deterministic algorithms are asked for"
    return None


def _not_faster(facts: Facts) -> str | None:
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "cuDNN attention is switched off (torch.backends.cuda.enable_cudnn_sdp)"
    for entry in _MEASURED.get(facts.capability or (0, 0), ()):
        if facts.q_shape[3] <= entry.size:
            least = entry.forward if facts.needs is None else entry.backward
            if min(facts.q_shape[2], facts.k_shape[2]) >= least:
                return None
            return f"not faster below {least} rows or columns"
    return "not measured on this GPU or at this head size"


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
    q, k, v = addressable(q), addressable(k), addressable(v)
    out, lse, *_ = _cudnn(q, k, v, None, True, 0.0, _is_causal(q, k, params), scale=params.scale)
    return in_heads_layout(out), lse.reshape(q.shape[:3])


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
    """Gradients of q, k and v, None where `needs` is False; the others are never needed here."""
    grad_out, q, k, v = (addressable(x) for x in (grad_out, q, k, v))
    no_dropout = q.new_empty((), dtype=torch.int64)  # the place of its seed and offset: not read
    grads = _cudnn_backward(
        grad_out, q, k, v, out, lse.contiguous()[..., None], no_dropout, no_dropout,
        None, None, None, q.shape[2], k.shape[2], 0.0, _is_causal(q, k, params),
        scale=params.scale,
    )  # fmt: skip
    found = [in_heads_layout(x) if need else None for x, need in zip(grads, needs, strict=False)]
    return (*found, None, None, None)


def _is_causal(q: Tensor, k: Tensor, params: AttentionParams) -> bool:
    return band_of(params, q.shape[2], k.shape[2]) == _CAUSAL
