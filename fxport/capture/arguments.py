"""Arguments of an ATen call by their schema names, so that no rule counts positions."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import CeilToInt, FloatTrueDiv, ToFloat

__all__ = ["arguments", "shape_of", "shape_of_tensor", "takes_all"]


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call to an `OpOverload`, defaults included, by schema name."""
    assert isinstance(node.target, torch._ops.OpOverload), node.target
    bound: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            bound[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Shape in ``meta["val"]`` as plain ints and sympy expressions."""
    return shape_of_tensor(node.meta["val"])


def takes_all(cut: fx.Node) -> bool:
    """Whether an ``aten.slice`` is everything that it is cut from."""
    given = arguments(cut)
    return bool(given["step"] == 1 and shape_of(given["self"]) == shape_of(cut))


def shape_of_tensor(value: torch.Tensor) -> tuple[Any, ...]:
    """A fake tensor's shape as plain ints and sympy expressions."""
    sizes: tuple[Any, ...] = tuple(value.shape)
    return tuple(s if isinstance(s, int) else _expression(s) for s in sizes)


def _expression(size: torch.SymInt) -> Any:
    expression = size.node.expr
    if expression.has(ToFloat):
        expression = expression.replace(_WHOLE, lambda counted: counted)
    return int(expression) if expression.is_Integer else expression


# How torch writes the size of `arange(T + 0.0)` and `arange(0, T, step=1.0)`: T itself.
_COUNTED = sympy.Wild("counted", properties=[lambda size: size.is_integer])
_WHOLE = CeilToInt(FloatTrueDiv(ToFloat(_COUNTED), sympy.Float(1.0)))
