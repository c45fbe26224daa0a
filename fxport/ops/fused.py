"""What the fused half-precision kernels of libraries have in common."""

from __future__ import annotations

import warnings
from typing import TypedDict

import torch
from torch import Tensor

from fxport.ops.band import Band
from fxport.ops.facts import Facts
from fxport.ops.layout import addressable

__all__ = [
    "Seen",
    "flash_switched_off",
    "heads_first",
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
