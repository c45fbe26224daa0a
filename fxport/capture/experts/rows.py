"""Values taken into the order of experts, and what is computed on all of them, row by row.

    forward, sorted                        beside it, in the order of slots
    tokens = order // K                    the token of each slot
    arange(N).repeat_interleave(K)[order]  the same
    y = x[tokens]                          y' = x.unsqueeze(1).expand(-1, K, ..).flatten(0, 1)
    w = weights.view(-1)[order]            w' = weights.view(-1)
    z = silu(y.float())                    z' = silu(y'.float())
    a, b = z.chunk(2, -1)                  a', b' = z'.chunk(2, -1)
    up[owner]                              up[owner'], owner a sorted vector of experts
    back = order.argsort(); z[back]        z'

Each function returns what the call gives, or `NotImplemented` where it is not understood.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxport.capture.experts.order import Kind, Label, Labels, same_sizes
from fxport.capture.run_lengths import same
from fxport.capture.unwritten import mark_unwritten

__all__ = [
    "ARGSORTS", "DIVIDES", "PARTS",
    "apart", "divide", "gather", "invert", "keep_rows", "take",
]  # fmt: skip

DIVIDES = (Tensor.__floordiv__, torch.floor_divide, Tensor.floor_divide, torch.div, Tensor.div)
PARTS = (torch.chunk, Tensor.chunk, torch.split, Tensor.split, torch.functional.split)
ARGSORTS = (torch.argsort, Tensor.argsort)
_CASTS = (
    Tensor.to, Tensor.type, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double,
    Tensor.long, Tensor.int, Tensor.contiguous, Tensor.type_as, Tensor.cuda, Tensor.cpu,
    Tensor.detach, Tensor.clone,
)  # fmt: skip
# One number after the other; what they are given beside it is numbers.
_ACTIVATIONS = tuple(
    getattr(place, name)
    for place in (torch, Tensor, torch.nn.functional)
    for name in (
        "silu", "gelu", "relu", "sigmoid", "tanh", "mish", "leaky_relu", "elu", "softplus",
        "hardswish", "square", "logsigmoid", "relu6", "selu",
    )
    if hasattr(place, name)
)  # fmt: skip
_COLUMNS = (Tensor.view, Tensor.reshape, torch.reshape)
_UNSQUEEZES = (Tensor.unsqueeze, torch.unsqueeze)
_GATHERS = (torch.gather, Tensor.gather)
_SELECTS = (torch.index_select, Tensor.index_select)
_NUMBERS = (Kind.ORDER, Kind.TOKEN, Kind.RUN_TOKEN)
# Hold the number of every slot exactly.
_EXACT = (torch.int64, torch.int32)


def keep_rows(
    labels: Labels, func: Any, first: Label, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Casts, activations, a column made of a vector, and copies of a column of numbers."""
    cast = func in _CASTS and not any(labels.of(a) for a in args[1:])
    cast = cast or _is_activation(func, first, args, kwargs)
    if not (cast or _is_column(func, args, kwargs) or _is_widened(first, func, args, kwargs)):
        return NotImplemented
    made = func(*args, **kwargs)
    if made is args[0]:
        return made
    if not isinstance(made, Tensor):  # ``x.type()`` names the type
        return NotImplemented
    if first.raw is not None:
        raw = func(first.raw, *args[1:], **kwargs)
        return labels.value(made, first.order, raw.clone())
    exact = first.kind is Kind.ONLY or made.dtype in _EXACT
    return labels.again(first, made) if exact else NotImplemented


