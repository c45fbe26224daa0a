"""What an implementation may look at when it says whether it can compute a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fxport.ops.band import Band, band_of
from fxport.ops.params import AttentionParams

__all__ = ["Described", "Facts", "Needs", "Operand"]

Needs = tuple[bool, ...]
"""Which of q, k, v, bias, sinks, alibi_slopes want a gradient, in this order."""


class Operand(NamedTuple):
    """All that checks and choices may read of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def dim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)


Described: TypeAlias = Tensor | Operand


@dataclass(frozen=True)
class Facts:
    """One forward or backward call without its data.

    Attributes:
        device: device type, ``"cpu"``.
        dtype: of q, k and v.
        q_shape, k_shape, v_shape: ``[B, Hq, Tq, D]``, ``[B, Hkv, Tk, D]``, ``[B, Hkv, Tk, Dv]``.
        bias_dtype, bias_shape: of the bias; None and () without one.
        sinks, alibi_slopes, packed: whether given (packed: cu_seqlens).
        params: the numbers of the call.
        band: causality and window, reduced to what they forbid for these lengths.
        needs: None in forward; in backward, the gradients wanted.
        lse_gradient: whether a gradient comes in on lse (False in forward).
        capability: of the NVIDIA GPU, (9, 0) for Hopper; None on other devices.
        deterministic: whether ``torch.use_deterministic_algorithms`` is on.
    """

    device: str
    dtype: torch.dtype
    q_shape: torch.Size
    k_shape: torch.Size
    v_shape: torch.Size
    bias_dtype: torch.dtype | None
    bias_shape: tuple[int, ...]
    sinks: bool
    alibi_slopes: bool
    packed: bool
    params: AttentionParams
    band: Band
    needs: Needs | None
    lse_gradient: bool
    capability: tuple[int, int] | None
    deterministic: bool

    @staticmethod
    def of(
        q: Described,
        k: Described,
        v: Described,
        bias: Described | None,
        sinks: Described | None,
        alibi_slopes: Described | None,
        cu_seqlens: Described | None,
        params: AttentionParams,
        needs: Needs | None = None,
        lse_gradient: bool = False,
    ) -> Facts:
        """The facts of a call with these arguments."""
        return Facts(
            device=q.device.type,
            dtype=q.dtype,
            q_shape=q.shape,
            k_shape=k.shape,
            v_shape=v.shape,
            bias_dtype=None if bias is None else bias.dtype,
            bias_shape=() if bias is None else tuple(bias.shape),
            sinks=sinks is not None,
            alibi_slopes=alibi_slopes is not None,
            packed=cu_seqlens is not None,
            params=params,
            band=band_of(params, q.shape[2], k.shape[2]),
            needs=needs,
            lse_gradient=lse_gradient,
            capability=_capability(q.device),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


def _capability(device: torch.device) -> tuple[int, int] | None:
    # AMD's GPUs are "cuda" too, and one of them calls itself (9, 0)
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)
