"""What each dimension of a value is made of, tracked through views, permutations and repeats.

    q [B, T, 24] -> view [B, T, 4, 6] -> transpose [B, 4, T, 6] -> reshape [B*4, T, 6]
      (b)(t)(c)       (b)(t)(h)(d)         (b)(h)(t)(d)              (b h)(t)(d)      with c = (h d)

A dimension is a row-major product of axes; one of size 1 is the empty product. Identity of axes,
never equality of sizes, says which dimensions are the same: B == H == T confuses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import sympy

__all__ = [
    "Axis",
    "Dims",
    "Factor",
    "LayoutError",
    "Size",
    "align",
    "axes_of",
    "conform",
    "divides",
    "fresh_dims",
    "is_one",
    "own_dims",
    "product",
    "regroup",
    "resolve",
    "resolve_all",
]

Size: TypeAlias = int | sympy.Expr


class LayoutError(Exception):
    """A reshape cuts through an axis in a way that leaves no axes to speak of."""


class Axis:
    """One axis. It may turn out later to be a product of axes, or the same as another one."""

    __slots__ = ("_parts", "_same", "origin", "size")

    def __init__(self, size: Size, origin: object) -> None:
        self.size = size
        self.origin = origin  # which dimension of which value it was cut from
        self._parts: tuple[Axis, ...] = ()
        self._same: Axis | None = None

    def leaves(self) -> tuple[Axis, ...]:
        """The axes that this one is made of, as far as known."""
        if self._same is not None:
            return self._same.leaves()
        if self._parts:
            return tuple(leaf for part in self._parts for leaf in part.leaves())
        return (self,)

    def split(self, major: Size, minor: Size) -> None:
        self._parts = (Axis(major, self.origin), Axis(minor, self.origin))

    def identify(self, other: Axis) -> None:
        """Declares this leaf to be the leaf `other`."""
        if other is not self:
            self._same = other

    def __repr__(self) -> str:
        return f"Axis({self.size})"


class Factor(NamedTuple):
    """An axis as it occurs in one value; `repeated`: the value is the same all along it."""

    axis: Axis
    repeated: bool = False


Dim: TypeAlias = tuple[Factor, ...]
Dims: TypeAlias = tuple[Dim, ...]


def is_one(size: Size) -> bool:
    return size == 1


def fresh_dims(shape: Sequence[Size], origin: object) -> Dims:
    """Dimensions about which nothing is known but their sizes."""
    return tuple(
        () if is_one(size) else (Factor(Axis(size, (origin, index))),)
        for index, size in enumerate(shape)
    )


def resolve(dim: Dim) -> Dim:
    """The same dimension in the finest axes known."""
    return tuple(Factor(leaf, f.repeated) for f in dim for leaf in f.axis.leaves())


def resolve_all(dims: Dims) -> Dims:
    return tuple(resolve(dim) for dim in dims)


def axes_of(dims: Iterable[Dim], repeated: bool = True) -> list[Axis]:
    """All axes in order; without those that are only repeated along if `repeated` is False."""
    return [f.axis for dim in dims for f in resolve(dim) if repeated or not f.repeated]


def own_dims(result: Dims, of: Dims, others: Dims) -> Dims:
    """What a product's result has from one operand alone: axes of `of` that `others` lack."""
    wanted = set(axes_of(of)) - set(axes_of(others))
    own = (tuple(f for f in dim if f.axis in wanted) for dim in resolve_all(result))
    return tuple(dim for dim in own if dim)


def product(axes: Iterable[Axis]) -> Size:
    size: Any = 1
    for axis in axes:
        size = size * axis.size
    return size  # type: ignore[no-any-return]


def divides(size: Size, whole: Size) -> Size | None:
    """``whole / size`` when it is certainly a whole number."""
    if isinstance(size, int) and isinstance(whole, int):
        return whole // size if size and whole % size == 0 else None
    ratio: Any = whole / size
    if ratio.is_Integer:
        return int(ratio)
    found: Size | None = ratio if ratio.is_integer and ratio.is_positive else None
    return found


def regroup(dims: Dims, shape: Sequence[Size]) -> Dims:
    """The dimensions after a row-major reshape to `shape`; splits axes where it must.

    Raises:
        LayoutError: a new dimension boundary falls inside an axis that does not divide there.
    """
    pending = [f for dim in dims for f in resolve(dim)][::-1]
    grouped: list[Dim] = []
    for size in shape:
        dim: list[Factor] = []
        rest = size
        while not is_one(rest):
            if not pending:
                raise LayoutError
            factor = pending.pop()
            quotient = divides(factor.axis.size, rest)
            if quotient is not None:
                dim.append(factor)
                rest = quotient
                continue
            minor = divides(rest, factor.axis.size)
            if minor is None:
                raise LayoutError
            factor.axis.split(rest, minor)
            pending.extend(resolve((factor,))[::-1])
        grouped.append(tuple(dim))
    if pending:
        raise LayoutError
    return tuple(grouped)


def conform(wanted: Dim, given: Dim) -> None:
    """Declares the axes of `given` to be those of `wanted`, which are not split for it.

    Raises:
        LayoutError: they do not pair up.
    """
    wanted, given = resolve(wanted), resolve(given)
    parts: Dims = (given,)
    if len(wanted) != 1 or len(given) != 1:  # else sizes are equal, noticed or not
        parts = regroup(parts, [f.axis.size for f in wanted])
    for of_wanted, part in zip(wanted, parts, strict=True):
        if len(part) != 1:
            raise LayoutError
        part[0].axis.identify(of_wanted.axis)


def align(left: Dim, right: Dim) -> list[tuple[Factor, Factor]]:
    """Pairs two dimensions of equal size axis by axis, splitting the coarser, and identifies them.

    Raises:
        LayoutError: no common refinement exists.
    """
    a, b = list(resolve(left))[::-1], list(resolve(right))[::-1]
    pairs: list[tuple[Factor, Factor]] = []
    if len(a) == len(b) == 1:  # the sizes are equal even where the tracer has not noticed
        b[0].axis.identify(a[0].axis)
        return [(a[0], Factor(a[0].axis, b[0].repeated))]
    while a and b:
        x, y = a.pop(), b.pop()
        if x.axis.size == y.axis.size:
            y.axis.identify(x.axis)
            pairs.append((x, Factor(x.axis, y.repeated)))
            continue
        for big, small, stack, other in ((x, y, a, b), (y, x, b, a)):
            minor = divides(small.axis.size, big.axis.size)
            if minor is not None:
                big.axis.split(small.axis.size, minor)
                stack.extend(resolve((big,))[::-1])
                other.append(small)
                break
        else:
            raise LayoutError
    if a or b:
        raise LayoutError
    return pairs
