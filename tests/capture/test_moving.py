"""Numbers that were made of the length, beside the length."""

from __future__ import annotations

import sympy

from fxport.capture.moving import with_length

T = sympy.Symbol("T", integer=True, positive=True)
STEPS = (1, 2)


def moved(question, hint: int = 37):
    """`question` of a run at a length, as the runs at 37, 38 and 39 tokens ask it."""
    runs = [[question(hint + step)] for step in (0, *STEPS)]
    return with_length(runs[0], runs[1:], STEPS, hint, T)


def test_a_number_that_moves_is_the_length():
    assert moved(lambda n: sympy.Gt(T, n + 5, evaluate=False)) == []  # T > T + 5: never
    assert moved(lambda n: sympy.Gt(T, 100 - n)) == [sympy.Gt(T, 100 - T)]
    assert moved(lambda n: sympy.Gt(T, 3 * n - 80)) == [sympy.Gt(T, 3 * T - 80)]


def test_a_number_that_stays_is_the_users():
    assert moved(lambda n: T > 64) == [T > 64]
    assert moved(lambda n: sympy.Gt(T, -(-n // 8) * 8)) == [T > 40]


def test_what_is_no_straight_line_is_left_as_it_was_asked():
    assert moved(lambda n: sympy.Gt(T, n * n)) is None
    assert moved(lambda n: T > 64 if n < 39 else T < 64) is None
    asked = [T > 37, T > 64]
    assert with_length(asked, [[T > 38], [T > 39]], STEPS, 37, T) is None