def _is_activation(func: Any, first: Label, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    others = (*args[1:], *kwargs.values())  # True is `inplace`
    plain = not any(isinstance(a, Tensor) or a is True for a in others)
    return first.raw is not None and func in _ACTIVATIONS and plain


def apart(labels: Labels, func: Any, first: Label, args: Any, kwargs: dict[str, Any]) -> Any:
    """Parts of every row: ``y.chunk(2, dim=-1)``, ``y.split(sizes, -1)``."""
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    if first.raw is None or type(dim) is not int or dim % first.tensor.dim() == 0:
        return NotImplemented
    pairs = zip(func(*args, **kwargs), func(first.raw, *args[1:], **kwargs), strict=True)
    parts = [labels.value(part, first.order, raw.clone()) for part, raw in pairs]
    return NotImplemented if any(p is NotImplemented for p in parts) else tuple(parts)


def _is_column(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if kwargs or args[0].dim() != 1:
        return False
    sizes = _sizes(args[1:])
    if func in _UNSQUEEZES:
        return sizes in ((-1,), (1,))
    return func in _COLUMNS and sizes in ((-1, 1), (-1,))


def _is_widened(first: Label, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """``column.expand(-1, C)``, ``column.repeat(1, C)``: whole rows are meant."""
    sizes = _sizes(args[1:])
    kept = {Tensor.expand: -1, Tensor.repeat: 1}.get(func)
    column = first.kind in _NUMBERS and args[0].dim() == 2 and not kwargs
    return column and kept is not None and len(sizes) == 2 and sizes[0] == kept


def _sizes(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Whole numbers that are known now; others as None."""
    one = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    return tuple(n if type(n) is int else None for n in one)


def divide(first: Label, labels: Labels, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``order // K``."""
    rounds = {"rounding_mode"} if func in (torch.div, Tensor.div) else set()
    floor = kwargs.keys() == rounds and kwargs.get("rounding_mode", "floor") in ("floor", "trunc")
    if first.kind is not Kind.ORDER or not floor or len(args) != 2:
        return NotImplemented
    if type(args[1]) is not int or args[1] < 1:
        return NotImplemented
    return labels.numbers(func(*args, **kwargs), Kind.TOKEN, first.order, each=args[1])


def invert(first: Label, labels: Labels, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``order.argsort()``: the numbers of all slots, each once, so ties do not matter."""
    given = dict(zip(("self", "dim", "descending"), args, strict=False)) | kwargs
    along = given.get("dim", -1) in (0, -1) and not given.get("descending", False)
    if first.kind is not Kind.ORDER or not along or args[0].dim() != 1:
        return NotImplemented
    if given.keys() - {"self", "dim", "descending", "stable"}:
        return NotImplemented
    return labels.numbers(func(*args, **kwargs), Kind.INVERSE, first.order)


def gather(labels: Labels, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``gather(x, 0, index)`` with an index as wide as `x`, and `index_select`."""
    given = dict(zip(("self", "dim", "index"), args, strict=False)) | kwargs
    if "input" in given:
        given["self"] = given.pop("input")
    if func not in (*_GATHERS, *_SELECTS) or given.keys() != {"self", "dim", "index"}:
        return NotImplemented
    source, index = given["self"], given["index"]
    label = labels.of(index)
    if label is None or given["dim"] != 0 or labels.of(source) is not None:
        return NotImplemented
    whole = index.dim() == source.dim() and same_sizes(index.shape[1:], source.shape[1:])
    if not (whole if func in _GATHERS else index.dim() == 1):
        return NotImplemented
    return take(labels, source, label, lambda: func(*args, **kwargs))


def take(labels: Labels, source: Tensor, label: Label, true: Callable[[], Tensor]) -> Any:
    """``source[index]``, whole rows by a labelled index."""
    order = label.order
    if label.kind is Kind.RUN_TOKEN:
        fits = same(source.shape[0] * label.each, order.slots) and label.tensor.dim() == 1
        return source[label.tensor] if fits else NotImplemented
    if label.kind is Kind.RUN:
        return _take_run(source, label)
    if label.kind is Kind.ORDER and same(source.shape[0], order.slots):
        if (each := labels.numbered(source)) is not None:
            mark_unwritten(source, origin=True)
            return labels.numbers(true(), Kind.TOKEN, order, each=each)
        return labels.value(true(), order, source.clone())
    if label.raw is not None and label.raw.dtype in _EXACT:
        return labels.value(true(), order, source[label.raw])
    if label.kind is Kind.TOKEN and same(source.shape[0] * label.each, order.slots):
        return labels.value(true(), order, _of_each_slot(source, label.each))
    return NotImplemented


def _take_run(source: Tensor, label: Label) -> Any:
    """``source[order[start:end]]``: by token and slot where the tokens are taken, too."""
    order = label.order
    cells = [(each, found) for (e, each), found in order.cells.items() if e == label.expert]
    is_rows = order.rows[label.expert] is label.tensor
    if not cells or not is_rows or not same(source.shape[0], order.slots):
        return NotImplemented
    each, (token, slot) = cells[0]
    return source.view(-1, each, *source.shape[1:])[token, slot]


def _of_each_slot(source: Tensor, each: int) -> Tensor:
    """``source[arange(S) // each]``."""
    rest = source.shape[1:]
    wide = source.unsqueeze(1).expand(-1, each, *rest)
    return wide.reshape(source.shape[0] * each, *rest).clone()
