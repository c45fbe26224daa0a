"""Nothing that forward counts beside its tensors may change its steps, at whatever number."""

from __future__ import annotations

import collections
import contextvars
import functools
import itertools
import os
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxport.capture.calls_before import refuse_counted_calls
from fxport.capture.clone import clone_for_capture
from fxport.capture.export import capture
from fxport.capture.reachable import SIZE, Reachable
from fxport.capture.walk import plain_path, walk
from fxport.errors import PortError, ReasonCode
from tests.capture import counted_beside
from tests.zoo import remembered
from tests.zoo.called import Tiny

FAR = 500


class Counts(Tiny):
    """Calls `count`, which says how many calls there were, and doubles the logits after many."""

    def __init__(self, count: Callable[[Any], int], start: Any = None) -> None:
        super().__init__()
        self.count = count
        self.kept = start

    def forward(self, ids: Tensor) -> Tensor:
        calls = self.count(self)
        logits = super().forward(ids)
        return logits * 2 if calls > 500 else logits


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class OfClass:
    calls = 0
    held: list[int] = []  # noqa: RUF012


NUMBERS = [0]
NESTED = {"a": {"calls": 0}}
SPACE = types.SimpleNamespace(calls=0)
ENDLESS = itertools.count()


def appended(model: Counts) -> int:
    model.kept.append(0)
    return len(model.kept)


def added(model: Counts) -> int:
    model.kept += type(model.kept)((1,)) if isinstance(model.kept, tuple) else "x"
    return len(model.kept)


def put(model: Counts) -> int:
    model.kept[len(model.kept)] = 1
    return len(model.kept)


def in_set(model: Counts) -> int:
    model.kept.add(len(model.kept))
    return len(model.kept)


def popped(model: Counts) -> int:
    if model.kept:
        model.kept.pop()
    return 0 if model.kept else FAR + 1


def slotted(model: Counts) -> int:
    model.kept.calls += 1
    return int(model.kept.calls)


def of_class(_: Counts) -> int:
    OfClass.calls += 1
    return OfClass.calls


def in_class(_: Counts) -> int:
    OfClass.held.append(1)
    return len(OfClass.held)


def number(_: Counts) -> int:
    NUMBERS[0] += 1
    return NUMBERS[0]


def nested(_: Counts) -> int:
    NESTED["a"]["calls"] += 1
    return NESTED["a"]["calls"]


def space(_: Counts) -> int:
    SPACE.calls += 1
    return int(SPACE.calls)


def endless(_: Counts) -> int:
    return next(ENDLESS)


def default(_: Counts, seen: list[int] = [0]) -> int:  # noqa: B006
    seen[0] += 1
    return seen[0]


def closed() -> Callable[[Counts], int]:
    calls = 0

    def count(_: Counts) -> int:
        nonlocal calls
        calls += 1
        return calls

    return count


def attribute(_: Counts) -> int:
    attribute.calls += 1  # type: ignore[attr-defined]
    return int(attribute.calls)  # type: ignore[attr-defined]


attribute.calls = 0  # type: ignore[attr-defined]


@functools.lru_cache
def cell() -> list[int]:
    return [0]


def remembers(_: Counts) -> int:
    cell()[0] += 1
    return cell()[0]


def environment(_: Counts) -> int:
    os.environ["FXPORT_TEST_CALLS"] = str(int(os.environ.get("FXPORT_TEST_CALLS", "0")) + 1)
    return len("x" * int(os.environ["FXPORT_TEST_CALLS"]))


def on_torch(_: Counts) -> int:
    torch.fxport_test_calls = getattr(torch, "fxport_test_calls", 0) + 1  # type: ignore[attr-defined]
    return int(torch.fxport_test_calls)  # type: ignore[attr-defined]


CONTEXT: contextvars.ContextVar[int] = contextvars.ContextVar("CONTEXT", default=0)


def in_context(_: Counts) -> int:
    CONTEXT.set(CONTEXT.get() + 1)
    return CONTEXT.get()


COUNTING: dict[str, tuple[Callable[[Any], int], Callable[[], Any]]] = {
    "list": (appended, list),
    "deque": (appended, collections.deque),
    "bytes": (appended, bytearray),
    "text": (added, str),
    "tuple": (added, tuple),
    "dict": (put, dict),
    "set": (in_set, set),
    "fewer": (popped, lambda: list(range(600))),
    "slots": (slotted, Slotted),
    "class": (of_class, type(None)),
    "list of a class": (in_class, type(None)),
    "list of a file": (number, type(None)),
    "nested": (nested, type(None)),
    "namespace": (space, type(None)),
    "iterator": (endless, type(None)),
    "default": (default, type(None)),
    "closure": (closed(), type(None)),
    "function": (attribute, type(None)),
    "memory": (remembers, type(None)),
    "context": (in_context, type(None)),
    "torch": (on_torch, type(None)),
}


