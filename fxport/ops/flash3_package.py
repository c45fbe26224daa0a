"""`fxport::attention` by FlashAttention-3's own build, forward and backward, where it is faster.

The operators ``flash_attn_3::fwd`` and ``bwd`` of the package flash-attn-3, or of the copy that
xformers carries. (vLLM's build is another one, forward only: `fxport.ops.flash3`.) Neither package
is imported: the library alone is loaded, and used only if its operators have the signatures known
here.

The kernels align causality at the bottom right, ``j <= i + (Tk - Tq)``. Their backward adds up dq
in no fixed order, so calls under ``torch.use_deterministic_algorithms`` are left to our own, and it
takes no gradient of lse.
Source: Shah et al., "FlashAttention-3" (arXiv:2407.08608).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxport.ops.band import Band, band_of
from fxport.ops.facts import Facts
from fxport.ops.fused import (
    Faster,
    Measured,
    borders,
    heads_first,
    not_faster,
    not_for_flash,
    rows_first,
    seen_from_diagonal,
    warn_left_out,
)
from fxport.ops.layout import in_heads_layout, in_row_major_layout
from fxport.ops.params import AttentionParams

__all__ = ["backward", "before_flash4", "forward", "refuses"]

_BAND = ("softmax_scale", "is_causal", "window_size_left", "window_size_right")
_FORWARD_ARGUMENTS = (
    *("q", "k", "v", "k_new", "v_new", "q_v", "out"),
    *("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "seqused_k"),
    *("max_seqlen_q", "max_seqlen_k", "page_table", "kv_batch_idx", "leftpad_k"),
    *("rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale"),
    *(*_BAND, "attention_chunk", "softcap", "is_rotary_interleaved"),
    *("scheduler_metadata", "num_splits", "pack_gqa", "sm_margin"),
)
_BACKWARD_ARGUMENTS = (
    *("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"),
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k"),
    *(*_BAND, "softcap", "deterministic", "sm_margin"),
)
_PLACES = (("flash_attn_3", "."), ("xformers", "flash_attn_3"))  # package, folder
_Operators = tuple[Callable[..., Any], Callable[..., Any]]


# By compute capability, direction and head size; `python -m fxport.tools.bench_dispatcher_gpu`
# shows the figures (docs/performance.md). What is not here was not measured, or is not faster.
_FORWARD: Measured = {
    (9, 0): {
        64: Faster(2048, 512, 1024, 4096),
        128: Faster(1024, 64, 1024, 512),
        256: Faster(1024, 64, 1024, None),
    },
}
_BACKWARD: Measured = {
    (9, 0): {
        64: Faster(128, 64, 1024, 4096),
        128: Faster(128, 64, 1024, 2048),
        256: Faster(128, 64, 1024, None),
    },
}
# From which length on flash-attn-4 is not faster: of packed sequences forward, and of causal rows
# and windows, one row for each column, backward. All else forward it is never.
_PACKED_BEFORE_FLASH4 = 8192
_BEFORE_FLASH4 = {64: 2048, 128: 1024, 256: 128}


def refuses(facts: Facts, rival: str) -> str | None:
    """Why a call is not for these kernels: not covered, not faster than `rival`, not installed.

    Args:
        facts: the call.
        rival: what runs otherwise, ``"cudnn"`` or ``"triton"``.
    """
    return _not_covered(facts) or _not_faster(facts, rival) or _not_installed()


def before_flash4(facts: Facts) -> bool:
    """Whether a call that both take was measured to be no slower here than in FlashAttention-4."""
    rows, columns = facts.q_shape[2], facts.k_shape[2]
    if facts.needs is None:
        return not facts.packed or rows >= _PACKED_BEFORE_FLASH4
    if facts.packed or rows < columns or facts.band == Band(None, None):
        return False
    least = _BEFORE_FLASH4.get(facts.q_shape[3])
    return least is not None and rows >= least


def _not_covered(facts: Facts) -> str | None:
    if reason := not_for_flash(facts):
        return reason
    if facts.lse_gradient:
        return "the kernels take no gradient of lse"
    if facts.deterministic and facts.needs is not None:
        return "deterministic algorithms are asked for"
    if seen_from_diagonal(facts.band, facts.q_shape[2], facts.k_shape[2]) is None:
        return "a row that may see nothing"
    return None


def _not_faster(facts: Facts, rival: str) -> str | None:
    return not_faster(facts, rival, _FORWARD, _BACKWARD)


@cache
def _operators() -> _Operators | None:
    """Forward and backward; None without the library."""
    for package, folder in _PLACES:
        found = importlib.util.find_spec(package)
        for place in (found.submodule_search_locations or []) if found else []:
            for library in sorted(Path(place, folder).glob("_C*.so")):
                return _load(library)
    return None


def _load(library: Path) -> _Operators | None:
    try:
        torch.ops.load_library(str(library))
        both = (torch.ops.flash_attn_3.fwd.default, torch.ops.flash_attn_3.bwd.default)
    except (OSError, AttributeError) as error:  # made for another torch or CUDA
        warn_left_out("flash-attn-3", f"{error}")
        return None
    for operator, known in zip(both, (_FORWARD_ARGUMENTS, _BACKWARD_ARGUMENTS), strict=True):
        names = tuple(a.name for a in operator._schema.arguments)
        if names != known:
            warn_left_out("flash-attn-3", f"an operator of it takes other arguments: {names}")
            return None
    return both


def _not_installed() -> str | None:
    return "flash-attn-3 is not installed" if _operators() is None else None


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
    (operator, _), numbers = _chosen(q, k, cu_seqlens, params)
    packed = cu_seqlens is not None
    out, lse, *_ = operator(*(rows_first(x, packed) for x in (q, k, v)), num_splits=1, **numbers)
    return in_heads_layout(heads_first(out, packed)), in_row_major_layout(lse.view(q.shape[:3]))


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
    (_, operator), numbers = _chosen(q, k, cu_seqlens, params)
    packed = cu_seqlens is not None
    tensors = (rows_first(x, packed) for x in (grad_out, q, k, v, out))
    grads = operator(*tensors, lse[0] if packed else lse, **numbers)
    found = [
        in_heads_layout(heads_first(x, packed)) if need else None
        for x, need in zip(grads[:3], needs, strict=False)
    ]
    return (*found, None, None, None)


def _chosen(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, params: AttentionParams
) -> tuple[_Operators, dict[str, Any]]:
    """The operators, and what both take beside their tensors."""
    rows, columns = q.shape[2], k.shape[2]
    operators = _operators()
    seen = seen_from_diagonal(band_of(params, rows, columns), rows, columns)
    if operators is None or seen is None:
        raise RuntimeError("flash-attn-3 was chosen for a call that it refuses")
    numbers: dict[str, Any] = {"softmax_scale": params.scale, "is_causal": seen["causal"]}
    for side in ("window_size_left", "window_size_right"):
        numbers[side] = -1 if (limit := seen[side]) is None else limit  # type: ignore[literal-required]
    return operators, {**numbers, **borders(cu_seqlens, q, k)}
