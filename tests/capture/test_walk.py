"""Where nobody sees what forward asks about the length, every length is walked."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fxport.api import _walked
from fxport.capture import earlier_calls, lengths, longest
from fxport.capture import walk as walking
from fxport.capture.clone import clone_for_capture
from fxport.capture.lengths import trace_at_lengths
from fxport.capture.questions import ask
from fxport.capture.symbolic import trace_symbolically
from fxport.capture.walk import walk
from fxport.errors import PortError, ReasonCode
from fxport.parallel.api import plan
from fxport.report import Outcome
from tests.zoo.called import Tiny

LONGEST = 96


class Scaled(Tiny):
    """The logits times a number that Python makes of the length."""

    def __init__(self, number: Callable[[int], float]) -> None:
        super().__init__()
        self.number = number

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.number(int(ids.shape[1]))


# Another number at the second length of each pair than at the first.
SIDES: dict[str, tuple[Callable[[int], float], set[int]]] = {
    "a fraction of the limit": (lambda n: 1.0 if n / LONGEST < 0.71 else 2.0, {68, 69}),
    "near the limit": (lambda n: 1.0 if n * 1.001 < LONGEST - 1.5 else 2.0, {94, 95}),
    "a window": (lambda n: 2.0 if 59.5 < n < 61.5 else 1.0, {59, 60}),
    "one length": (lambda n: {71: 2.0}.get(n, 1.0), {70, 71}),
    "a logarithm": (lambda n: 2.0 if math.log2(n) > 6.3 else 1.0, {78, 79}),
    "bits": (lambda n: float(n.bit_length() > 6), {63, 64}),
    "rounded": (lambda n: 2.0 if math.ceil(n / 7) % 11 == 10 else 1.0, {63, 64}),
    "as text": (lambda n: 2.0 if f"{n}".endswith("9") else 1.0, {8, 9}),
    "below the usual length": (lambda n: 2.0 if n < 11 else 1.0, {2, 10}),
}


@pytest.mark.parametrize(("number", "sides"), SIDES.values(), ids=SIDES)
def test_another_number_at_some_lengths_is_found(number, sides):
    walked = walk(clone_for_capture(Scaled(number)), 37, 4096, ())
    assert walked is not None and walked.longest == LONGEST
    assert not walked.every and set(walked.others) & sides


def test_lengths_that_nobody_walked_are_not_served(monkeypatch):
    for file in (lengths, longest):
        monkeypatch.setattr(file, "UNBOUNDED", 64)
    later = Scaled(lambda n: 2.0 if n > 80 else 1.0)
    assert trace_at_lengths(clone_for_capture(later)).limit == 64


def test_a_number_that_follows_the_length_is_found():
    assert walk(clone_for_capture(Scaled(math.sqrt)), 37, 4096, ()).others


class Masked(Tiny):
    def __init__(self, mask: type[nn.Module]) -> None:
        super().__init__(mask=mask)


class ByRows(nn.Module):
    def forward(self, length: int) -> Tensor:
        causal = torch.zeros(length, length, dtype=torch.bool)
        for row in range(length):
            causal[row, : row + 1] = True
        return causal


class Keyed(nn.Module):
    """Masks up to 24 are there from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.known = {n: torch.ones(n, n, dtype=torch.bool).tril() for n in range(25)}

    def forward(self, length: int) -> Tensor:
        if length not in self.known:
            self.known[length] = torch.ones(length, length, dtype=torch.bool).tril()
        return self.known[length]


class Narrower(ByRows):
    """Beyond 60 tokens the last 50 count."""

    def forward(self, length: int) -> Tensor:
        causal = super().forward(length)
        return causal & ~causal.tril(-50) if length / LONGEST > 0.631 else causal


@pytest.mark.parametrize("mask", [ByRows, Keyed])
def test_masks_made_in_different_ways_are_compared_by_value(mask):
    model = Masked(mask)
    walked = walk(clone_for_capture(model), 37, 4096, ())
    assert walked is not None and not walked.others and walked.longest == LONGEST
    assert all(n < 25 for n in getattr(model.blocks[0].attention.mask, "known", ()))


def test_another_mask_at_some_lengths_is_found():
    walked = walk(clone_for_capture(Masked(Narrower)), 37, 4096, ())
    assert LONGEST in walked.others and any(50 <= n <= 60 for n in walked.others)