def refused(model: nn.Module) -> PortError:
    with pytest.raises(PortError) as caught:
        refuse_counted_calls(clone_for_capture(model.eval()))
    assert caught.value.reasons[0].code is ReasonCode.MUTATED_STATE
    return caught.value


@pytest.mark.parametrize("name", COUNTING)
def test_what_is_counted_and_asked_about_is_refused_at_its_line(name: str) -> None:
    count, start = COUNTING[name]
    location = refused(Counts(count, start())).reasons[0].location
    assert location is not None and location.file == __file__


def test_nothing_is_left_behind() -> None:
    before = NUMBERS[0], OfClass.calls, len(OfClass.held), SPACE.calls
    for name in ("list of a file", "class", "list of a class", "namespace"):
        refused(Counts(COUNTING[name][0]))
    assert (NUMBERS[0], OfClass.calls, len(OfClass.held), SPACE.calls) == before


def test_environment() -> None:
    try:
        location = refused(Counts(environment)).reasons[0].location
        assert location is not None and "os.environ[" in location.source
    finally:
        os.environ.pop("FXPORT_TEST_CALLS", None)


class Beside(Tiny):
    """What it calls counts in a file that defines no module."""

    def __init__(self, called: Callable[..., Tensor]) -> None:
        super().__init__()
        self.called = called

    def forward(self, ids: Tensor) -> Tensor:
        return self.called(super().forward(ids))


def test_a_counter_of_another_file_is_found() -> None:
    location = refused(Beside(counted_beside.counted)).reasons[0].location
    assert location is not None and "# HERE" in location.source
    assert counted_beside.CALLS == 0


class Flag(Tiny):
    """Another path from the second call on, by a global: a memory would do the same again."""

    def forward(self, ids: Tensor) -> Tensor:
        first = "called" not in NESTED
        NESTED["called"] = {}
        logits = super().forward(ids)
        return logits if first else logits * 2


def test_what_the_first_call_leaves_beside_the_model_is_no_more_than_a_memory() -> None:
    refused(Flag())
    assert "called" not in NESTED
    for make in remembered.EXACT.values():
        assert refuse_counted_calls(clone_for_capture(make().eval()))


class Keeps(Tiny):
    """A memory beside the model, and a cache of its own that every call writes to."""

    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(4, 64, 61), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows, length = ids.shape
        NESTED.setdefault("table", {})
        self.kept[:rows, :length] = super().forward(ids)
        return self.kept[:rows, :length]


class ReadsBefore(Keeps):
    """What the call before has written there."""

    def forward(self, ids: Tensor) -> Tensor:
        before = self.kept[: ids.shape[0], : ids.shape[1]].clone()
        return super().forward(ids) + before


def test_what_every_call_writes_over_is_no_other_step() -> None:
    model = clone_for_capture(Keeps().eval())
    assert refuse_counted_calls(model)
    assert not model.kept.any() and "table" not in NESTED
    with pytest.raises(PortError) as error:
        capture(ReadsBefore().eval())
    assert error.value.reasons[0].code is ReasonCode.MUTATED_STATE


class Logs(Tiny):
    """Counts, and keeps what it saw; nothing of it is read for the logits."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.sizes: dict[int, int] = {}

    def forward(self, ids: Tensor) -> Tensor:
        Logs.calls += 1
        logits = super().forward(ids)
        self.seen.append(logits.detach())
        self.sizes[len(self.sizes)] = 1
        if Logs.calls % 100 == 0 or len(self.seen) > 50:
            self.seen.clear()
        self.last = counted_beside.noted(logits)
        return logits


class NamesMany(Tiny):
    """One call of all is special; its number is behind many smaller ones."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = tuple(range(2, 80))
        self.calls = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        logits = super().forward(ids)
        return logits * 2 if self.calls == 777 else logits


def test_every_number_that_the_code_names_is_tried() -> None:
    refused(NamesMany())


def test_more_numbers_than_are_tried_are_refused() -> None:
    model = Logs()
    model.sizes_of = tuple(range(2, 300))  # type: ignore[assignment]
    refused(model)


def test_what_is_only_logged_is_taken() -> None:
    assert refuse_counted_calls(clone_for_capture(Logs().eval()))
    assert Logs.calls == 0 and counted_beside.SEEN == {"calls": 0}


