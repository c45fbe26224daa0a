"""Gives every axis of a matched attention its part: batch, head, group, query, key, head size.

    q [B, Hkv * G, Tq, D]   k [B, Hkv, Tk, D]   v [B, Hkv, Tk, Dv]   out [B, Hkv * G, Tq, Dv]

Which of the legal choices is made never changes the result, only how well it reads: an axis along
which neither k nor v varies may be a query axis or a head group alike.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from torch import fx

from fxport.errors import ReasonCode
from fxport.passes.attention.layout import (
    Axis,
    Dims,
    LayoutError,
    Size,
    align,
    axes_of,
    is_one,
    product,
    resolve,
)
from fxport.passes.attention.site import Left, Match
from fxport.passes.attention.trace import Step, trace

__all__ = ["Axes", "Frame", "Recipe", "frame_of", "query_axes", "recipe", "sink_steps"]

Axes = tuple[Axis, ...]
Target = tuple[Axes, Axes, Axes, Axes]


@dataclass(frozen=True)
class Frame:
    """The axes of ``fxport::attention``'s operands, each major to minor."""

    batch: Axes
    kv_heads: Axes
    groups: Axes
    query: Axes
    key: Axes
    head: Axes
    value: Axes

    @property
    def heads(self) -> Axes:
        return self.kv_heads + self.groups

    @property
    def q(self) -> Target:
        return self.batch, self.heads, self.query, self.head

    @property
    def k(self) -> Target:
        return self.batch, self.kv_heads, self.key, self.head

    @property
    def v(self) -> Target:
        return self.batch, self.kv_heads, self.key, self.value

    @property
    def out(self) -> Target:
        return self.batch, self.heads, self.query, self.value

    @property
    def scores(self) -> Target:
        return self.batch, self.heads, self.query, self.key


def frame_of(match: Match) -> Frame:
    """Assigns the axes.

    Raises:
        Left: this is no attention of queries over keys.
    """
    own = query_axes(match)
    scores = [f.axis for d in match.scores for f in resolve(d)]
    key = tuple(f.axis for f in resolve(match.key))
    head = tuple(axes_of(match.head))
    _check_plain(match, head, key)
    shared = [a for a in scores if a not in own]
    if not own:
        raise Left(
            ReasonCode.NOT_ATTENTION,
            "there is one query only, or keys or values differ for every query",
            match.start,
        )
    origins = {a.origin for a in head}
    sunk = _sink_axes(match)
    query = max(own, key=lambda a: _likeness_to_query(a, origins, sunk, product(key), own))
    is_head = _heads(shared, origins, sunk, not isinstance(query.size, int))
    return Frame(
        batch=tuple(a for a in shared if a not in is_head),
        kv_heads=tuple(a for a in shared if a in is_head),
        groups=tuple(a for a in own if a is not query),
        query=(query,),
        key=key,
        head=head,
        value=tuple(axes_of(match.value)),
    )


def query_axes(match: Match) -> list[Axis]:
    """The axes along which queries vary, and neither keys nor values."""
    q, k, v = (set(axes_of(o[-1].dims, repeated=False)) for o in (match.q, match.k, match.v))
    q = q.union(*(axes_of(term.q[-1].dims, repeated=False) for term in match.terms))
    return [a for a in axes_of(match.scores) if a in q and a not in k and a not in v]


def sink_steps(column: fx.Node, dims: Dims) -> tuple[Step, ...]:
    """How a column of sinks came about, in the axes of scores of dimensions `dims`.

    Raises:
        LayoutError: it does not meet them axis by axis.
    """
    steps = trace(column)
    for of_scores, of_column in zip(dims, steps[-1].dims, strict=True):
        if of_scores and of_column:
            align(of_scores, of_column)
    return steps


def _sink_axes(match: Match) -> set[Axis]:
    """The axes along which sinks vary: one number per head is all that an attention takes."""
    if not isinstance(match.sinks, tuple):
        return set()
    with contextlib.suppress(LayoutError, ValueError):
        return set(axes_of(sink_steps(*match.sinks)[-1].dims, repeated=False))
    return set()


def _likeness_to_query(
    axis: Axis, head_origins: set[object], sunk: set[Axis], keys: Size, own: list[Axis]
) -> tuple[bool, bool, bool, int]:
    return axis not in sunk, axis.origin not in head_origins, axis.size == keys, own.index(axis)


def _heads(shared: list[Axis], origins: set[object], sunk: set[Axis], alone: bool) -> set[Axis]:
    """Axes cut from the same feature dimension as the head size, else all static but the first.

    One `alone` is a head where the batch, like the queries, would have no fixed size: B is 1.
    """
    found = {a for a in shared if a.origin in origins or a in sunk}
    if not found and len(shared) == 1 and alone:
        return {a for a in shared if isinstance(a.size, int)}
    if found or len(shared) < 2:
        return found
    static = {a for a in shared if isinstance(a.size, int)}
    return static if 0 < len(static) < len(shared) else set(shared[1:])


def _check_plain(match: Match, head: Axes, key: Axes) -> None:
    """The contracted axes must be the operands' own, each once."""
    for steps, needed in ((match.q, head), (match.k, head + key), (match.v, key)):
        own = axes_of(steps[-1].dims, repeated=False)
        if any(own.count(axis) != 1 for axis in needed):
            raise Left(
                ReasonCode.UNSUPPORTED_FEATURE,
                "an operand is repeated along an axis that is summed over",
                steps[-1].node,
            )


@dataclass(frozen=True)
class Recipe:
    """How a tensor that broadcasts against scores becomes one that does against [B, Hq, Tq, Tk].

    Attributes:
        split: shape with one dimension per axis; None if it fits as it is.
        order: permutation after that.
        expand: shape to expand to before merging (equal to the permuted shape: nothing to do).
        merged: the four dimensions.
    """

    split: tuple[Size, ...] | None
    order: tuple[int, ...] = ()
    expand: tuple[Size, ...] = ()
    merged: tuple[Size, ...] = ()


def recipe(shape: tuple[Size, ...], dims: Dims, frame: Frame) -> Recipe:
    """The recipe for a tensor of `shape` that meets scores of dimensions `dims`."""
    padded = (1,) * (len(dims) - len(shape)) + shape
    axes = [tuple(f.axis for f in resolve(dim)) for dim in dims]
    if _fits(shape, axes, frame):
        return Recipe(None)
    split: list[Size] = []
    flat: list[Axis] = []
    for size, dim in zip(padded, axes, strict=True):
        flat.extend(dim)
        split.extend(1 if is_one(size) else axis.size for axis in dim)
    wanted = [axis for group in frame.scores for axis in group]
    if set(wanted) - set(flat) or set(flat) - set(wanted):
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "a mask has axes that the scores do not have")
    order = tuple(flat.index(axis) for axis in wanted)
    expand: list[Size] = []
    merged: list[Size] = []
    for group in frame.scores:
        sizes = [split[flat.index(axis)] for axis in group]
        full = [axis.size for axis in group]
        expand += full if any(not is_one(s) for s in sizes) else sizes
        merged.append(product(group) if any(not is_one(s) for s in sizes) else 1)
    return Recipe(tuple(split), order, tuple(expand), tuple(merged))


def _fits(shape: tuple[Size, ...], axes: list[Axes], frame: Frame) -> bool:
    if len(shape) > 4:
        return False
    count = len(shape)
    return count == 0 or list(frame.scores)[-count:] == axes[-count:]
