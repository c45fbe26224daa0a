"""How many slots each expert got, as numbers that nobody knows: sums of them are boundaries.

    counts = bincount(chosen).cpu().numpy()     n_0, n_1, .., n_E: each at least 1, or 0 if empty
    counts.cumsum(0)                            n_0, n_0 + n_1, ..
    start == end                                no: there is at least one slot in between
    x.shape[0] - sum(counts)                    0

Anything that these cannot answer for all tokens is refused: they are not converted to numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["NumbersTaken", "RunLength", "run_between", "run_lengths"]


class NumbersTaken(Exception):
    """Forward takes the values of tensors out of torch."""


class RunLength:
    """A sum of run lengths.

    Args:
        times: how often the run of each expert counts; 0 for those without slots.
        total: the number of slots, which all runs together have.
        empty: whether the run of each expert has no slots.
    """

    __slots__ = ("empty", "times", "total")

    def __init__(self, times: tuple[int, ...], total: Any, empty: tuple[bool, ...]) -> None:
        self.times = times
        self.total = total
        self.empty = empty

    def _made(self, times: tuple[int, ...]) -> Any:
        """A number where it is none of them, or all of several."""
        there = [n for n, empty in zip(times, self.empty, strict=True) if not empty]
        if not any(there):
            return 0
        # All of a single one stay what they are: a run is told from the whole by its kind.
        return self.total if len(there) > 1 and set(there) == {1} else self._of(times)

    def _of(self, times: tuple[int, ...]) -> RunLength:
        return RunLength(times, self.total, self.empty)

    def _times(self, other: Any) -> tuple[int, ...] | None:
        """Of a number that is a sum of run lengths: none of them, or all."""
        if isinstance(other, RunLength):
            return other.times
        if type(other) is int and other == 0:
            return (0,) * len(self.times)
        whole = isinstance(other, int | torch.SymInt) and statically_known_true(other == self.total)
        return tuple(int(not empty) for empty in self.empty) if whole else None

    def _combined(self, other: Any, one: int, two: int) -> Any:
        times = self._times(other)
        if times is None:
            return NotImplemented
        return self._made(tuple(one * a + two * b for a, b in zip(self.times, times, strict=True)))

    def __add__(self, other: Any) -> Any:
        return self._combined(other, 1, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._combined(other, 1, -1)

    def __rsub__(self, other: Any) -> Any:
        return self._combined(other, -1, 1)

    def _sign(self, other: Any) -> int:
        """Of ``self - other``, where it is the same for all tokens."""
        times = self._times(other)
        if times is None:
            raise NumbersTaken
        found = [
            a - b for a, b, empty in zip(self.times, times, self.empty, strict=True) if not empty
        ]
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

    def __hash__(self) -> int:
        raise NumbersTaken

    def __index__(self) -> int:
        raise NumbersTaken

    def __int__(self) -> int:
        raise NumbersTaken

    def __float__(self) -> float:
        raise NumbersTaken

    def __repr__(self) -> str:
        raise NumbersTaken


def run_lengths(empty: Sequence[bool], total: Any) -> tuple[RunLength | int, ...]:
    """One for each expert; 0 for those whose run is empty."""
    held = tuple(empty)
    found: list[RunLength | int] = []
    for number, is_empty in enumerate(held):
        times = tuple(int(n == number) for n in range(len(held)))
        found.append(0 if is_empty else RunLength(times, total, held))
    return tuple(found)


def run_between(start: Any, stop: Any, lengths: Sequence[RunLength | int]) -> int | None:
    """The expert whose run is from `start` to `stop`, if that is just one run."""
    before: Any = 0
    for expert, length in enumerate(lengths):
        if type(length) is int and length == 0:
            continue
        after = before + length
        if _alike(before, start) and _alike(after, stop):
            return expert
        before = after
    return None


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, RunLength) and isinstance(other, RunLength):
        return one.times == other.times and one.empty == other.empty
    if isinstance(one, RunLength) or isinstance(other, RunLength):
        return False
    return other is not None and bool(one == other)
