"""The operations that only move, repeat or cast values, as functions on dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.layout import (
    Axis,
    Dim,
    Dims,
    Factor,
    LayoutError,
    is_one,
    regroup,
)

__all__ = [
    "CASTS",
    "DIVISIONS",
    "SCALES",
    "is_cast",
    "is_pointwise",
    "laid_out",
    "moved_input",
    "number",
    "overload_packet",
    "unviewed",
    "view_dims",
    "viewed",
]

aten = torch.ops.aten


def overload_packet(node: object) -> Any:
    """``aten.add`` for a node that calls ``aten.add.Tensor``; None for anything else."""
    if isinstance(node, fx.Node) and isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket
    return None


# Pointwise too, whatever the tags of their overloads say: ``where(c, x, 0.0)`` has none.
_UNTAGGED = {aten.where, aten.masked_fill}


def is_pointwise(node: fx.Node) -> bool:
    """Whether every entry of the result is made of the operands' entries there."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target.overloadpacket in _UNTAGGED


_RESHAPES = {
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze,
    aten.unsqueeze, aten.view_as, aten.reshape_as, aten.ravel,
}  # fmt: skip
_SAME = {aten.contiguous, aten.clone, aten.alias, aten.lift_fresh_copy, aten.lift_fresh}
CASTS = {aten.to, aten._to_copy, aten.type_as}
DIVISIONS = {aten.div, aten.true_divide}
SCALES = {aten.mul, *DIVISIONS}
_TRANSPOSES = {aten.transpose, aten.swapaxes, aten.swapdims}
_REVERSALS = {aten.t, aten.mT, aten.adjoint, aten.numpy_T}
_EXPANDS = {aten.expand, aten.expand_as, aten.broadcast_to}


def is_cast(node: fx.Node) -> bool:
    """Whether the node is a conversion between floating dtypes on one device."""
    if overload_packet(node) not in CASTS:
        return False
    before, after = _input(node).meta["val"], node.meta["val"]
    return (
        before.is_floating_point() and after.is_floating_point() and before.device == after.device
    )


def _drops_nothing(node: fx.Node) -> bool:
    """Dropout that returns its input: outside of training, or of nothing."""
    if overload_packet(node) is not aten.dropout:
        return False
    given = arguments(node)
    return not given["train"] or given["p"] == 0


def _input(node: fx.Node) -> fx.Node:
    found = node.args[0]
    assert isinstance(found, fx.Node)
    return found


def moved_input(node: fx.Node) -> fx.Node | None:
    """The value that a layout operation moves, or None when the node is no layout operation."""
    packet = overload_packet(node)
    known = packet in _RULES or packet in _RESHAPES or packet in _SAME or is_cast(node)
    known = known or _drops_nothing(node)
    if not known or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    return node.args[0]


def laid_out(node: fx.Node) -> fx.Node | None:
    """What a node has in another layout, in the same precision."""
    before = moved_input(node)
    same = before is not None and before.meta["val"].dtype == node.meta["val"].dtype
    return before if same else None


def view_dims(node: fx.Node, dims: Dims) -> Dims:
    """Dimensions of a layout operation's result.

    Args:
        node: `moved_input` of it is not None.
        dims: the dimensions of its input.

    Raises:
        LayoutError: the result cannot be told from the input's axes.
    """
    packet = overload_packet(node)
    if packet in _RESHAPES:
        return regroup(dims, shape_of(node))
    if packet in _SAME or packet in CASTS or _drops_nothing(node):
        return dims
    return _RULES[packet](node, dims)


