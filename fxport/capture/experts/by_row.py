"""Calls on sorted rows that give one row from each.

    forward, sorted                        beside it, in the order of slots
    owner, order = chosen.sort()           owner' = chosen
    repeat_interleave(arange(E), counts)   the same
    w = up[owner]                          w' = up[chosen]
    bmm(y[:, None], w), y @ shared         bmm(y'[:, None], w'), y' @ shared
    y + bias, y * gates[:, None]           y' + bias, y' * gates'[:, None]
    grouped_mm(y, up, ends)                bmm(y'[:, None], up[chosen])[:, 0]

A call is made twice, on what is sorted and on what is not. `_RULES` says of which arguments the
result is one row for each: the first axis may meet nothing but itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxport.capture.experts.order import ExpertOrder, Kind, Label, Labels

__all__ = ["GROUPED", "call_by_row", "grouped", "owners"]

GROUPED = torch._grouped_mm
_INTEGERS = (torch.int64, torch.int32)


def call_by_row(labels: Labels, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call by the rule of its function; `NotImplemented` where there is none that holds."""
    rule = _RULES.get(func)
    given = (*args, *kwargs.values())
    known = [label for a in given if (label := labels.of(a)) is not None]
    if rule is None or not known or any(label.kind is not Kind.VALUE for label in known):
        return NotImplemented
    order = known[0].order
    alike = all(label.order is order for label in known)
    if not alike or any(labels.of(v) for v in kwargs.values()):
        return NotImplemented
    if not rule([_Argument(a, labels.of(a)) for a in args], kwargs):
        return NotImplemented
    made = func(*args, **kwargs)
    raw = func(*(_raw(labels, a) for a in args), **kwargs)
    if not isinstance(made, Tensor):
        return NotImplemented
    return labels.value(made, order, raw.clone() if func in _VIEWS else raw)


def _raw(labels: Labels, value: Any) -> Any:
    label = labels.of(value)
    if label is not None:
        return label.raw
    # einsum and cat take their operands in a list
    return [_raw(labels, v) for v in value] if isinstance(value, list) else value


class _Argument:
    """An argument, and whether it is sorted rows."""

    def __init__(self, value: Any, label: Label | None) -> None:
        self.value = value
        self.rows = label is not None

    @property
    def rank(self) -> int:
        """Of a tensor; -1 of anything else."""
        return self.value.dim() if isinstance(self.value, Tensor) else -1


_Rule = Callable[[Sequence[_Argument], dict[str, Any]], bool]


# --- one rule for each kind of call --------------------------------------------------------------


def _pointwise(args: Sequence[_Argument], kwargs: dict[str, Any]) -> bool:
    """Rows meet rows of as many axes, and what is spread along them."""
    rank = max(a.rank for a in args)
    if kwargs or rank < 1:
        return False
    for a in args:
        plain = isinstance(a.value, int | float)
        spread = 0 <= a.rank < rank or (a.rank == rank and _is(a.value.shape[0], 1))
        if not (a.rank == rank if a.rows else plain or spread):
            return False
    return True


def _product(args: Sequence[_Argument], kwargs: dict[str, Any]) -> bool:
    """``y[S, 1, I] @ w[S, I, O]`` row by row, or ``y[S, I] @ w[I, O]``."""
    if kwargs or len(args) != 2:
        return False
    one, other = args
    if one.rows and other.rows:
        return one.rank == other.rank and one.rank >= 3
    return one.rows and one.rank >= 2 and 1 <= other.rank <= 2


def _linear(args: Sequence[_Argument], kwargs: dict[str, Any]) -> bool:
    return args[0].rows and args[0].rank >= 2 and not any(a.rows for a in args[1:])


def _look_up(args: Sequence[_Argument], kwargs: dict[str, Any]) -> bool:
    """``embedding(owner, table)``"""
    index, table = (*args, *(_Argument(v, None) for v in kwargs.values()))[:2]
    return index.rows and index.value.dtype in _INTEGERS and not table.rows


def _along(args: Sequence[_Argument], kwargs: dict[str, Any]) -> bool:
    """Reductions and norms along named axes, the first not among them."""
    rank = args[0].rank
    given = kwargs.get("dim", args[1].value if len(args) > 1 else None)
    dims = [given] if type(given) is int else given
    if not args[0].rows or not isinstance(dims, list | tuple) or not dims:
        return False
    return all(type(d) is int and d % rank for d in dims)


def _norm(args: Sequence[_Argument], kwargs: dict[str, Any]) -> bool:
    """``layer_norm(y, shape, ..)``: over the last axes."""
    shape = kwargs.get("normalized_shape", args[1].value if len(args) > 1 else None)
    sizes = isinstance(shape, list | tuple) and len(shape) < args[0].rank
    return args[0].rows and sizes and not any(a.rows for a in args[1:])


def _axis(args: Sequence[_Argument], kwargs: dict[str, Any]) -> bool:
    """`unsqueeze` and `squeeze` behind the rows."""
    given = [*(a.value for a in args[1:]), *kwargs.values()]
    if not args[0].rows or len(given) != 1 or type(given[0]) is not int:
        return False
    return given[0] != 0 and given[0] > -args[0].rank


