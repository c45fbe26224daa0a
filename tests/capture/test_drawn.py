"""A check that draws what it looks at is nothing; what is drawn for the result is refused."""

from __future__ import annotations

import dis
import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxport.api import port
from fxport.capture.clone import clone_for_capture
from fxport.capture.lengths import trace_at_lengths
from fxport.capture.only_checks import only_checks, questions_among
from fxport.capture.reachable import Reachable
from fxport.errors import PortError, ReasonCode
from tests.zoo.called import Tiny

draw = random.getrandbits
choose = random.choice
seen: list[int] = []


def function(*values: Any) -> Any:
    return values


# --- one function --------------------------------------------------------------------------------


def an_item(*values: Any) -> Any:
    number = draw(32)
    if values and not isinstance(values[number % len(values)], Tensor):
        raise TypeError(f"{number}: {seen.append(number)}")
    return function(*values)


def in_one_test(*values: Any, other: Any = None, **named: Any) -> Any:
    number = draw(32)
    if not (
        not len(values)
        or isinstance(values[number % len(values)], Tensor)
        or (other is not None and values[number % 2] is not (kept := values[-1]) and kept)
    ):
        error = TypeError(number)
        raise error
    result = function(*values, **named)
    if not isinstance(result[number % len(result)], Tensor):
        raise TypeError
    return result


def asked_on_both_sides(*values: Any) -> Any:
    size = len(values)
    size = values[0] > 1 if draw(1) else values[0] < -1
    if size:
        raise ValueError
    return function(*values)


def afterwards_another(*values: Any) -> Any:
    number = draw(32)
    if number == 7:
        raise ValueError
    number = len(values)
    for value in values:
        function(value)
    return function(number)


def not_used(*values: Any) -> Any:
    draw(32)
    return function(*values)


@pytest.mark.parametrize(
    "check", [an_item, in_one_test, asked_on_both_sides, afterwards_another, not_used]
)
def test_it_only_checks(check):
    assert of_draws(check)


def returned(*values: Any) -> Any:
    return draw(1)


def given_on(*values: Any) -> Any:
    return function(draw(1))


def by_name(*values: Any) -> Any:
    number = draw(1)
    return function(*values, number=number)


def made_of_it(*values: Any) -> Any:
    first = values[draw(32) % len(values)]
    return function(first)


def decides_the_result(*values: Any) -> Any:
    if draw(1):
        return function(*values)
    return values


def decides_a_value(*values: Any) -> Any:
    scale = 1
    if draw(1):
        scale = 2
    return function(scale)


def chosen(*values: Any) -> Any:
    return function(1 if draw(1) else 2)


def decides_what_else_runs(*values: Any) -> Any:
    if draw(1):
        function(0)
    return values


def decides_how_often(*values: Any) -> Any:
    for _ in values[: draw(2)]:
        function(0)
    return values


def until_it_is_drawn(*values: Any) -> Any:
    while draw(1):
        function(0)
    return values


def remembered(*values: Any) -> Any:
    seen[0] = draw(1)
    return values


def caught(*values: Any) -> Any:
    try:
        if draw(1):
            raise ValueError
    except ValueError:
        return None
    return values


def of_another_len(*values: Any) -> Any:
    return len(draw(1))  # a function of the file's own


def yielded(*values: Any) -> Any:
    if draw(1):
        raise ValueError
    yield values


def seen_by_another(*values: Any) -> Any:
    number = draw(1)
    return function(lambda: number)


def changed(*values: Any) -> Any:
    values = function(*values)
    values += draw(1)
    return 0


def drawn_again(*values: Any) -> Any:
    if draw(1):
        choose(values)
    return values


@pytest.mark.parametrize(
    "check",
    [
        returned,
        given_on,
        by_name,
        made_of_it,
        decides_the_result,
        decides_a_value,
        chosen,
        decides_what_else_runs,
        decides_how_often,
        until_it_is_drawn,
        remembered,
        caught,
        yielded,
        seen_by_another,
        changed,
        drawn_again,
    ],
)
def test_it_does_more_than_check(check):
    assert not of_draws(check)


def test_a_function_of_that_name_asks_nothing():
    assert "len" in questions_among(globals())
    assert not only_checks(
        of_another_len.__code__, calls_of(of_another_len, "draw"), questions_among({"len": 0})
    )


def of_draws(check: Callable[..., Any]) -> bool:
    return only_checks(check.__code__, calls_of(check, "draw"), questions_among(globals()))


def calls_of(check: Callable[..., Any], name: str) -> frozenset[int]:
    """Offsets of the first call after each mention of a global."""
    found, mentioned = set(), False
    for step in dis.get_instructions(check.__code__):
        mentioned |= step.opname == "LOAD_GLOBAL" and step.argval == name
        if mentioned and step.opname == "CALL":
            found.add(step.offset)
            mentioned = False
    return frozenset(found)


# --- around a forward ----------------------------------------------------------------------------


