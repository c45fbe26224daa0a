"""What the fused half-precision kernels of libraries have in common."""

from __future__ import annotations

import warnings

import torch

from fxport.ops.facts import Facts

__all__ = ["flash_switched_off", "not_for_flash", "not_for_libraries", "warn_left_out"]

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
