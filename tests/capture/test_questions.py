"""What forward asks about the length, however it asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch.utils._sympy.functions import FloorToInt, IntTrueDiv, Max, Mod, ToFloat

from fxport.capture.clone import clone_for_capture
from fxport.capture.lengths import trace_at_lengths
from fxport.capture.longest import continues
from fxport.capture.questions import answer, ask, first_change, numbers_in
from fxport.capture.symbolic import trace_symbolically
from fxport.errors import PortError, ReasonCode
from tests.zoo.called import Tiny

T = sympy.Symbol("T", integer=True, positive=True)


class Sometimes(Tiny):
    """Another result at some lengths."""

    def __init__(self, when: Callable[[Any], bool], factor: float = 2.0) -> None:
        super().__init__()
        self.when, self.factor = when, factor

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        return logits * self.factor if self.when(ids.shape[1]) else logits


# What torch's bounds on T do not say.
ODD = {
    "multiples": lambda length: length % 24 == 0,
    "a fraction": lambda length: length > 0.7 * 90,
}


@pytest.mark.parametrize("when", ODD.values(), ids=ODD)
def test_another_result_at_some_lengths_is_refused(when):
    with pytest.raises(PortError) as caught:
        trace_at_lengths(clone_for_capture(Sometimes(when)))
    assert caught.value.reasons[0].code is ReasonCode.DEPENDS_ON_LENGTH


@pytest.mark.parametrize(("when", "limit"), list(zip(ODD.values(), (23, 62), strict=True)), ids=ODD)
def test_a_symbolic_graph_holds_up_to_the_first_other_answer(when, limit):
    clone = clone_for_capture(Sometimes(when))
    assert trace_symbolically(clone).limit == limit
    assert continues(clone, limit)  # so the way at several lengths has to show it


@pytest.mark.parametrize(
    ("question", "last"),
    [
        (T <= 96, 96),
        (ToFloat(T) <= 140.5, 140),
        (sympy.Ne(Mod(T, 64), 0), 63),
        (sympy.Ne(Mod(T, 2048), 0), 2047),
        (sympy.Max(T, 3000) < 3001, 3000),
        (sympy.Gt(T, 1), None),
        (T**2 >= T, None),
    ],
)
def test_the_last_length_with_the_same_answer_is_found(question, last):
    assert first_change([question], T, 2, None) == last


def test_what_follows_a_failure_half_way_is_not_taken_as_seen():
    class Fails(torch.nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return ids * {37: 1}[ids.shape[1]]

    assert ask(Fails(), 37).counted


def test_numbers_in_classes_of_a_function_are_found():
    class Inner(torch.nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            count = int(ids.shape[1])
            return ids * (count > 1234 or count in {2345, 3456})

    assert {1234, 2345, 3456} <= set(numbers_in(Inner(), 4096))


def test_the_larger_of_a_whole_quotient_and_a_number() -> None:
    """``max(T // 16, 1) > 2``, where torch rounds with sympy's own numbers."""
    question = Max(1, FloorToInt(IntTrueDiv(T, 16))) > 2
    assert [bool(answer(question, T, n)) for n in (3, 47, 48, 90)] == [False, False, True, True]
