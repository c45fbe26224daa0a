"""What a comparison of whole numbers says alike in every entry, at every size.

    i - j <  T          always: both count from 0 to T - 1
    i - j >= T + 1      never
    i - j <  T - 1      not in the last row

That is how a window is written where a layer has none. A size is 1 or more: where it is 0, there is
no entry to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy

__all__ = ["decided"]


def decided(
    compare: Callable[[int, int], bool],
    offset: sympy.Expr,
    slopes: Sequence[int],
    shape: Sequence[int | sympy.Expr],
) -> bool | None:
    """Whether ``compare(offset + sum(slope_k * index_k), 0)`` holds; None if that depends.

    Args:
        compare: one of `operator`'s six comparisons.
        offset: a number, or made of sizes.
        slopes: one for each dimension.
        shape: the sizes of the dimensions.
    """
    sizes = [sympy.sympify(size) for size in shape]
    if not offset.free_symbols <= set().union(*(size.free_symbols for size in sizes)):
        return None  # a size that no entry vouches for
    ends = [slope * (size - 1) for slope, size in zip(slopes, sizes, strict=True)]
    low = offset + sum(end for slope, end in zip(slopes, ends, strict=True) if slope < 0)
    high = offset + sum(end for slope, end in zip(slopes, ends, strict=True) if slope > 0)
    possible = [sign for sign in (-1, 0, 1) if not _excluded(sign, low, high)]
    answers = {compare(sign, 0) for sign in possible}
    return answers.pop() if len(answers) == 1 else None


def _excluded(sign: int, low: sympy.Expr, high: sympy.Expr) -> bool:
    """Whether nothing between the two has this sign."""
    above = sign <= 0 and _never_negative(low - sign - 1)
    return above or (sign >= 0 and _never_negative(sign - 1 - high))


def _never_negative(number: sympy.Expr) -> bool:
    """For sizes of 1 and more."""
    more = {s: 1 + sympy.Dummy(integer=True, nonnegative=True) for s in number.free_symbols}
    return sympy.expand(number.subs(more)).is_nonnegative is True