class Writes(Tiny):
    """Writes constants to a buffer, and to a tensor of its file."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(40))

    def forward(self, ids: Tensor) -> Tensor:
        self.kept[: ids.shape[1]] = torch.arange(ids.shape[1]) * 1.0
        OF_FILE.add_(1)
        return super().forward(ids)


OF_FILE = torch.zeros(1)


@pytest.mark.parametrize(
    "run", [refuse_counted_calls, lambda m: plain_path(m, 1, 7), lambda m: walk(m, 7, 9, ())]
)
def test_no_number_is_written_to_the_memory_of_the_model(run: Callable[[nn.Module], Any]) -> None:
    model = clone_for_capture(Writes().eval())
    assert run(model) is not None
    assert not model.kept.any() and not OF_FILE.any()


# --- where shapes do not do -----------------------------------------------------------------------


class Sums(Tiny):
    """Looks at its numbers in a way that shapes cannot answer, and at how often it was called."""

    def __init__(self, number: int = 500) -> None:
        super().__init__()
        self.number = number
        self.calls = 0
        self.register_buffer("kept", torch.zeros(1, 3, 61))

    def forward(self, ids: Tensor) -> Tensor:
        NUMBERS[0] += 1
        logits = super().forward(ids)
        OF_FILE.add_(logits.sum())
        self.kept.copy_(logits[:, :3])
        positive = np.asarray(logits.detach()).sum() > 1e9
        return logits * 2 if positive or NUMBERS[0] > self.number else logits


def test_with_numbers_where_shapes_do_not_do() -> None:
    refused(Sums())
    assert NUMBERS == [0] and not OF_FILE.any()


def test_what_is_counted_and_not_asked_about_is_taken_with_numbers() -> None:
    model = clone_for_capture(Sums(10**9).eval())
    drawn = torch.get_rng_state()
    assert refuse_counted_calls(model)
    assert NUMBERS == [0] and not OF_FILE.any() and not model.kept.any()
    assert torch.equal(drawn, torch.get_rng_state())


class NeverRuns(Tiny):
    """Only in a trace."""

    def forward(self, ids: Tensor) -> Tensor:
        if type(ids) is Tensor:
            raise RuntimeError("no kernel for this machine")
        return super().forward(ids)


def test_what_cannot_be_run_is_refused() -> None:
    clone = clone_for_capture(NeverRuns().eval())
    assert not refuse_counted_calls(clone)
    with pytest.raises(PortError) as caught:
        capture(NeverRuns().eval())
    location = caught.value.reasons[0].location
    assert location is not None and location.file == __file__


class Inferred(Tiny):
    """Constants made in inference mode have no versions."""

    more = 1

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        kept = torch.zeros(ids.shape[1], 1)
        kept += self.more if ids.shape[1] > 9 else 1
        return super().forward(ids) * kept


def test_inference_mode_is_run_on_shapes() -> None:
    model = clone_for_capture(Inferred().eval())
    assert plain_path(model, 1, 7) is not None
    walked = walk(model, 7, 12, ())
    assert walked is not None and walked.every
    model.more = 2  # type: ignore[assignment]
    walked = walk(model, 7, 12, ())
    assert walked is not None and walked.others == (9, 10, 12)


# --- places ------------------------------------------------------------------------------------


def numbers() -> Iterator[int]:
    yield from range(3)


@pytest.mark.parametrize(
    "held", [[1, 2], {"a": 1}, {1, 2}, collections.deque([1]), bytearray(b"ab"), Slotted()]
)
def test_places_are_put_back(held: Any) -> None:
    model = Tiny()
    model.held = held
    places = Reachable(model)
    before = places.values()
    for place in before:
        if place[1] is SIZE and places.get(place) is held:
            places.put(place, 7)
    if isinstance(held, Slotted):
        held.calls = 5
    else:
        assert len(held) == 7
    assert places.values() != before
    places.restore()
    assert places.values() == before


def test_what_is_too_large_is_known_by_its_size() -> None:
    model = Tiny()
    model.held = list(range(20_000))
    places = Reachable(model)
    assert len(places.values()) < 20_000
    (place,) = [p for p in places.values() if p[1] is SIZE and places.get(p) is model.held]
    model.held.append(1)
    assert places.values()[place] == 20_001 and places.path(place) == "held"


def test_how_far_a_generator_is_is_seen() -> None:
    model = Tiny()
    model.held = numbers()
    places = Reachable(model)
    before = places.values()
    next(model.held)
    assert places.values() != before
