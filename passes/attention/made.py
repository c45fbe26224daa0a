"""What a value is known to be from how it is made: one number all over, or a power.

full_like(x, -1e9)   -9e15 * ones_like(x)   zeros(1).expand(..)        exp(x)   2 ** x
"""

from __future__ import annotations

import math

import torch
from torch import fx

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
    if Memory(node.graph).written_by(node):
        return None
    while overload_packet(node) in _VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    packet = overload_packet(node)
    if packet in _ZEROS:
        return 0.0
    if packet in _ONES:
        return 1.0
    if packet in _FULL:
        return number(arguments(node)["fill_value"])
    if packet is aten.mul:  # -9e15 * ones_like(scores)
        of, factor = node.args[0], number(node.args[1])
        each = filled_with(of) if isinstance(of, fx.Node) else None
        return None if each is None or factor is None else each * factor
    return number(arguments(node)["s"]) if packet is aten.scalar_tensor else None


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
