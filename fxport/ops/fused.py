"""What the fused half-precision kernels of libraries have in common."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from fxport.ops.band import Band
from fxport.ops.facts import Facts
from fxport.ops.layout import addressable

__all__ = [
    "Faster",
    "Measured",
    "Seen",
    "borders",
    "flash_switched_off",
    "heads_first",
    "not_faster",
    "not_for_flash",
    "not_for_libraries",
    "rows_first",
    "seen_from_diagonal",
    "warn_left_out",
]

_HALVES = (torch.bfloat16, torch.float16)
_LARGEST = 2**31  # entries of a tensor: beyond, offsets were not tested


def not_for_libraries(facts: Facts) -> str | None:
    """Why a call goes to no library's kernel, whichever it is; None where one may take it."""
    if facts.dtype not in _HALVES:
        return f"no kernel for {facts.dtype}"
    if facts.params.scale <= 0:
        return "a scale that is not positive"
    if facts.q_shape[3] != facts.v_shape[3]:
        return "one head size"
    if max(shape.numel() for shape in (facts.q_shape, facts.k_shape)) >= _LARGEST:
        return f"a tensor of {_LARGEST} entries or more"
    if 0 in (*facts.q_shape, *facts.k_shape):
        return "an empty tensor"
    return None


def not_for_flash(facts: Facts) -> str | None:
    """Why a call goes to no FlashAttention, whichever release it is; None where one may take it."""
    if reason := not_for_libraries(facts):
        return reason
    if facts.bias_dtype is not None or facts.alibi_slopes or facts.sinks:
        return "bias and ALiBi are not in the kernels, and sinks are in bfloat16 alone"
    if facts.params.softcap > 0 or facts.params.dropout_p > 0:
        return "the kernels' tanh is an approximation, and dropout is not in them"
    return None


def flash_switched_off() -> str | None:
    """The user's setting, if it is against FlashAttention."""
    if torch.backends.cuda.flash_sdp_enabled():
        return None
    return "FlashAttention is switched off (torch.backends.cuda.enable_flash_sdp)"


def warn_left_out(library: str, reason: str) -> None:
    """Says that an installed library is not used."""
    warnings.warn(f"{library} is not used: {reason}", stacklevel=3)


class Seen(TypedDict):
    """What a row sees, in the libraries' words: distances from the diagonal, None without limit."""

    causal: bool
    window_size_left: int | None
    window_size_right: int | None


def seen_from_diagonal(band: Band, rows: int, columns: int) -> Seen | None:
    """The band as distances from the diagonal ``j = i + (columns - rows)``.

    None where the diagonal does not lie within the band, or rows at the top have none: such rows
    may see nothing.
    """
    reach = columns - rows
    left = None if band.low is None else reach - band.low
    right = None if band.high is None else band.high - reach
    if band != Band(None, None) and min(reach, left or 0, right or 0) < 0:
        return None
    causal = left is None and right == 0
    return Seen(causal=causal, window_size_left=left, window_size_right=None if causal else right)


def rows_first(x: Tensor, packed: bool) -> Tensor:
    """[B, H, T, D] -> [B, T, H, D]; packed: [1, H, T, D] -> [T, H, D]."""
    x = addressable(x).transpose(1, 2)
    return x[0] if packed else x


def heads_first(x: Tensor, packed: bool) -> Tensor:
    """Takes `rows_first` back."""
    return (x[None] if packed else x).transpose(1, 2)


def borders(cu_seqlens: Tensor | None, q: Tensor, k: Tensor) -> dict[str, Tensor | int]:
    """What the packages' operators are told of packed sequences."""
    if cu_seqlens is None:
        return {}
    found = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    return {**found, "max_seqlen_q": q.shape[2], "max_seqlen_k": k.shape[2]}


@dataclass(frozen=True)
class Faster:
    """From which length on a package's kernels beat cuDNN's, and ours; None: not at every length.

    Windows and packed sequences, which only our kernels compute beside these, have an entry of
    their own, and so have query heads that share a key head, beside cuDNN's.
    """

    cudnn: int | None
    triton: int | None
    parts: int | None
    grouped: int | None


Measured = Mapping[tuple[int, int], Mapping[int, Faster]]
"""By compute capability and head size. What is not there was not measured, or is not faster."""


def not_faster(facts: Facts, rival: str, forward: Measured, backward: Measured) -> str | None:
    """Why a call is left to `rival`, ``"cudnn"`` or ``"triton"``; None where the package wins."""
    if reason := flash_switched_off():
        return reason
    measured = forward if facts.needs is None else backward
    entry = measured.get(facts.capability or (0, 0), {}).get(facts.q_shape[3])
    if entry is None:
        return "not measured on this GPU or at this head size"
    in_parts = facts.packed or facts.band.low is not None
    if rival == "cudnn":
        least = entry.cudnn if facts.q_shape[1] == facts.k_shape[1] else entry.grouped
    else:
        least = entry.parts if in_parts else entry.triton
    if least is None or min(facts.q_shape[2], facts.k_shape[2]) < least:
        return f"not faster than {rival} at this length"
    return None
