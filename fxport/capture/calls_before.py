"""No number of earlier calls may make a difference, wherever they are counted.

    Layer.calls += 1                            changed by every call: forward is run with
    x = x * 2 if Layer.calls > 500 else x       Layer.calls = 499, 500, a million, ...
    TABLES[key] = ...                           changed by the first call alone: a memory

Forward is run on shapes, see `fxport.capture.walk`, or with numbers where that fails: its steps
must be the same ones each time.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn

from fxport.capture.location import forward_line, is_library, location_at
from fxport.capture.questions import forward_only, numbers_in
from fxport.capture.reachable import SIZE, STATE, Place, Reachable, draws_numbers
from fxport.capture.recorder import Written, WrittenAnywhere
from fxport.capture.state import State
from fxport.capture.steps import Other, Reference, Step
from fxport.capture.walk import steps_of, steps_with_numbers
from fxport.errors import Location, PortError, Reason, ReasonCode

__all__ = ["refuse_counted_calls"]

_LENGTHS = (37, 23, 11, 5, 3)
_FAR = 10**6 + 3  # calls
# Numbers that the code names; each is tried, and the one before it. Nothing is known beyond.
_MOST = 256


def refuse_counted_calls(model: nn.Module) -> bool:
    """Runs a clone several times, and puts everything back.

    Returns:
        Whether it could be run at any length; else nothing is known.

    Raises:
        PortError: forward takes other steps after other calls, by what they left beside the model
            or counted anywhere; at the line that leaves it.
    """
    kinds = (*((_Runs, n) for n in _LENGTHS), *((_RunsWithNumbers, n) for n in _LENGTHS[::-1]))
    for kind, length in kinds:
        runs = kind(model, length)
        with _put_back(model), contextlib.closing(runs.written):
            try:
                runs.first()
            except PortError:
                raise
            except Exception:  # too long, or it looks at values
                continue
            return True
    return False


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    with forward_only(model):
        before = Reachable(model)
        try:
            yield
        finally:
            before.restore()


class _Runs:
    def __init__(self, model: nn.Module, length: int) -> None:
        self.model, self.length = model, length
        self.written = Written(model)

    def steps(self) -> list[Step]:
        return steps_of(self.model, self.length, None, self.written)[0]

    def first(self) -> None:
        """The first calls: what they leave beside the model may be no more than a memory."""
        own, places = State(self.model), Reachable(self.model)
        before = places.values()
        first = self.steps()
        left = _differing(before, places.values())
        if not left and not own.changes():
            return
        own.restore()  # earlier calls that the modules tell of are looked at with numbers
        left = _differing(before, places.values())
        try:
            same = self._same(first, self.steps())
        except Exception as error:
            if not left:
                raise
            raise self._refused(places, left) from error
        if left and not same:
            raise self._refused(places, left)
        self._later()

    def _later(self) -> None:
        places = Reachable(self.model)  # what the first calls have made is there, too
        values = [places.values()]
        steps = []
        for _ in range(2):
            steps.append(self.steps())
            values.append(places.values())
        counted = _differing(*values)
        if not counted:
            return
        places.restore()
        if not self._same(*steps):
            raise self._refused(places, counted)
        named = numbers_in(self.model, _FAR)
        if len(named) > _MOST:
            raise self._refused(places, counted)
        tried = dict.fromkeys([_FAR, 0, 1, *(n - k for n in named for k in (1, 0)), -_FAR])
        for number in tried:
            if not all(_put(places, place, number) for place in counted):
                raise self._refused(places, counted)
            try:
                same = self._same(steps[-1], self.steps())
            except Exception:  # it fails after so many
                same = False
            places.restore()
            if not same:
                raise self._refused(places, counted)

    def _same(self, one: list[Step], other: list[Step]) -> bool:
        reference = Reference(self.length, one, exact=True)
        try:
            for index, step in enumerate(other):
                reference.compare(self.length, index, step)
        except Other:
            return False
        return len(one) == len(other)

    def _refused(self, places: Reachable, changed: list[Place]) -> PortError:
        place = changed[0]
        name = places.path(place)
        places.restore()
        line = _line_that_changes(places, place, self.steps)
        reason = Reason(
            ReasonCode.MUTATED_STATE,
            f"forward draws random numbers from `{name}`: its result depends on the call"
            if draws_numbers(places.holder(place))
            else f"forward changes `{name}`, and its steps depend on earlier calls",
            line or forward_line(self.model),
            "compute the value in __init__, or pass it through forward",
        )
        return PortError([reason])


class _RunsWithNumbers(_Runs):
    written: WrittenAnywhere

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__(model, length)
        self.written = WrittenAnywhere(model)

    def steps(self) -> list[Step]:
        return steps_with_numbers(self.model, self.length, self.written)


def _differing(*values: dict[Place, Any]) -> list[Place]:
    every = dict.fromkeys(place for found in values for place in found)
    return [p for p in every if any(v.get(p) != values[0].get(p) for v in values[1:])]


def _put(places: Reachable, place: Place, number: int) -> bool:
    """As if a counter had come to this number; False for an iterator, which nobody can set."""
    value: Any = places.get(place)
    if place[1] is STATE:
        return False
    if place[1] is SIZE:
        places.put(place, max(number, 0))
    elif type(value) in (int, float):
        places.put(place, type(value)(number))
    elif type(value) in (str, bytes, tuple):
        last = value[-1:] or type(value)()
        places.put(place, (value + last * max(number - len(value), 0))[: max(number, 0)])
    return True  # what is no number: the calls themselves had several of


def _line_that_changes(places: Reachable, place: Place, run: Any) -> Location | None:
    """The user's line after which something else lies at a place, in one more run."""
    before = places.values().get(place)
    at: list[tuple[str, int, str]] = []
    found: list[tuple[str, int, str]] = []

    def seen(frame: FrameType, event: str, _: Any) -> Any:
        if is_library(frame.f_code.co_filename):
            return None
        if at and not found and places.values().get(place) != before:
            found.append(at[-1])
        here = frame.f_back if event == "return" else frame
        if here is not None and not is_library(here.f_code.co_filename):
            at[:] = [(here.f_code.co_filename, here.f_lineno, here.f_code.co_name)]
        return seen

    kept = sys.gettrace()
    sys.settrace(seen)
    try:
        run()
    except Exception:  # the lines before it are known
        pass
    finally:
        sys.settrace(kept)
    return location_at(*found[0]) if found else None
