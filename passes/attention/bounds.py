"""How low an added bias can be, whatever the data is: by intervals, from dtypes and operations.

    slopes * ((mask.cumsum(-1) - 1) * mask)      mask bool as floats:  -max(slopes)
                                                 mask int64:           about -2 ** 63
    torch.randn(..) or given floats              anything

Integers that overflow come round, so they are bounded by their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.views import CASTS, moved_input, number, overload_packet
from fxport.passes.graph_facts import GraphFacts, Source
from fxport.passes.masks.values import constant_value

__all__ = ["Bounds"]

aten = torch.ops.aten

_Interval: TypeAlias = tuple[float, float]
_ANYTHING: _Interval = (-math.inf, math.inf)


class Bounds:
    """Intervals of the values of one graph.

    Attributes:
        read: constants whose value was read.
    """

    def __init__(self, facts: GraphFacts) -> None:
        self._facts = facts
        self._known: dict[fx.Node, _Interval] = {}
        self.read: list[fx.Node] = []

    def lowest(self, node: fx.Node) -> float:
        """What no entry is below; NaN apart."""
        return self._of(node)[0]

    def _of(self, value: Any) -> _Interval:
        if not isinstance(value, fx.Node):
            given = number(value)
            return _ANYTHING if given is None else (given, given)
        if value not in self._known:
            self._known[value] = _within(value, self._computed(value))
        return self._known[value]

    def _computed(self, node: fx.Node) -> _Interval:
        if not isinstance(node.meta.get("val"), Tensor):
            return _ANYTHING
        source = self._facts.source(node)
        if source in Source.BUFFER and all(isinstance(s, int) for s in shape_of(node)):
            return self._read(node)
        if Source.MUTATED in source:
            return _ANYTHING
        packet = overload_packet(node)
        if packet in _RULES:
            given = arguments(node)
            return _RULES[packet](given, *(self._of(v) for v in list(given.values())[:2]))
        moves = packet in CASTS or moved_input(node) is not None
        return self._of(node.args[0]) if moves else _ANYTHING

    def _read(self, node: fx.Node) -> _Interval:
        try:
            value = constant_value(node, {}).double()
        except ValueError:  # a size enters it
            return _ANYTHING
        if not value.numel() or bool(value.isnan().any()):
            return _ANYTHING
        self.read.append(node)
        return float(value.min()), float(value.max())


def _within(node: fx.Node, found: _Interval) -> _Interval:
    """What the dtype holds; integers come round, floats become infinite."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.is_complex():
        return found
    if value.dtype == torch.bool:
        return 0.0, 1.0
    if value.dtype.is_floating_point:
        largest = torch.finfo(value.dtype).max
        low, high = found
        return (-math.inf if low < -largest else low), (math.inf if high > largest else high)
    of_dtype = torch.iinfo(value.dtype)
    fits = of_dtype.min <= found[0] and found[1] <= of_dtype.max
    return found if fits else (float(of_dtype.min), float(of_dtype.max))


def _times(one: float, other: float) -> float:
    return 0.0 if one == 0 or other == 0 else one * other


def _product(given: dict[str, Any], one: _Interval, other: _Interval) -> _Interval:
    del given
    corners = [_times(a, b) for a in one for b in other]
    return min(corners), max(corners)


def _sum(given: dict[str, Any], one: _Interval, other: _Interval) -> _Interval:
    alpha = number(given.get("alpha", 1))
    if alpha is None:
        return _ANYTHING
    scaled = _product({}, other, (alpha, alpha))
    return one[0] + scaled[0], one[1] + scaled[1]


def _difference(given: dict[str, Any], one: _Interval, other: _Interval) -> _Interval:
    return _sum(given, one, (-other[1], -other[0]))


def _rdifference(given: dict[str, Any], one: _Interval, other: _Interval) -> _Interval:
    return _difference(given, other, one) if given.get("alpha", 1) == 1 else _ANYTHING


def _negative(given: dict[str, Any], one: _Interval, *_: _Interval) -> _Interval:
    del given
    return -one[1], -one[0]


def _running_sum(given: dict[str, Any], one: _Interval, *_: _Interval) -> _Interval:
    """Of any number of entries."""
    del given
    return (one[0] if one[0] >= 0 else -math.inf), (one[1] if one[1] <= 0 else math.inf)


_RULES: dict[Any, Callable[..., _Interval]] = {
    aten.add: _sum,
    aten.sub: _difference,
    aten.rsub: _rdifference,
    aten.mul: _product,
    aten.neg: _negative,
    aten.cumsum: _running_sum,
}
