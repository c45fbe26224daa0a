"""What the dimensions of a value are made of: batch, token, or features.

A dimension is a product of factors, major to minor: ``()`` has size 1, ``(96,)`` is a feature
dimension, ``(BATCH, TOKEN)`` is a batch folded over its tokens.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from fxport.errors import ReasonCode

__all__ = ["Axes", "Axis", "Dim", "Factor", "Refusal", "Symbols", "has_axis", "join", "reshape"]


class Axis(enum.Enum):
    BATCH = "batch"
    TOKEN = "token"


Factor = Axis | int
Dim = tuple[Factor, ...]
Axes = tuple[Dim, ...]


class Refusal(Exception):
    """A rule cannot prove its op token-local."""

    def __init__(self, code: ReasonCode, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


@dataclass(frozen=True)
class Symbols:
    """The symbols of the captured shapes."""

    batch: sympy.Symbol
    length: sympy.Symbol

    def factor(self, size: int | sympy.Expr) -> Dim:
        """The dimension that a size alone means, for values made from sizes (zeros, expand)."""
        if size == 1:
            return ()
        if isinstance(size, int):
            return (size,)
        if size == self.batch:
            return (Axis.BATCH,)
        if size == self.length:
            return (Axis.TOKEN,)
        if size == self.batch * self.length:
            return (Axis.BATCH, Axis.TOKEN)
        raise Refusal(
            ReasonCode.DEPENDS_ON_LENGTH, f"a dimension of size {self.describe(size)} is made here"
        )

    def describe(self, size: int | sympy.Expr) -> str:
        names = {self.batch: sympy.Symbol("B"), self.length: sympy.Symbol("T")}
        return str(sympy.sympify(size).subs(names))


def has_axis(dim: Dim) -> bool:
    """Whether a dimension holds anything but features."""
    return any(isinstance(f, Axis) for f in dim)


def join(*operands: Axes) -> Axes:
    """Broadcast, aligned at the right: equal dimensions meet, size 1 yields.

    Raises:
        Refusal: when a token axis meets another axis, or would appear twice.
    """
    rank = max(len(o) for o in operands)
    joined: list[Dim] = []
    for position in range(rank):
        found: Dim = ()
        for operand in operands:
            index = position - rank + len(operand)
            dim = operand[index] if index >= 0 else ()
            if not dim or _same(dim, found):
                continue
            if found:
                raise Refusal(
                    ReasonCode.MIXES_TOKENS, f"{name(dim)} is combined with {name(found)} here"
                )
            found = dim
        joined.append(found)
    return checked(tuple(joined))


def _same(a: Dim, b: Dim) -> bool:
    if a == b:
        return True
    sizes = [math.prod(d) for d in (a, b) if not has_axis(d)]  # type: ignore[arg-type]
    return len(sizes) == 2 and sizes[0] == sizes[1]


def checked(axes: Axes) -> Axes:
    """Refuses values that hold the token axis (or the batch axis) twice."""
    for axis in Axis:
        if sum(factor is axis for dim in axes for factor in dim) > 1:
            raise Refusal(
                ReasonCode.MIXES_TOKENS,
                f"a value with two {axis.value} dimensions is made outside attention",
            )
    return axes


def name(dim: Dim) -> str:
    """A dimension in words."""
    words = [f.value if isinstance(f, Axis) else str(f) for f in dim]
    return f"the ({' x '.join(words)}) axis" if words else "an axis of size 1"


def reshape(axes: Axes, sizes: Sequence[int | sympy.Expr], symbols: Symbols) -> Axes:
    """Regroups factors in row-major order into dimensions of the given sizes.

    Raises:
        Refusal: when an output dimension would cut through the batch or token axis.
    """
    pending: list[Factor] = [f for dim in axes for f in dim]
    regrouped: list[Dim] = []
    for size in sizes:
        constant, batch, token = _powers(size, symbols)
        dim: list[Factor] = []
        while constant != 1 or batch or token:
            factor = pending.pop(0) if pending else None
            if factor is Axis.BATCH and batch:
                batch = False
            elif factor is Axis.TOKEN and token:
                token = False
            elif isinstance(factor, int) and (shared := math.gcd(factor, constant)) > 1:
                if factor != shared:
                    pending.insert(0, factor // shared)
                factor, constant = shared, constant // shared
            else:
                raise Refusal(
                    ReasonCode.MIXES_TOKENS,
                    f"a reshape to {symbols.describe(size)} cuts through the batch or token axis",
                    "keep the token axis whole",
                )
            dim.append(factor)
        regrouped.append(_merged(dim))
    if any(f != 1 for f in pending):
        raise Refusal(ReasonCode.MIXES_TOKENS, "this reshape does not keep its axes whole")
    return checked(tuple(regrouped))


def _merged(dim: list[Factor]) -> Dim:
    merged: list[Factor] = []
    for factor in dim:
        if merged and isinstance(factor, int) and isinstance(merged[-1], int):
            merged[-1] *= factor
        else:
            merged.append(factor)
    return tuple(merged)


def _powers(size: int | sympy.Expr, symbols: Symbols) -> tuple[int, bool, bool]:
    """``size == constant * B**batch * T**token``."""
    if isinstance(size, int):
        return size, False, False
    for batch in (False, True):
        for token in (False, True):
            divisor = (symbols.batch if batch else 1) * (symbols.length if token else 1)
            ratio = sympy.simplify(size / divisor)
            if ratio.is_Integer and ratio > 0:
                return int(ratio), batch, token
    raise Refusal(
        ReasonCode.DEPENDS_ON_LENGTH,
        f"a dimension of size {symbols.describe(size)} is made here",
    )
