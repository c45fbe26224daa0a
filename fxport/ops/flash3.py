"""The forward pass of `fxport::attention` by FlashAttention-3, where it is installed and faster.

The kernels are the ones that vLLM carries, forward only; backward goes on with whatever is chosen
there, from the same (out, lse). vLLM itself is not imported: its package is large, and importing it
changes torch's settings. The library is used only if its operator has the signature known here.

vLLM's build takes only sequences laid end to end, so a batch is handed over that way. It aligns
causality at the bottom right, ``j <= i + (Tk - Tq)``. **Its windows are not used**: those of vLLM
0.25.1 gave wrong results at head sizes 128 and 256 (docs/performance.md).
Source: Shah et al., "FlashAttention-3" (arXiv:2407.08608).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fxport.ops.band import Band, band_of
from fxport.ops.facts import Facts
from fxport.ops.fused import flash_switched_off, not_for_flash, warn_left_out
from fxport.ops.layout import addressable, in_heads_layout, in_row_major_layout
from fxport.ops.params import AttentionParams

__all__ = ["forward", "refuses"]

_ARGUMENTS = (
    *("q", "k", "v", "k_new", "v_new", "q_v", "out"),
    *("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "seqused_k"),
    *("max_seqlen_q", "max_seqlen_k", "page_table", "kv_batch_idx", "leftpad_k"),
    *("rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale"),
    *("softmax_scale", "is_causal", "window_size_left", "window_size_right", "softcap"),
    *("is_rotary_interleaved", "scheduler_metadata", "num_splits", "pack_gqa", "sm_margin"),
    *("s_aux", "cp_world_size", "cp_rank", "cp_tot_seqused_k"),
)
_NO_CACHE = (None,) * 9  # page table to the scales of fp8, after the two longest lengths


@dataclass(frozen=True)
class _Faster:
    """From which length on the forward kernel beats cuDNN's, and ours; None: never.

    Packed sequences, which only ours compute beside it, have an entry of their own. It gains where
    many query heads share a key head: `grouped` is its length against cuDNN from `_MANY` heads a
    group on, where that was measured.
    """

    cudnn: int | None
    triton: int | None
    packed: int | None
    grouped: int | None = None


_MANY = 8
# By compute capability and head size; `python -m fxport.tools.bench_dispatcher_gpu` shows the
# figures (docs/performance.md). What is not here was not measured.
_MEASURED: dict[tuple[int, int], dict[int, _Faster]] = {
    (9, 0): {
        64: _Faster(8192, 512, None, grouped=4096),
        128: _Faster(4096, 128, 128),
        256: _Faster(2048, 256, 256),
    },
}


def refuses(facts: Facts, rival: str) -> str | None:
    """Why a call is not for these kernels: not covered, not faster than `rival`, not installed.

    Args:
        facts: the call.
        rival: what runs otherwise, ``"cudnn"`` or ``"triton"``.
    """
    return _not_covered(facts) or _not_faster(facts, rival) or _not_installed()


def _not_covered(facts: Facts) -> str | None:
    if facts.needs is not None:
        return "there is no backward kernel"
    if reason := not_for_flash(facts):
        return reason
    if _is_causal(facts.band, facts.q_shape[2], facts.k_shape[2]) is None:
        return "used for all columns, or causal up to the last; windows were seen to go wrong"
    return None


def _not_faster(facts: Facts, rival: str) -> str | None:
    if reason := flash_switched_off():
        return reason
    entry = _MEASURED.get(facts.capability or (0, 0), {}).get(facts.q_shape[3])
    if entry is None:
        return "not measured on this GPU or at this head size"
    least = entry.cudnn if rival == "cudnn" else entry.packed if facts.packed else entry.triton
    if rival == "cudnn" and entry.grouped and facts.q_shape[1] >= _MANY * facts.k_shape[1]:
        least = entry.grouped
    if least is None or min(facts.q_shape[2], facts.k_shape[2]) < least:
        return f"not faster than {rival} at this length"
    return None


def _is_causal(band: Band, rows: int, columns: int) -> bool | None:
    """Whether the last row is the first to see all columns; None: neither that nor no limit."""
    if band == Band(None, None):
        return False
    if band == Band(None, columns - rows) and columns >= rows:  # no row sees nothing
        return True
    return None


@cache
def _kernel() -> Callable[..., list[Tensor]] | None:
    """The operator; None without vLLM's library."""
    found = importlib.util.find_spec("vllm")
    places = [] if found is None else found.submodule_search_locations or []
    for place in places:
        library = Path(place, "vllm_flash_attn", "_vllm_fa3_C.abi3.so")
        if library.is_file():
            return _load(library)
    return None


def _load(library: Path) -> Callable[..., list[Tensor]] | None:
    try:
        torch.ops.load_library(str(library))
        kernel: Callable[..., list[Tensor]] = torch.ops._vllm_fa3_C.fwd.default
        names = tuple(a.name for a in torch.ops._vllm_fa3_C.fwd.default._schema.arguments)
    except (OSError, AttributeError) as error:  # made for another torch
        warn_left_out("vLLM's FlashAttention-3", f"{error}")
        return None
    if names != _ARGUMENTS:
        warn_left_out("vLLM's FlashAttention-3", f"its operator takes other arguments: {names}")
        return None
    return kernel


def _not_installed() -> str | None:
    return "vLLM's FlashAttention-3 is not installed" if _kernel() is None else None


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
    batch, heads, rows, size = q.shape
    columns = k.shape[2]
    kernel, causal = _kernel(), _is_causal(band_of(params, rows, columns), rows, columns)
    if kernel is None or causal is None:
        raise RuntimeError("FlashAttention-3 was chosen for a call that it refuses")
    borders = _borders(batch, rows, q) if cu_seqlens is None else cu_seqlens
    kv_borders = borders if rows == columns else _borders(batch, columns, q)
    out, lse, *_ = kernel(
        _end_to_end(q), _end_to_end(k), _end_to_end(v), None, None, None, None,
        borders, kv_borders, None, None, None, rows, columns, *_NO_CACHE,
        params.scale, causal, -1, -1, 0.0, True, None, 1, None, 0, None, 1, 0, None,
    )  # fmt: skip
    out = out.view(batch, rows, heads, size).transpose(1, 2)
    return in_heads_layout(out), in_row_major_layout(lse.view(heads, batch, rows).transpose(0, 1))


def _end_to_end(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B * T, H, D]; a copy unless the memory is laid out [B, T, H, D]."""
    return addressable(x).transpose(1, 2).flatten(0, 1)


def _borders(batch: int, length: int, like: Tensor) -> Tensor:
    return torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=like.device)
