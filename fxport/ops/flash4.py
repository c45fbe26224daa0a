"""`fxport::attention` by FlashAttention-4's kernels for Hopper, where they were measured faster.

The package is flash-attn-4 (``flash_attn.cute``): kernels in a language of their own, made on
their first use, which takes seconds for each kind of call. It is a beta, so only releases are used
whose results this project has compared with its reference on a GPU; `_CHECKED` lists them.

The kernels align causality at the bottom right, ``j <= i + (Tk - Tq)``. Their backward adds up dq
in no fixed order, so calls under ``torch.use_deterministic_algorithms`` are left to our own.
Source: https://github.com/Dao-AILab/flash-attention; Shah et al., "FlashAttention-3"
(arXiv:2407.08608), for the algorithm.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from torch import Tensor

from fxport.ops.band import band_of
from fxport.ops.facts import Facts
from fxport.ops.fused import (
    Faster,
    Measured,
    Seen,
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

__all__ = ["backward", "before_flash3", "forward", "refuses"]

_CHECKED = frozenset({"4.0.0b8", "4.0.0b36"})


# By compute capability, direction and head size; `python -m fxport.tools.bench_dispatcher_gpu`
# shows the figures (docs/performance.md). What is not here was not measured, or is not faster.
_FORWARD: Measured = {
    (9, 0): {
        64: Faster(8192, 512, None, 8192),
        96: Faster(4096, 64, 1024, 4096),
        128: Faster(4096, 64, 128, 4096),
        256: Faster(2048, 128, 512, 2048),
    },
}
_BACKWARD: Measured = {
    (9, 0): {
        64: Faster(128, 64, 128, 128),
        96: Faster(512, 64, 1024, 512),
        128: Faster(128, 64, 128, 128),
    },
}
_PACKED_BEFORE_FLASH3 = frozenset({128})  # head sizes; at 256 it was not measured beside it


def refuses(facts: Facts, rival: str) -> str | None:
    """Why a call is not for these kernels: not covered, not faster than `rival`, not installed.

    Args:
        facts: the call.
        rival: what runs otherwise, ``"cudnn"`` or ``"triton"``.
    """
    return _not_covered(facts) or _not_faster(facts, rival) or _not_installed()


def before_flash3(facts: Facts) -> bool:
    """Whether a call that both take was measured to be no slower here than in FlashAttention-3."""
    return facts.packed and facts.q_shape[3] in _PACKED_BEFORE_FLASH3


def _not_covered(facts: Facts) -> str | None:
    if reason := not_for_flash(facts):
        return reason
    if facts.deterministic and facts.needs is not None:
        return "deterministic algorithms are asked for"
    if facts.q_shape[3] % 32:
        return "a head size that 32 divides"  # 72 was seen to fail
    if seen_from_diagonal(facts.band, facts.q_shape[2], facts.k_shape[2]) is None:
        return "a row that may see nothing"
    return None


def _not_faster(facts: Facts, rival: str) -> str | None:
    return not_faster(facts, rival, _FORWARD, _BACKWARD)


@cache
def _library() -> ModuleType | None:
    """The package's functions; None where it is missing or another release than those checked."""
    try:
        release = version("flash-attn-4")
    except PackageNotFoundError:
        return None
    if release not in _CHECKED:
        known = ", ".join(sorted(_CHECKED))
        reason = f"{release} was not compared with the reference; those that were: {known}"
        warn_left_out("flash-attn-4", reason)
        return None
    try:
        from flash_attn.cute import interface
    except Exception as error:  # whatever it raises where torch, CUDA or its compiler do not fit
        warn_left_out("flash-attn-4", f"{type(error).__name__}: {error}")
        return None
    found: ModuleType = interface
    return found


def _not_installed() -> str | None:
    return "flash-attn-4 is not installed, or not a release checked" if not _library() else None


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
    library, seen = _chosen(q, k, params)
    packed = cu_seqlens is not None
    out, lse, *_ = library._flash_attn_fwd(
        *(rows_first(x, packed) for x in (q, k, v)),
        softmax_scale=params.scale, return_lse=True, **seen, **borders(cu_seqlens, q, k),
    )  # fmt: skip
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
    library, seen = _chosen(q, k, params)
    packed = cu_seqlens is not None
    grads = library._flash_attn_bwd(
        *(rows_first(x, packed) for x in (q, k, v, out, grad_out)),
        lse[0] if packed else lse,
        softmax_scale=params.scale,
        dlse=grad_lse if grad_lse is None or not packed else grad_lse[0],
        **seen,
        **borders(cu_seqlens, q, k),
    )[:3]
    found = [
        in_heads_layout(heads_first(x, packed)) if need else None
        for x, need in zip(grads, needs, strict=False)
    ]
    return (*found, None, None, None)


def _chosen(q: Tensor, k: Tensor, params: AttentionParams) -> tuple[ModuleType, Seen]:
    library = _library()
    rows, columns = q.shape[2], k.shape[2]
    seen = seen_from_diagonal(band_of(params, rows, columns), rows, columns)
    if library is None or seen is None:
        raise RuntimeError("flash-attn-4 was chosen for a call that it refuses")
    return library, seen
