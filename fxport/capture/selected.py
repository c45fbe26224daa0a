"""Answers what forward asks about the tokens where tensors have shapes and no numbers.

    x[mask]            every row
    torch.where(mask)  the numbers of all elements
    rows.tolist()      an index: see `row_numbers`
    if mask.any():     yes
    if count == 0:     no
    counts.numpy()     of tokens sorted by expert: the first expert got them all
    ends[0].item()     .. of sums of these, too
    repeat_interleave(arange(E), counts)    one for each slot

One path of all that forward may take; what the other paths do, `fxport.capture.skips` proves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxport.capture.row_numbers import with_rows
from fxport.capture.run_lengths import array_of

__all__ = ["SORTS", "EverySelected"]

_ROWS = (torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere)
SORTS = (torch.argsort, Tensor.argsort, torch.sort, Tensor.sort)
_COUNTS = (torch.bincount, Tensor.bincount)
_EQUALS = (Tensor.__eq__, Tensor.eq, torch.eq)


def _accumulated(counts: list[Any], dim: int = 0, **_: Any) -> list[Any] | None:
    return list(itertools.accumulate(counts)) if dim in (0, -1) else None


def _joined(*parts: list[Any], dim: int = 0) -> list[Any] | None:
    return list(itertools.chain(*parts))


def _difference(one: list[Any], other: list[Any]) -> list[Any] | None:
    alike = isinstance(one, list) and isinstance(other, list) and len(one) == len(other)
    return [a - b for a, b in zip(one, other, strict=True)] if alike else None


def _padded(counts: list[Any], pad: Any, mode: str = "constant", value: Any = 0) -> Any:
    return [0] * pad[0] + counts + [0] * pad[1] if len(pad) == 2 and not value else None


def _part(counts: list[Any], at: Any) -> Any:
    return counts[at] if type(at) is int or isinstance(at, slice) else None


_REPEATS = (torch.repeat_interleave, Tensor.repeat_interleave)
_ZEROS = (torch.zeros, torch.zeros_like, Tensor.new_zeros)
# What follows where counts are added up: a list for a tensor of several, a number for one.
_SUMS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.cumsum, Tensor.cumsum), _accumulated),
    **dict.fromkeys((torch.cat, torch.concat), _joined),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _difference),
    **dict.fromkeys((Tensor.to, Tensor.int, Tensor.long), lambda counts, *_, **__: counts),
    torch.nn.functional.pad: _padded,
    Tensor.__getitem__: _part,
}


class EverySelected(TorchFunctionMode):
    """While active, every token is selected by every mask that has no numbers.

    Args:
        numberless: whether a tensor has no numbers.

    Attributes:
        answered: whether anything was asked.
    """

    def __init__(self, numberless: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.answered = False
        self._numberless = numberless
        # Results of a comparison with zero, kept so that their identities are not given away.
        self._zeros: dict[int, Tensor] = {}
        # Entries of counts, and the number of each.
        self._numbers: dict[int, tuple[Tensor, Any]] = {}
        self._least: dict[int, tuple[Tensor, int]] = {}  # how many entries a count has at least
        self._tallies: dict[int, tuple[Tensor, list[Any]]] = {}  # of sums of counts
        self._found: dict[int, Tensor] = {}  # rows that were looked for
        self._sorted: Any = None  # how many there were, the last time that any were

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor):
            if func is torch.where and len(args) == 1 and self._numberless(args[0]):
                return self._rows(args[0])
            if func in _ROWS and self._numberless(args[0]):
                rows = self._rows(args[0])
                return rows if kwargs.get("as_tuple") else torch.stack(rows, dim=-1)
            if func is Tensor.__bool__ and args[0].numel() == 1 and self._numberless(args[0]):
                return self._yes(args[0])
            if func is Tensor.numpy and self._is_count(args[0]):
                return array_of(self._of_each(args[0]))
            if func is Tensor.tolist and self._is_count(args[0]):
                return self._of_each(args[0])
            if func is Tensor.unbind and args[1:] in ((), (0,)) and self._is_count(args[0]):
                return self._entries(args[0])
            if func is Tensor.item and id(args[0]) in self._numbers:
                self.answered = True
                return self._numbers[id(args[0])][1]
            if func in SORTS:
                self._sorted = args[0].shape[-1]
            if func in _REPEATS and isinstance(args[-1], Tensor) and self._is_count(args[-1]):
                return self._repeated(*args)
            if func in (Tensor.__getitem__, Tensor.__setitem__):
                args = (args[0], self._by_rows(with_rows(args[1])), *args[2:])
        result = func(*args, **kwargs)
        if self._sorted is not None:
            self._follow(func, args, kwargs, result)
        if func in _EQUALS and type(args[1]) is int and args[1] == 0:
            self._zeros[id(result)] = result
        if func in _COUNTS and "minlength" in kwargs:
            self._least[id(result)] = (result, kwargs["minlength"])
        return result

    def _is_count(self, tensor: Tensor) -> bool:
        whole = self._sorted is not None and tensor.dtype in (torch.int32, torch.int64)
        return whole and tensor.dim() == 1 and self._numberless(tensor)

    def _of_each(self, tensor: Tensor) -> list[Any]:
        self.answered = True
        found: list[Any] = self._tally(tensor)
        return found

    def _follow(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Sums and parts of counts, and one of them."""
        rule = _SUMS.get(func)
        if func in _ZEROS and result.dim() == 1 and type(result.shape[0]) is int:
            self._tallies[id(result)] = (result, [0] * result.shape[0])
        if rule is None or not isinstance(result, Tensor) or result.is_floating_point():
            return
        given = [self._tally(a) for a in (args[0] if isinstance(args[0], list | tuple) else args)]
        if not any(isinstance(numbers, list) for numbers in given):
            return
        try:
            found = rule(*given, **kwargs)
        except TypeError:  # not in this way
            return
        if isinstance(found, list):
            self._tallies[id(result)] = (result, found)
        elif found is not None:
            self._numbers[id(result)] = (result, found)

    def _tally(self, value: Any) -> Any:
        """The numbers of a tensor that counts, or adds counts up; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._tallies:
            return self._tallies[id(value)][1]
        if value.dim() != 1:
            return None
        if self._is_count(value):
            return [self._sorted, *[0] * (max(1, self._size(value)) - 1)]
        return None if self._numberless(value) else value.tolist()

    def _repeated(self, *args: Tensor) -> Tensor:
        """Each of several things, once for each of its slots: the first for all of them."""
        self.answered = True
        first = torch.zeros(self._sorted, dtype=torch.int64, device=args[0].device)
        return first if len(args) == 1 else args[0][first]

    def _size(self, tensor: Tensor) -> int:
        size = tensor.shape[0]
        return size if type(size) is int else self._least.get(id(tensor), (None, 1))[1]

    def _entries(self, tensor: Tensor) -> Any:
        counts = self._of_each(tensor)
        entries = tuple(tensor.select(0, i) for i in range(len(counts)))
        self._numbers.update((id(e), (e, n)) for e, n in zip(entries, counts, strict=True))
        return entries

    def _is_mask(self, value: Any) -> bool:
        is_mask = isinstance(value, Tensor) and value.dtype == torch.bool and value.dim() > 0
        return is_mask and self._numberless(value)

    def _yes(self, value: Tensor) -> bool:
        self.answered = True
        return id(value) not in self._zeros

    def _rows(self, mask: Tensor) -> tuple[Tensor, ...]:
        self.answered = True
        sizes, rank = tuple(mask.shape), mask.dim()
        counted = [torch.arange(size, device=mask.device) for size in sizes]
        placed = [c.view([-1 if i == a else 1 for i in range(rank)]) for a, c in enumerate(counted)]
        rows = tuple(c.expand(sizes).reshape(-1) for c in placed)
        self._found.update((id(r), r) for r in rows)
        return rows

    def found(self, tensor: Tensor) -> bool:
        """Whether these are rows that were looked for."""
        return id(tensor) in self._found

    def _by_rows(self, index: Any) -> Any:
        items = index if isinstance(index, tuple) else (index,)
        if not any(map(self._is_mask, items)):
            return index
        parts = (self._rows(item) if self._is_mask(item) else (item,) for item in items)
        return tuple(itertools.chain.from_iterable(parts))
