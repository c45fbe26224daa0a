"""Whether forward takes the same steps at every length, where the length is a plain number.

Nobody sees what code asks about ``int(T)``, so every length is walked, by shapes alone:

T = 37:  embedding(w, ids)  mul(x, 1.0)  view(x, [1, 37, 64])  masked_fill(s, mask [37, 37], -inf)
T = 90:  embedding(w, ids)  mul(x, 2.0)  ...                        90 is another path: look there

What depends on tokens or parameters has a shape only. Everything else (masks, position tables)
has its values, and must be made in the same way or be the beginning of what longer sequences use.
Where that takes more than `_MOST_STEPS`, a grid of lengths is walked, and what the code names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxport.capture.paths import Path, followed_calls, joined
from fxport.capture.questions import forward_only
from fxport.capture.recorder import (
    BeyondTable,
    Recorder,
    RecorderOfNumbers,
    Somewhere,
    Written,
    WrittenAnywhere,
)
from fxport.capture.sample import device_of
from fxport.capture.selected import EverySelected
from fxport.capture.steps import Constant, Reference, Step

__all__ = [
    "Walked",
    "last_within_tables",
    "plain_path",
    "steps_of",
    "steps_with_numbers",
    "walk",
]

# Operations in all, those on constants included; beyond it not every length is walked.
_MOST_STEPS = 40_000
_FEWEST = 16
# Changes of the path that are handed on: the graphs of their sides decide.
_FIRST = 2
# Bytes of constants that are kept for comparison.
_KEPT = 2**28


@dataclass(frozen=True)
class Walked:
    """What was seen.

    Attributes:
        others: lengths at which forward takes another path than at the usual ones, and their
            neighbours that do not; only the first few, and the longest.
        count: how many lengths were walked and are no others.
        longest: the longest that forward takes.
    """

    others: tuple[int, ...]
    count: int
    longest: int

    @property
    def every(self) -> bool:
        """Whether all lengths were walked, and none is another."""
        return self.count == self.longest - 1

    def in_words(self) -> str:
        if self.others:
            found = ", ".join(map(str, self.others))
            return f"another path at some of the lengths {found}, and the same graph"
        which = "every length" if self.every else f"{self.count} of the lengths"
        return f"forward takes the same steps at {which} from 2 to {self.longest}"


def walk(model: nn.Module, usual: int, longest: int, named: Sequence[int]) -> Walked | None:
    """Walks the lengths from 2 to `longest`.

    Args:
        usual: a length that forward takes.
        named: lengths that the model's code names.

    Returns:
        None when forward cannot be run on shapes that have no numbers behind them.
    """
    at = _At(model)
    try:
        low, _ = at.run(usual)
    except Exception:  # it looks at values, or uses an operation that has no shape function
        return None
    reference = Reference(usual, low)
    longest = _last(lambda n: at.takes(n), usual, longest)
    if longest == usual:
        return None
    if not at.same(longest, reference):
        last = _last(lambda n: at.same(n, reference), usual, longest)
        return Walked((last, last + 1, longest), 0, longest)
    high, cost = at.run(longest)
    reference = Reference(usual, low, longest, high)
    lengths = _which(longest, max(_MOST_STEPS // cost, _FEWEST), named)
    others: list[int] = []
    before = usual
    for n in lengths:
        if at.same(n, reference):
            before = n
            continue
        others += [_last(lambda k: at.same(k, reference), before, n), n]
        if len(others) >= 2 * _FIRST:
            break
    if others:
        return Walked(tuple(sorted({*others, longest})), 0, longest)
    return Walked((), len(lengths), longest)


def last_within_tables(model: nn.Module, usual: int, most: int) -> int | None:
    """The longest sequence whose positions are all in the tables of parameters.

    Shapes alone do not say so, and what a model of 128 positions does with thousands of tokens
    takes long to ask and does not matter.

    Args:
        usual: a length that forward takes.

    Returns:
        None where `most` tokens are no more than any table has, or nothing is known.
    """
    at = _At(model)
    try:
        tables = at.tables(usual)
    except Exception:  # see `walk`
        return None
    for rows in sorted(n for n in tables if usual <= n < most):
        if at.beyond(rows + 1):  # else it is looked up by something else than the position
            return _last(lambda n: not at.beyond(n), usual, rows + 1)
    return None


def _which(longest: int, most: int, named: Sequence[int]) -> list[int]:
    if longest - 1 <= most:
        return list(range(2, longest + 1))
    powers = [2**n for n in range(longest.bit_length())]
    near = {n + side for n in (*named, *powers) for side in (-1, 0, 1)}
    step = -(-longest // most)
    return sorted(n for n in {*range(2, longest, step), *near} if 2 <= n <= longest)


def _last(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The last length before one where it does not hold, by bisection; it holds at `low`."""
    if holds(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


class _At:
    """Runs of one model at several lengths; each leaves nothing on the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.written = Written(model)

    def run(
        self, length: int, seen: Callable[[int, Step], None] | None = None
    ) -> tuple[list[Step], int]:
        """See `steps_of`."""
        with forward_only(self.model), contextlib.closing(self.written):
            return steps_of(self.model, length, seen, self.written)

    def tables(self, length: int) -> set[int]:
        """The numbers of rows of the tables that are looked up at numbers no token says."""
        with forward_only(self.model), contextlib.closing(self.written):
            return _recorded(self.model, length, lambda *_: None, self.written).rows

    def beyond(self, length: int) -> bool:
        """Whether a position is beyond its table."""
        try:
            self.run(length, lambda *_: None)
        except BeyondTable:
            return True
        except Exception:  # another limit, which shapes tell, too
            return False
        return False

    def takes(self, length: int) -> bool:
        try:
            self.run(length, lambda *_: None)
        except Exception:  # beyond its limit
            return False
        return True

    def same(self, length: int, reference: Reference) -> bool:
        try:
            self.run(length, lambda i, step: reference.compare(length, i, step))
        except Exception:  # `Other`, or it fails where others do not
            return False
        return True


def steps_of(
    model: nn.Module,
    length: int,
    seen: Callable[[int, Step], None] | None,
    written: Written,
) -> tuple[list[Step], int]:
    """The steps, unless `seen` takes them, and what all operations cost.

    Args:
        written: takes what the model's buffers held.

    Raises:
        Exception: forward does not take this length, or cannot be run on shapes.
    """
    steps: list[Step] = []
    recorder = _recorded(model, length, seen or _keeping(steps), written)
    if seen is not None:
        seen(recorder.steps, _END)
    return [*steps, _END], recorder.cost


def _recorded(
    model: nn.Module, length: int, seen: Callable[[int, Step], None], written: Written
) -> Recorder:
    recorder = Recorder(written, seen)
    with recorder, Somewhere(device_of(model)), EverySelected(recorder.numberless):
        model(recorder.tokens(1, length))
    return recorder


def steps_with_numbers(model: nn.Module, length: int, written: WrittenAnywhere) -> list[Step]:
    """As `steps_of`, for one row of the first token; nothing is drawn from torch's generator.

    Raises:
        Exception: forward does not take this length.
    """
    steps: list[Step] = []
    recorder = RecorderOfNumbers(written, _keeping(steps))
    with recorder, torch.random.fork_rng(devices=[]):
        model(recorder.tokens_at(length, device_of(model)))
    return [*steps, _END]


def _keeping(steps: list[Step]) -> Callable[[int, Step], None]:
    kept = [0]

    def keep(_: int, step: Step) -> None:
        steps.append(Step(step.target, tuple(_within(v, kept) for v in step.given)))

    return keep


def plain_path(
    model: nn.Module, batch: int, length: int, history: Sequence[int] = ()
) -> Path | None:
    """What the user's code does in a call with plain sizes and tensors, after earlier calls.

    Returns:
        None where that is not known: it cannot be run on shapes, or asks about the tokens.
    """
    written = Written(model)
    recorder = Recorder(written, lambda *_: None)
    selected = EverySelected(recorder.numberless)
    ids = [recorder.tokens(batch, n) for n in (*history, length)]
    with forward_only(model), contextlib.closing(written), contextlib.suppress(Exception):
        paths: list[Path] = []
        with recorder, Somewhere(device_of(model)), selected, followed_calls(model, paths):
            for given in ids:
                model(given)
        return None if selected.answered else joined(paths)
    return None


_END = Step("the end", ())


def _within(value: Any, kept: list[int]) -> Any:
    """A constant without its value, when there are too many."""
    if isinstance(value, Constant) and value.value is not None:
        kept[0] += value.value.nbytes
        if kept[0] > _KEPT:
            return Constant(None, value.version, value.made)
    return value
