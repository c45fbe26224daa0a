"""Numbers that forward takes out of counted positions are said with the length itself.

    pos = torch.arange(T)[None].expand(B, T)     the largest entry is T - 1
    n = int(pos.max()) + 1                       T, also where shapes alone are known
    n = (pos.max() + 1).item()
    if pos.max() + 1 > 128: ...                  asks about T

Only what keeps every entry, or adds a whole number to each, is followed; after a write to any
tensor of whole numbers nothing is known any more.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["LargestCounted"]

_KEEP = {
    Tensor.unsqueeze, torch.unsqueeze, Tensor.expand, Tensor.view, Tensor.reshape, torch.reshape,
    Tensor.flatten, torch.flatten, Tensor.contiguous, Tensor.clone, torch.clone, Tensor.repeat,
    Tensor.long, Tensor.to, Tensor.max, torch.max, Tensor.amax, torch.amax,
}  # fmt: skip
_REDUCE = {Tensor.max, torch.max, Tensor.amax, torch.amax}
_ADD = {Tensor.add, torch.add, Tensor.__add__, Tensor.__radd__}
_SUBTRACT = {Tensor.sub, torch.sub, Tensor.__sub__}
_BOUNDS = ("start", "end", "step")
_COMPARE: dict[Any, Callable[[Any, Any], Any]] = {
    Tensor.__gt__: operator.gt, Tensor.gt: operator.gt, Tensor.__ge__: operator.ge,
    Tensor.ge: operator.ge, Tensor.__lt__: operator.lt, Tensor.lt: operator.lt,
    Tensor.__le__: operator.le, Tensor.le: operator.le,
}  # fmt: skip
_NUMBERS = {Tensor.item, Tensor.__int__, Tensor.__index__, Tensor.__bool__}


class LargestCounted(TorchFunctionMode):
    """Follows the largest entry of ``arange``, for the time of one or more calls."""

    def __init__(self) -> None:
        super().__init__()
        # By the identity of a tensor, which is kept: another could get that of one let go.
        self._largest: dict[int, tuple[Tensor, Any]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NUMBERS and (known := self._of(args[0])) is not None and not args[0].dim():
            return _said(func, known)
        result = func(*args, **kwargs)
        if _writes(func, args, kwargs):
            self._largest.clear()
        elif isinstance(result, Tensor) and result.dtype in (torch.int64, torch.bool):
            largest = self._made(func, args, kwargs)
            if largest is not None:
                self._largest[id(result)] = result, largest
        return result

    def _of(self, value: Any) -> Any:
        found = self._largest.get(id(value)) if isinstance(value, Tensor) else None
        return None if found is None else found[1]

    def _made(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The largest entry of what a call gives; None where it is not known."""
        if func is torch.arange:
            return _last(*args, **{k: v for k, v in kwargs.items() if k in _BOUNDS})
        known = self._of(args[0]) if args else None
        if func in _ADD | _SUBTRACT and len(args) == 2 and not kwargs:
            if func in _ADD and known is None:
                known, args = self._of(args[1]), args[::-1]
            whole = _is_whole(args[1])
            if known is None or not whole or isinstance(known, bool | torch.SymBool):
                return None
            return known + args[1] if func in _ADD else known - args[1]
        if known is None or isinstance(known, bool | torch.SymBool):
            return None
        if func in _COMPARE:
            number = not args[0].dim() and _is_whole(args[1])
            return _COMPARE[func](known, args[1]) if number else None
        if func is Tensor.__getitem__:
            return known if _takes_all(args[1]) else None
        if func in _REDUCE and (len(args) > 1 or kwargs):
            return None
        kept = func in _KEEP and not (func is Tensor.to and torch.bool in (*args, *kwargs.values()))
        return known if kept else None


def _said(func: Any, known: Any) -> Any:
    if func is not Tensor.__bool__ and not isinstance(known, bool | torch.SymBool):
        return known
    return bool(known) if func in (Tensor.__bool__, Tensor.item) else int(bool(known))


def _last(start: Any = 0, end: Any = None, step: Any = 1) -> Any:
    if end is None:
        start, end = 0, start
    return end - 1 if _is_whole(start) and _is_whole(end) and step == 1 else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _takes_all(index: Any) -> bool:
    """``pos[None]``, ``pos[None, :]``"""
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is ... or item == slice(None) for item in items)


def _writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether whole numbers may have been changed."""
    name = getattr(func, "__name__", "").split(".")[0]
    writes = name.endswith("_") and not name.endswith("__")
    writes = writes or name.startswith("__i") or name == "__setitem__" or "out" in kwargs
    if name in ("__index__", "__int__", "__invert__") or not writes:
        return False
    first = args[0] if args else None
    return not isinstance(first, Tensor) or not first.is_floating_point()
