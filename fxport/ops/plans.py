"""What a call comes to, judged once for each kind of call and looked up from then on.

A model calls with the same shapes step after step: to read them takes 2 us, to judge them 50.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxport.ops import dispatch
from fxport.ops.facts import Facts, Needs, Operand
from fxport.ops.params import AttentionParams
from fxport.ops.validate import check_arguments

__all__ = ["Plan", "plan"]

_KINDS = 4096  # lengths may change at every step: the oldest are forgotten


class Plan(NamedTuple):
    """A call's numbers, and what computes it."""

    params: AttentionParams
    implementation: dispatch.Implementation


def plan(
    tensors: Sequence[Tensor | None],
    numbers: tuple[Any, ...],
    needs: Needs | None = None,
    lse_gradient: bool = False,
) -> Plan:
    """The plan of a call; one of backward has `needs`.

    Args:
        tensors: q, k, v, bias, sinks, alibi_slopes, cu_seqlens, seed.
        numbers: the fields of `AttentionParams`, in order.
        needs: the gradients wanted.
        lse_gradient: whether a gradient comes in on lse.

    Raises:
        ValueError: a forward call is not defined (`check_arguments`).
    """
    kinds = tuple([None if x is None else (x.shape, x.dtype, x.device) for x in tensors])
    return _judge(kinds, numbers, needs, lse_gradient, _settings())


def _settings() -> tuple[bool, ...]:
    """All of torch's settings that a choice depends on."""
    cuda = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.flash_sdp_enabled(),
    )


@lru_cache(maxsize=_KINDS)
def _judge(
    kinds: tuple[tuple[torch.Size, torch.dtype, torch.device] | None, ...],
    numbers: tuple[Any, ...],
    needs: Needs | None,
    lse_gradient: bool,
    settings: tuple[bool, ...],  # part of the key
) -> Plan:
    params = AttentionParams(*numbers)
    q, k, v, bias, sinks, slopes, cu, seed = (None if x is None else Operand(*x) for x in kinds)
    assert q is not None and k is not None and v is not None
    if needs is None:
        check_arguments(q, k, v, bias, sinks, slopes, cu, seed, params)
    facts = Facts.of(q, k, v, bias, sinks, slopes, cu, params, needs, lse_gradient)
    return Plan(params, dispatch.choose(facts))