def _turned(args: Sequence[_Argument], kwargs: dict[str, Any]) -> bool:
    """`transpose` of axes behind the rows."""
    dims = [a.value for a in args[1:]]
    fits = not kwargs and len(dims) == 2 and all(type(d) is int for d in dims)
    return args[0].rows and fits and all(d % args[0].rank for d in dims)


def _reshaped(args: Sequence[_Argument], kwargs: dict[str, Any]) -> bool:
    """A view with as many rows: what one holds stays in it, see `Labels.value`."""
    return args[0].rows and not kwargs and not any(a.rows for a in args[1:])


def _part(args: Sequence[_Argument], kwargs: dict[str, Any]) -> bool:
    """``y[:, 0]``, ``y[..., :48]``, ``y[:, None]``: of each row."""
    if len(args) != 2 or not args[0].rows or not isinstance(args[1].value, tuple):
        return False
    first, *rest = args[1].value
    if not all(i is None or i is Ellipsis or type(i) is int or _is_cut(i) for i in rest):
        return False
    taken = sum(i is not None and i is not Ellipsis for i in rest)
    every = _is_cut(first) and (first.start, first.stop, first.step) == (None, None, None)
    return every or (first is Ellipsis and taken < args[0].rank)


def _is_cut(at: Any) -> bool:
    ends = (at.start, at.stop, at.step) if isinstance(at, slice) else ("",)
    return all(end is None or type(end) is int for end in ends)


def _is(size: Any, number: int) -> bool:
    return type(size) is int and size == number


def _einsum(args: Sequence[_Argument], kwargs: dict[str, Any]) -> bool:
    """``einsum("si,sio->so", y, w)``: one letter is that of the rows, and of nothing else."""
    equation, operands = args[0].value, args[1:]
    if kwargs or not isinstance(equation, str) or "->" not in equation or "." in equation:
        return False
    given, result = equation.replace(" ", "").split("->")
    of_each = given.split(",")
    letters = {of[:1] for of, a in zip(of_each, operands, strict=False) if a.rows}
    if len(letters) != 1 or len(of_each) != len(operands):
        return False
    row = letters.pop()
    first = [result, *(of for of, a in zip(of_each, operands, strict=True) if a.rows)]
    others = [of for of, a in zip(of_each, operands, strict=True) if not a.rows]
    return all(of.rfind(row) == 0 for of in first) and not any(row in of for of in others)


def _functions(*names: str) -> list[Any]:
    places = (torch, Tensor, torch.nn.functional)
    return [getattr(p, n) for p in places for n in names if hasattr(p, n)]


_AXES = _functions("unsqueeze", "squeeze")
_TURNS = _functions("transpose")
_SHAPES = _functions("view", "reshape", "flatten")
_VIEWS = (*_AXES, *_TURNS, *_SHAPES, Tensor.__getitem__)
_NUMBERS = _functions(
    "add", "sub", "mul", "div", "true_divide", "maximum", "minimum", "pow", "neg", "exp", "abs",
    "sqrt", "rsqrt", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__",
    "__truediv__", "__rtruediv__", "__pow__", "__neg__",
)  # fmt: skip

_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(_NUMBERS, _pointwise),
    **dict.fromkeys(_functions("matmul", "bmm", "mm", "__matmul__"), _product),
    **dict.fromkeys(_functions("softmax", "log_softmax", "sum", "mean", "amax"), _along),
    **dict.fromkeys(_functions("layer_norm", "rms_norm"), _norm),
    **dict.fromkeys(_AXES, _axis),
    **dict.fromkeys(_TURNS, _turned),
    **dict.fromkeys(_SHAPES, _reshaped),
    **dict.fromkeys(_functions("linear"), _linear),
    **dict.fromkeys(_functions("einsum"), _einsum),
    **dict.fromkeys(_functions("embedding"), _look_up),
    Tensor.__getitem__: _part,
}


# --- products of groups --------------------------------------------------------------------------


def grouped(labels: Labels, rows: Label, weight: Tensor) -> Any:
    """``grouped_mm(y, weight, ends)`` where `ends` are those of the runs: each row times the
    weight of its expert."""
    order, raw = rows.order, rows.raw
    if raw is None or raw.dim() != 2 or weight.dim() != 3 or weight.shape[0] != order.experts:
        return NotImplemented
    made = torch.bmm(raw.unsqueeze(1), weight[order.chosen]).squeeze(1)
    return labels.value(made[_sorted(order)], order, made)


def owners(labels: Labels, order: ExpertOrder) -> Any:
    """The expert of each sorted slot."""
    return labels.value(order.chosen[_sorted(order)], order, order.chosen.clone())


def _sorted(order: ExpertOrder) -> Tensor:
    """What forward holds is sorted: that is what anybody else reads."""
    return torch.argsort(order.chosen, stable=True)
