"""Questions that compare the length with a number which was made of the length itself.

    n = int(T)                       hint 37:  4736 // T == 128    x.view(128 * n // T)
    y.view(T, 128 * n // T)          hint 38:  4864 // T == 128
                                     hint 39:  4992 // T == 128
    After:  128 * T // T == 128                one answer for every length

A run at one length answers questions about the length by that number. Once forward has taken it
as a plain number, T stands beside a number that only this run has: at no length does forward ask
``4736 // T``, and the lengths on both sides of its answers say nothing. What the number is made
of is seen at neighbouring lengths, where the same questions name others.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

__all__ = ["with_length"]


class _Differ(Exception):
    """The runs did not ask the same, or a number is no straight line in the length."""


def with_length(
    questions: Sequence[sympy.Rel],
    others: Sequence[Sequence[sympy.Rel]],
    steps: Sequence[int],
    hint: int,
    length: sympy.Symbol,
) -> list[sympy.Rel] | None:
    """The questions, with ``a T + b`` in place of numbers that are that in every run.

    Args:
        questions: what forward asked at the length `hint`.
        others: what it asked at ``hint + step``, for each of `steps`.

    Returns:
        None where the runs did not ask the same, one question after the other.
    """
    if any(len(other) != len(questions) for other in others):
        return None
    columns = zip(questions, *others, strict=True)
    try:
        moved = [_common(column, (0, *steps), hint, length) for column in columns]
    except _Differ:
        return None
    return [q for q in moved if isinstance(q, sympy.Rel)]  # the others have one answer


def _common(
    column: Sequence[sympy.Basic], steps: Sequence[int], hint: int, length: sympy.Symbol
) -> sympy.Basic:
    first = column[0]
    if all(other == first for other in column):
        return first
    if all(isinstance(other, sympy.Integer) for other in column):
        numbers = [int(other) for other in column]
        slope, rest = divmod(numbers[1] - numbers[0], steps[1])
        line = [numbers[0] + slope * step for step in steps]
        if rest or line != numbers:
            raise _Differ
        return slope * (length - hint) + numbers[0]
    if (
        any(o.func != first.func or len(o.args) != len(first.args) for o in column)
        or not first.args
    ):
        raise _Differ
    parts = zip(*(other.args for other in column), strict=True)
    return first.func(*(_common(part, steps, hint, length) for part in parts))
