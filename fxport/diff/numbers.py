"""How far two tensors are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TOLERANCES", "Difference", "difference", "magnitude"]

# (rtol, atol) by dtype: relative to a tensor's largest value, and absolute.
TOLERANCES = {
    torch.float64: (1e-8, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (5e-2, 5e-2),
}


@dataclass(frozen=True)
class Difference:
    """How far two tensors are apart; all zero where they are equal, NaN in the same places.

    Attributes:
        absolute: largest |a - b|; inf where only one of them is NaN or they differ in infinity.
        relative: that over the largest |b| (b: the graph before).
        ulp: most representable numbers between two elements; large around zero by nature.
    """

    absolute: float
    relative: float
    ulp: float


def difference(actual: Tensor, expected: Tensor) -> Difference:
    """Compares two tensors of one shape; integers and booleans too."""
    ulp = _ulp(actual, expected)
    wide = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = actual.to(wide), expected.to(wide)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    gap = (actual - expected).abs().masked_fill(same, 0.0)
    absolute = float(gap.nan_to_num(nan=math.inf).max()) if gap.numel() else 0.0
    scale = magnitude(expected)
    relative = absolute / scale if scale else (math.inf if absolute else 0.0)
    return Difference(absolute, relative, ulp)


def magnitude(expected: Tensor) -> float:
    """The largest finite magnitude."""
    finite = expected.abs()[expected.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _ulp(actual: Tensor, expected: Tensor) -> float:
    """Representable numbers between two elements: the distance of their bits, put in order."""
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    if not actual.is_floating_point() or actual.dtype != expected.dtype or not actual.numel():
        return 0.0
    bits = _BITS[actual.dtype.itemsize]
    ordered = []
    for x in (actual, expected):
        raw = x.masked_fill(x.isnan(), 0.0).contiguous().view(bits).to(torch.float64)
        lowest = float(torch.iinfo(bits).min)
        ordered.append(torch.where(raw < 0, lowest - raw, raw))
    return float((ordered[0] - ordered[1]).abs().max())