def unviewed(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """What a value is in another layout of, and the operations that lay it out, first to last."""
    views: list[fx.Node] = []
    while (before := moved_input(node)) is not None:
        views.insert(0, node)
        node = before
    return node, tuple(views)


def viewed(views: Iterable[fx.Node], dims: Dims) -> Dims:
    """Dimensions after layout operations.

    Raises:
        LayoutError: as of `view_dims`.
    """
    for view in views:
        dims = view_dims(view, dims)
    return dims


def _transpose(node: fx.Node, dims: Dims) -> Dims:
    given = list(arguments(node).values())
    first, second = int(given[1]) % len(dims), int(given[2]) % len(dims)
    moved = list(dims)
    moved[first], moved[second] = dims[second], dims[first]
    return tuple(moved)


def _reverse(node: fx.Node, dims: Dims) -> Dims:
    if overload_packet(node) in (aten.t, aten.numpy_T):
        return dims[::-1]
    return (*dims[:-2], dims[-1], dims[-2])


def _permute(node: fx.Node, dims: Dims) -> Dims:
    order: Sequence[int] = arguments(node)["dims"]
    return tuple(dims[i] for i in order)


def _movedim(node: fx.Node, dims: Dims) -> Dims:
    given = arguments(node)
    source, target = _list(given["source"]), _list(given["destination"])
    rank = len(dims)
    moving = {t % rank: dims[s % rank] for s, t in zip(source, target, strict=True)}
    rest = iter([d for i, d in enumerate(dims) if i not in {s % rank for s in source}])
    return tuple(moving[i] if i in moving else next(rest) for i in range(rank))


def _list(value: int | Sequence[int]) -> Sequence[int]:
    return [value] if isinstance(value, int) else value


def _expand(node: fx.Node, dims: Dims) -> Dims:
    shape = shape_of(node)
    padded: Dims = ((),) * (len(shape) - len(dims)) + dims
    return tuple(
        dim if dim or is_one(size) else _repetition(size, node, index)
        for index, (dim, size) in enumerate(zip(padded, shape, strict=True))
    )


def _repetition(size: Any, node: fx.Node, index: int) -> Dim:
    return (Factor(Axis(size, (node, index)), True),)


def _repeat_interleave(node: fx.Node, dims: Dims) -> Dims:
    given = arguments(node)
    if not isinstance(given.get("repeats"), int) or given["dim"] is None:
        raise LayoutError
    along = given["dim"] % len(dims)
    copies = _repetition(given["repeats"], node, along) if given["repeats"] != 1 else ()
    return (*dims[:along], (*dims[along], *copies), *dims[along + 1 :])


def _repeat(node: fx.Node, dims: Dims) -> Dims:
    repeats = list(arguments(node)["repeats" if overload_packet(node) is aten.repeat else "dims"])
    rank = max(len(repeats), len(dims))
    repeats = [1] * (rank - len(repeats)) + repeats
    padded: Dims = ((),) * (rank - len(dims)) + dims
    if not all(isinstance(r, int) for r in repeats):
        return _expand_like(node, padded)
    return tuple(
        dim if r == 1 else (*_repetition(r, node, i), *dim)
        for i, (dim, r) in enumerate(zip(padded, repeats, strict=True))
    )


def _expand_like(node: fx.Node, dims: Dims) -> Dims:
    """A repeat by a symbolic count: told apart only where the input has size 1."""
    shape = shape_of(node)
    before = shape_of(_input(node))
    before = (1,) * (len(shape) - len(before)) + before
    if any(not is_one(b) and b != s for b, s in zip(before, shape, strict=True)):
        raise LayoutError
    return tuple(
        dim if dim or is_one(size) else _repetition(size, node, i)
        for i, (dim, size) in enumerate(zip(dims, shape, strict=True))
    )


def _slice(node: fx.Node, dims: Dims) -> Dims:
    """Only ``x[:]``: a slice with step 1 that keeps the length keeps everything."""
    if arguments(node)["step"] != 1 or shape_of(node) != shape_of(_input(node)):
        raise LayoutError
    return dims


def _select(node: fx.Node, dims: Dims) -> Dims:
    along = arguments(node)["dim"] % len(dims)
    if dims[along]:
        raise LayoutError
    return (*dims[:along], *dims[along + 1 :])


_RULES: dict[Any, Callable[[fx.Node, Dims], Dims]] = {
    **dict.fromkeys(_TRANSPOSES, _transpose),
    **dict.fromkeys(_REVERSALS, _reverse),
    **dict.fromkeys(_EXPANDS, _expand),
    aten.permute: _permute,
    aten.movedim: _movedim,
    aten.moveaxis: _movedim,
    aten.repeat_interleave: _repeat_interleave,
    aten.repeat: _repeat,
    aten.tile: _repeat,
    aten.slice: _slice,
    aten.select: _select,
}


def number(value: object) -> float | None:
    """A Python number, no bool."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return None
