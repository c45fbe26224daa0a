"""Which implementation computes an attention call, and how often each one ran.

All implementations mean the same by (out, lse), so forward and backward choose independently. A
choice depends on the call's facts and on torch's settings, never on values, timings or earlier
calls. On CUDA: cuDNN where it covers the call and was measured faster (`fxport.ops.cudnn`,
`fxport.ops.triton.gluon`), else our Triton kernels; instead of either FlashAttention-3 or
FlashAttention-4, where it is installed and was measured faster (`fxport.ops.flash3_package`,
`flash3`, `flash4`); else, with a warning, the blocked path.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fxport.ops import blocked, cpu_flash, cudnn, flash3, flash3_package, flash4
from fxport.ops.facts import Facts

__all__ = ["Implementation", "calls", "choose"]

calls: Counter[str] = Counter()
"""How often each implementation ran; keys are ``"cudnn.forward"``, ``"blocked.backward"``..."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    Attributes:
        name: as it appears in `calls`.
        refuses: a call's facts -> why this implementation cannot compute it; None if it can.
        forward: ``(q, k, v, bias, sinks, alibi_slopes, cu_seqlens, seed, params) -> (out, lse)``.
        backward: ``(grad_out, grad_lse, q, k, v, out, lse, bias, sinks, alibi_slopes, cu_seqlens,
            seed, params, needs) -> gradients of (q, k, v, bias, sinks, alibi_slopes)``, None where
            not needed.
    """

    name: str
    refuses: Callable[[Facts], str | None]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor | None, ...]]


_BLOCKED = Implementation("blocked", lambda facts: None, blocked.forward, blocked.backward)
_CPU_FLASH = Implementation("cpu_flash", cpu_flash.refuses, cpu_flash.forward, cpu_flash.backward)
_CUDNN = Implementation("cudnn", cudnn.refuses, cudnn.forward, cudnn.backward)


def _no_backward(*_: object) -> tuple[Tensor | None, ...]:
    raise RuntimeError("FlashAttention-3 has no backward pass here: `flash3.refuses` says so")


_FLASH3 = Implementation(
    "flash3", lambda f: flash3.refuses(f, "triton"), flash3.forward, _no_backward
)
_FLASH3_PACKAGE = Implementation(
    "flash3_package",
    lambda f: flash3_package.refuses(f, "triton"),
    flash3_package.forward,
    flash3_package.backward,
)
_FLASH4 = Implementation(
    "flash4", lambda f: flash4.refuses(f, "triton"), flash4.forward, flash4.backward
)


@cache
def _triton() -> Implementation | None:
    """Our own kernels, where Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from fxport.ops.triton import attention as kernels

    return Implementation("triton", kernels.refuses, kernels.forward, kernels.backward)


def _triton_before_cudnn(facts: Facts) -> Implementation | None:
    triton = _triton()
    if triton is None or triton.refuses(facts) is not None:
        return None
    from fxport.ops.triton.gluon import before_cudnn

    return triton if before_cudnn(facts) else None


@cache
def _warn_slow(reason: str) -> None:
    """Once per reason. On CPU the blocked path keeps up with ATen's kernel: nothing to warn of."""
    warnings.warn(
        f"fxport::attention runs its blocked path on CUDA, right but slow: {reason}", stacklevel=2
    )


def choose(facts: Facts) -> Implementation:
    """The first implementation for the call's device that does not refuse it.

    Never fails: the blocked path computes everything that the op's checks let through.
    """
    if facts.device == "cpu":
        return _CPU_FLASH if cpu_flash.refuses(facts) is None else _BLOCKED
    if facts.device == "cuda":
        return _choose_cuda(facts)
    return _BLOCKED


def _choose_cuda(facts: Facts) -> Implementation:
    if torch.backends.cudnn.is_available() and cudnn.refuses(facts) is None:
        chosen = _or_flash(_CUDNN, facts)
        return (_triton_before_cudnn(facts) or chosen) if chosen is _CUDNN else chosen
    triton = _triton()
    reason = "Triton is not installed" if triton is None else triton.refuses(facts)
    if triton is not None and reason is None:
        return _or_flash(triton, facts)
    _warn_slow(str(reason))
    return _BLOCKED


def _or_flash(rival: Implementation, facts: Facts) -> Implementation:
    flashes = [(flash3.refuses, _FLASH3), (flash4.refuses, _FLASH4)]
    if flash4.before_flash3(facts):
        flashes.reverse()
    place = 0 if flash3_package.before_flash4(facts) else len(flashes)
    flashes.insert(place, (flash3_package.refuses, _FLASH3_PACKAGE))
    for refuses, implementation in flashes:
        if refuses(facts, rival.name) is None:
            return implementation
    return rival
