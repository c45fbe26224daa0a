"""Comparisons at every size, against all entries of small tensors."""

from __future__ import annotations

import itertools
import operator

import pytest
import sympy
from hypothesis import given, settings, strategies

from fxport.passes.size_bounds import decided

T, B = sympy.symbols("T B", integer=True, positive=True)
COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)


def values(offset: sympy.Expr, slopes: list[int], shape: list[sympy.Expr], t: int, b: int):
    sizes = [int(sympy.sympify(size).subs({T: t, B: b})) for size in shape]
    start = int(offset.subs({T: t, B: b}))
    for index in itertools.product(*map(range, sizes)):
        yield start + sum(slope * i for slope, i in zip(slopes, index, strict=True))


@settings(max_examples=120, deadline=None)
@given(
    constant=strategies.integers(-4, 4),
    times=strategies.integers(-2, 2),
    slopes=strategies.lists(strategies.integers(-2, 2), min_size=2, max_size=2),
    shape=strategies.sampled_from([[T, T], [T, 3], [B, T], [1, T]]),
    compare=strategies.sampled_from(COMPARISONS),
)
def test_what_is_said_is_so(constant, times, slopes, shape, compare) -> None:
    offset = constant + times * T
    said = decided(compare, offset, slopes, shape)
    if said is None:
        return
    for t, b in itertools.product(range(1, 7), range(1, 4)):
        assert {compare(v, 0) for v in values(offset, slopes, shape, t, b)} == {said}


@pytest.mark.parametrize("said", [True, False])
def test_a_window_as_long_as_the_sequence(said: bool) -> None:
    """Distances reach from 1 - T to T - 1."""
    inside, outside = (operator.lt, operator.ge) if said else (operator.ge, operator.lt)
    assert decided(inside, -T, [1, -1], [T, T]) is said
    assert decided(outside, -T, [1, -1], [T, T]) is not said
    assert decided(inside, 1 - T, [1, -1], [T, T]) is None


def test_a_size_that_no_entry_vouches_for() -> None:
    """It may be 0."""
    assert decided(operator.lt, -B, [0], [T]) is None
    assert decided(operator.lt, -B, [0, 0], [T, B]) is True