def made(source: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator as a compiler of checks makes one: in no file, around the user's function."""

    def decorator(wrapped: Callable[..., Any]) -> Callable[..., Any]:
        known: dict[str, Any] = {"function": wrapped, "random": random, "Tensor": Tensor}
        exec(compile(source, "<made by a decorator>", "exec"), known)
        return functools.wraps(wrapped)(known["check"])

    return decorator


CHECKING = """
def check(self, *args, **kwargs):
    number = draw(32)
    if not isinstance(args[number % len(args)], Tensor):
        raise TypeError(number)
    return function(self, *args, **kwargs)
""".replace("draw", "random.getrandbits")
SHOWING = CHECKING.replace("return function(self", "return number / 2**40 + function(self")


def checked(source: str) -> Tiny:
    torch.manual_seed(0)
    model = Tiny()

    class Block(type(model.blocks[0])):  # type: ignore[misc]
        forward = made(source)(type(model.blocks[0]).forward)

    class Model(Tiny):
        forward = made(source)(Tiny.forward)

    model.blocks[0].__class__, model.__class__ = Block, Model
    return model


@pytest.mark.parametrize("draws", ["randrange(100)", "randint(0, 9)"])
def test_what_is_checked_may_be_drawn_in_other_ways(draws):
    trace_at_lengths(clone_for_capture(checked(CHECKING.replace("getrandbits(32)", draws))))


def test_a_checked_model_is_served():
    model = checked(CHECKING)
    ids = torch.randint(0, 40, (2, 11))
    torch.testing.assert_close(port(model).module(ids), Tiny.forward(model, ids))


@pytest.mark.parametrize(
    "source",
    [
        SHOWING,
        # in place
        CHECKING.replace("number = random.getrandbits(32)", "number = 0; random.shuffle([1, 2])"),
        # in a function that does not say how it came by it
        CHECKING.replace("random.getrandbits", "(lambda _: random.getrandbits(3))"),
    ],
)
def test_a_model_that_shows_what_is_drawn_is_refused(source):
    with pytest.raises(PortError) as caught:
        trace_at_lengths(clone_for_capture(checked(source)))
    assert caught.value.reasons[0].code is ReasonCode.MUTATED_STATE


class Tries(Tiny):
    """Goes on where a check has found something."""

    def forward(self, ids: Tensor) -> Tensor:
        try:
            return self.tried(ids)
        except TypeError:
            return self.logits(ids) * 2

    tried = made(CHECKING)(Tiny.forward)


class PassesOn(Tries):
    def forward(self, ids: Tensor) -> Tensor:
        try:
            with torch.autocast("cpu", enabled=False):
                return self.tried(ids)
        except TypeError as error:
            raise ValueError from error
        finally:
            torch.is_grad_enabled()


def test_what_a_check_raises_may_not_be_caught():
    with pytest.raises(PortError) as caught:
        trace_at_lengths(clone_for_capture(Tries()))
    assert caught.value.reasons[0].code is ReasonCode.MUTATED_STATE
    trace_at_lengths(clone_for_capture(PassesOn()))


class Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows * random.random()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class OneOf:
    def __index__(self) -> int:
        return random.getrandbits(1)


@pytest.mark.parametrize("call", [Halves.apply, lambda rows: rows + rows[..., OneOf(), None]])
def test_what_is_drawn_in_a_call_of_torch_is_seen(call):
    class Inside(Tiny):
        def forward(self, ids: Tensor) -> Tensor:
            return call(super().forward(ids))

    with pytest.raises(PortError) as caught:
        trace_at_lengths(clone_for_capture(Inside()))
    assert caught.value.reasons[0].code is ReasonCode.MUTATED_STATE


# --- generators of the model's own ---------------------------------------------------------------

OF_THE_FILE = random.Random(5)


class Private(Tiny):
    """Skips nothing in eval mode, or something once in ten thousand calls."""

    def __init__(self, generator: Any, always: bool) -> None:
        super().__init__()
        self.generator, self.always = generator, always

    def forward(self, ids: Tensor) -> Tensor:
        if (self.training or self.always) and self.generator.random() > 0.9999:
            return self.logits(ids) * 2
        return self.logits(ids)


class OfTheFile(Tiny):
    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(ids) * (2 if OF_THE_FILE.random() > 0.9999 else 1)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Private(random.Random(3), always=True),
        lambda: Private(np.random.default_rng(3), always=True),
        lambda: Private(np.random.RandomState(3), always=True),
        OfTheFile,
    ],
)
def test_what_a_private_generator_draws_is_refused(model):
    with pytest.raises(PortError, match="draws random numbers from") as caught:
        port(model())
    (reason,) = caught.value.reasons
    assert reason.code is ReasonCode.MUTATED_STATE and reason.location is not None
    assert ".random()" in reason.location.source


def test_a_generator_is_put_back():
    model = Private(random.Random(3), always=True)
    places, expected = Reachable(model), random.Random(3).random()
    model.generator.random()
    places.restore()
    assert model.generator.random() == expected


def test_what_is_drawn_in_training_alone_does_not_matter():
    torch.manual_seed(0)
    model, ids = Private(random.Random(3), always=False), torch.randint(0, 40, (2, 11))
    torch.testing.assert_close(port(model).module(ids), model.eval()(ids))