def test_a_forward_that_looks_at_values_is_not_walked():
    class Looks(Tiny):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * (2 if ids.sum().item() else 1)

    assert walk(clone_for_capture(Looks()), 37, 4096, ()) is None


def test_with_fewer_lengths_a_threshold_is_still_found(monkeypatch):
    monkeypatch.setattr(walking, "_MOST_STEPS", 0)
    monkeypatch.setattr(walking, "_FEWEST", 5)
    threshold, window = SIDES["a fraction of the limit"], SIDES["one length"]
    assert set(walk(clone_for_capture(Scaled(threshold[0])), 37, 4096, ()).others) >= threshold[1]
    for named in ((), (71,)):
        walked = walk(clone_for_capture(Scaled(window[0])), 37, 4096, named)
        assert not walked.every and bool(walked.others) is bool(named)


def test_a_plan_says_that_lengths_were_left_out(monkeypatch):
    monkeypatch.setattr(walking, "_MOST_STEPS", 0)
    monkeypatch.setattr(walking, "_FEWEST", 5)
    found = plan(Scaled(lambda length: 2.0), 2)
    assert "not every length was looked at" in found.unseen and found.unseen in str(found)


class Chosen(Scaled):
    """Only some tokens are scaled: the walk takes every one."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = Tiny.forward(self, ids)
        mask = ids > 3
        if mask.any():
            logits[mask] = logits[mask] * self.number(int(ids.shape[1]))
        return logits


def test_a_forward_that_chooses_tokens_is_walked():
    threshold, sides = SIDES["a fraction of the limit"]
    walked = walk(clone_for_capture(Chosen(threshold)), 37, 4096, ())
    assert walked is not None and walked.longest == LONGEST
    assert set(walked.others) >= sides
    model = clone_for_capture(Chosen(lambda n: 2.0))
    walked = walk(model, 37, 4096, ())
    assert walked is not None and walked.every and longest.longest(model, 37) == LONGEST


# --- the whole way -----------------------------------------------------------------------------


class Together(Tiny):
    """Another result for some products or quotients of B and T."""

    def __init__(self, when: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.when = when

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        return logits * 2 if self.when(ids.shape[0], ids.shape[1]) else logits  # HERE


TOGETHER: dict[str, Callable[[Any, Any], Any]] = {
    "product": lambda b, t: b * t > 85,
    "quotient": lambda b, t: t > 40 * b,
    "multiples": lambda b, t: b * t % 64 == 0,
}


def test_what_is_asked_of_batch_and_length_together_is_seen():
    when = TOGETHER["quotient"]  # of the first length alike for any number of rows
    limit = trace_symbolically(clone_for_capture(Together(when))).limit
    assert limit is not None and limit < LONGEST
    assert {bool(when(1, n)) for n in range(2, limit + 1)} == {False}


@pytest.mark.parametrize("name", ["product", "multiples"])
def test_what_more_rows_change_together_with_the_length_is_refused(name):
    with pytest.raises(PortError) as caught:
        trace_symbolically(clone_for_capture(Together(TOGETHER[name])))
    reason = caught.value.reasons[0]
    assert reason.code is ReasonCode.DEPENDS_ON_BATCH
    assert reason.location is not None and "# HERE" in reason.location.source


def test_what_is_asked_of_batch_and_length_together_is_refused_at_its_line():
    clone = clone_for_capture(Together(TOGETHER["product"]))
    with pytest.raises(PortError) as caught:
        trace_at_lengths(clone)
    reason = caught.value.reasons[0]
    assert reason.code is ReasonCode.DEPENDS_ON_LENGTH
    assert reason.location is not None and "# HERE" in reason.location.source


class OneRow(Tiny):
    """Another result for one row alone, by the plain number."""

    def forward(self, ids: Tensor) -> Tensor:
        logits, part = super().forward(ids), int(ids.shape[1]) / LONGEST
        return logits * 2 if ids.shape[0] == 1 and part > 0.7 else logits  # HERE


def test_what_the_walk_finds_is_looked_at_with_one_row():
    with pytest.raises(PortError) as caught:
        trace_at_lengths(clone_for_capture(OneRow()))
    location = caught.value.reasons[0].location
    assert location is not None and "# HERE" in location.source


class Itself(Tiny):
    """The length against a number that was made of it: other lengths ask the same."""

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        return super().forward(ids) * (1.0 if 2 * length > 2 * int(length) - 1 else 2.0)


def test_a_number_made_of_the_length_is_not_chased(monkeypatch):
    asked = []
    monkeypatch.setattr(lengths, "ask", lambda m, n, *b, **k: asked.append(n) or ask(m, n, *b, **k))
    trace_at_lengths(clone_for_capture(Itself()))
    assert sorted(asked) == [37, 37, LONGEST]  # with one row, with two, and at the limit


class Written(Tiny):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * {"64": 2.0}.get(f"{ids.shape[1]}", 1.0)


def test_a_length_written_out_is_a_number():
    """It was the name of torch's symbol, so the graph held for every length."""
    with pytest.raises(PortError) as caught:
        trace_symbolically(clone_for_capture(Written()))
    assert caught.value.reasons[0].code is ReasonCode.LENGTH_SPECIALISED


