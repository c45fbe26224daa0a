"""What the fused half-precision kernels of libraries have in common."""

from __future__ import annotations

import torch

from fxport.ops.facts import Facts

__all__ = ["not_for_libraries"]

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
