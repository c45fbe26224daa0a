"""What a value is known to be from how it is made: one number all over, or a power.

full_like(x, -1e9)   -9e15 * ones_like(x)   zeros(1).expand(..)        exp(x)   2 ** x
"""

from __future__ import annotations

import math

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from fxport.capture.arguments import arguments
from fxport.capture.memory import Memory
from fxport.passes.attention.views import number, overload_packet

__all__ = ["filled_with", "is_zero", "power_of"]

aten = torch.ops.aten


def is_zero(value: object) -> bool:
    """Whether a value is the number 0, or a freshly made tensor of zeros."""
    if not isinstance(value, fx.Node):
        return number(value) == 0
    return filled_with(value) == 0


def filled_with(node: fx.Node) -> float | None:
    """The number that every entry of a freshly made tensor is, if nothing is written into it."""
    return None if Memory(node.graph).written_by(node) else _filled(node)


def _filled(node: fx.Node) -> float | None:
    packet = overload_packet(node)
    found: float | None = None
    if packet in _VIEWS and isinstance(node.args[0], fx.Node):
        found = _filled(node.args[0])
    elif packet in _ZEROS:
        found = 0.0
    elif packet in _ONES:
        found = 1.0
    elif packet in _FULL:
        found = number(arguments(node)["fill_value"])
    elif packet is aten.mul:  # -9e15 * ones_like(scores)
        of, factor = node.args[0], number(node.args[1])
        each = _filled(of) if isinstance(of, fx.Node) else None
        found = None if each is None or factor is None else each * factor
    elif packet is aten.scalar_tensor:
        found = number(arguments(node)["s"])
    return None if found is None else _held(found, node.meta["val"].dtype)


def _held(value: float, dtype: torch.dtype) -> float | None:
    """What a dtype makes of a number (``full(300).to(uint8)`` is 44); None: nobody says."""
    if dtype == torch.bool:
        return float(value != 0)
    if dtype.is_complex or not (dtype.is_floating_point or math.isfinite(value)):
        return None
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        return float(int(value)) if limits.min <= int(value) <= limits.max else None
    with _disable_current_modes():
        return float(torch.tensor(value, dtype=torch.float64).to(dtype))


def power_of(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, log b) of ``b ** x`` with a number b."""
    packet = overload_packet(node)
    base = math.e if packet is aten.exp else 2.0 if packet in _POWERS_OF_TWO else None
    found = node.args[0] if node.args else None
    if packet is aten.pow:
        base, found = number(node.args[0]), node.args[1]
    if base is None or base <= 0 or base == 1 or not isinstance(found, fx.Node):
        return None
    return found, math.log(base)


_POWERS_OF_TWO = {aten.exp2, aten.special_exp2}
_VIEWS = {aten.expand, aten.view, aten.reshape, aten.unsqueeze, aten.to}
_ZEROS = {aten.zeros, aten.new_zeros, aten.zeros_like}
_ONES = {aten.ones, aten.new_ones, aten.ones_like}
_FULL = {aten.full, aten.new_full, aten.full_like}
