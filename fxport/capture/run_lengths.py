"""How many slots each expert got, as numbers that nobody knows: sums of them are boundaries.

    counts = bincount(chosen).cpu().numpy()     n_0, n_1, .., n_E: each at least 1, or 0 if empty
    counts.cumsum(0)                            n_0, n_0 + n_1, ..
    start == end                                no: there is at least one slot in between
    x.shape[0] - sum(counts)                    0

Anything that these cannot answer for all tokens is refused: they are not converted to numbers,
and say nothing of the runs of another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["NumbersTaken", "RunLength", "alike", "array_of", "run_between", "run_lengths", "same"]


class NumbersTaken(Exception):
    """Forward takes the values of tensors out of torch."""


class RunLength:
    """A sum of run lengths.

    Args:
        times: how often the run of each expert counts; 0 for those without slots.
        total: the number of slots, which all runs together have.
        empty: whether the run of each expert has no slots.
        of: what was counted; lengths of runs of something else are not known beside these.
    """

    __slots__ = ("empty", "of", "times", "total")

    def __init__(
        self, times: tuple[int, ...], total: Any, empty: tuple[bool, ...], of: object
    ) -> None:
        self.times = times
        self.total = total
        self.empty = empty
        self.of = of

    def _made(self, times: tuple[int, ...]) -> Any:
        """A number where it is none of them, or all of several.

        A total that is a symbol stays a sum: as the end of a slice that begins at another one,
        torch would take the slice apart before any mode sees it.
        """
        made = RunLength(times, self.total, self.empty, self.of)
        if not any(n for n, empty in zip(times, self.empty, strict=True) if not empty):
            return 0
        return self.total if made.whole and type(self.total) is int else made

    @property
    def whole(self) -> bool:
        """Whether these are all of several runs; all of a single one are that run."""
        there = [n for n, empty in zip(self.times, self.empty, strict=True) if not empty]
        return len(there) > 1 and set(there) == {1}

    def _times(self, other: Any) -> tuple[int, ...]:
        """Of a number that is a sum of run lengths: none of them, or all."""
        if isinstance(other, RunLength) and other.of is self.of:
            return other.times
        if type(other) is int and other == 0:
            return (0,) * len(self.times)
        if same(other, self.total):
            return tuple(int(not empty) for empty in self.empty)
        raise NumbersTaken

    def _combined(self, other: Any, one: int, two: int) -> Any:
        if not isinstance(other, RunLength | int | float | torch.SymInt | torch.Tensor):
            return NotImplemented  # an array does it for each of its own
        pairs = zip(self.times, self._times(other), strict=True)
        return self._made(tuple(one * a + two * b for a, b in pairs))

    def __add__(self, other: Any) -> Any:
        return self._combined(other, 1, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._combined(other, 1, -1)

    def __rsub__(self, other: Any) -> Any:
        return self._combined(other, -1, 1)

    def _sign(self, other: Any) -> int:
        """Of ``self - other``, where it is the same for all tokens."""
        pairs = zip(self.times, self._times(other), self.empty, strict=True)
        found = [a - b for a, b, empty in pairs if not empty]
        if min(found) >= 0:
            return int(max(found) > 0)
        if max(found) <= 0:
            return -1
        raise NumbersTaken

    def __eq__(self, other: object) -> bool:
        return self._sign(other) == 0

    def __ne__(self, other: object) -> bool:
        return self._sign(other) != 0

    def __gt__(self, other: Any) -> bool:
        return self._sign(other) > 0

    def __ge__(self, other: Any) -> bool:
        return self._sign(other) >= 0

    def __lt__(self, other: Any) -> bool:
        return self._sign(other) < 0

    def __le__(self, other: Any) -> bool:
        return self._sign(other) <= 0

    def __bool__(self) -> bool:
        return self._sign(0) != 0

    def _taken(self, *_: Any) -> Any:
        raise NumbersTaken

    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _taken
    __mod__ = __rmod__ = __divmod__ = __pow__ = __rpow__ = __neg__ = __abs__ = _taken
    __hash__ = __index__ = __int__ = __float__ = __repr__ = _taken  # type: ignore[assignment]


def array_of(numbers: Sequence[Any]) -> Any:
    """An array of objects ``[E]``, in place of what ``counts.numpy()`` gives."""
    import numpy

    array = numpy.empty(len(numbers), dtype=object)
    array[:] = numbers
    return array


def same(one: Any, other: Any) -> bool:
    """Whether two sizes are equal for all inputs."""
    sizes = isinstance(one, int | torch.SymInt) and isinstance(other, int | torch.SymInt)
    return sizes and bool(statically_known_true(one == other))


def run_lengths(empty: Sequence[bool], total: Any, of: object) -> tuple[RunLength | int, ...]:
    """One for each expert; 0 for those whose run is empty."""
    held = tuple(empty)
    found: list[RunLength | int] = []
    for number, is_empty in enumerate(held):
        times = tuple(int(n == number) for n in range(len(held)))
        found.append(0 if is_empty else RunLength(times, total, held, of))
    return tuple(found)


def run_between(start: Any, stop: Any, lengths: Sequence[RunLength | int]) -> int | None:
    """The expert whose run is from `start` to `stop`, if that is just one run."""
    before: Any = 0
    for expert, length in enumerate(lengths):
        if type(length) is int and length == 0:
            continue
        after = before + length
        if alike(before, start) and alike(after, stop):
            return expert
        before = after
    return None


def alike(one: Any, other: Any) -> bool:
    """Whether two places in the order are the same one, whatever the lengths are."""
    if isinstance(one, RunLength) and isinstance(other, RunLength):
        return one.of is other.of and (one.times, one.empty) == (other.times, other.empty)
    for sum_, size in ((one, other), (other, one)):
        if isinstance(sum_, RunLength):
            return sum_.whole and same(size, sum_.total)
    return same(one, other)