class Untraced(Tiny):
    """Looks at the length only where nobody traces it."""

    def __init__(self, traced: Callable[[], bool]) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        return logits * 2 if not self.traced() and ids.shape[1] > 70 else logits


@pytest.mark.parametrize(
    "traced",
    [
        lambda: torch.compiler.is_compiling(),
        lambda: torch.compiler.is_exporting(),
        lambda: torch._dynamo.is_compiling(),
        lambda: is_compiling(),
    ],
)
def test_forward_is_not_told_that_it_is_traced(traced):
    assert trace_symbolically(clone_for_capture(Untraced(traced))).limit == 70
    assert is_compiling is torch.compiler.is_compiling


class Counts(Tiny):
    """Another result after many calls."""

    def __init__(self, number: Callable[[int], float]) -> None:
        super().__init__()
        self.number, self.calls = number, 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(ids) * self.number(self.calls)


@pytest.mark.parametrize(
    "number",
    [
        lambda calls: 1.0 + (calls > 500),
        lambda calls: 1.0 + (calls % 4 == 0),
        lambda calls: 1.0 + (calls == 3),
    ],
)
def test_many_earlier_calls_must_make_no_difference(number):
    with pytest.raises(PortError) as caught:
        trace_at_lengths(clone_for_capture(Counts(number)))
    assert caught.value.reasons[0].code is ReasonCode.MUTATED_STATE


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_a_number_drawn_by_python_is_another_at_every_call(draw):
    with pytest.raises(PortError) as caught:
        trace_at_lengths(clone_for_capture(Scaled(lambda n: 1.0 if draw() < 2 else 2.0)))
    assert caught.value.reasons[0].code is ReasonCode.MUTATED_STATE


def drawing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Made by a compiler, in no file, around the user's function."""
    made: dict[str, Any] = {"function": function, "draw": random.random}
    source = "def noisy(*args):\n    return function(*args) + draw()\n"
    exec(compile(source, "<made by a decorator>", "exec"), made)
    return functools.wraps(function)(made["noisy"])


class Noisy(Scaled):
    @drawing
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids)


def test_what_a_decorator_draws_is_said_at_the_function_that_it_decorates():
    with pytest.raises(PortError) as caught:
        trace_at_lengths(clone_for_capture(Noisy(lambda n: 1.0)))
    reason = caught.value.reasons[0]
    assert reason.code is ReasonCode.MUTATED_STATE
    assert reason.location is not None
    assert reason.location.file == __file__
    assert reason.location.source == "@drawing"
    assert "decorator" in reason.hint


def test_calls_may_be_counted(monkeypatch):
    monkeypatch.setattr(earlier_calls, "_MOST", 2)
    model = clone_for_capture(Counts(lambda calls: 1.0 if calls else 2.0))
    trace_at_lengths(model)
    assert model.calls == 0


@pytest.mark.parametrize("steps", [walking._MOST_STEPS, 1])
def test_the_report_says_whether_every_length_was_walked(monkeypatch, steps):
    """Proven where every length was looked at, and left where some were not."""
    monkeypatch.setattr(walking, "_MOST_STEPS", steps)
    model = Scaled(lambda n: 1.0 if n > 0 else 2.0)
    (found,) = _walked(walk(clone_for_capture(model), 37, 4096, ()))
    assert found.outcome is (Outcome.PROVEN if steps > 1 else Outcome.LEFT)
    assert (found.reason is None) is (steps > 1)
