"""How an operand came about: what it is a layout, a repetition or a multiple of.

repeat_interleave(k, 2, 1)             k, with heads repeated
repeat_interleave(k, 2, 1).sigmoid()   a value of its own, the same for two heads each
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import fx
from torch._ops import OpOverload

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.memory import is_written_through
from fxport.passes.attention.layout import (
    Axis,
    Dim,
    Dims,
    Factor,
    LayoutError,
    align,
    fresh_dims,
    resolve_all,
)
from fxport.passes.attention.views import CASTS, moved_input, number, overload_packet, view_dims

__all__ = ["Step", "as_it_is", "trace"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Step:
    """A node on the way from a producer to an operand.

    Attributes:
        node: the value.
        dims: its dimensions, in the axes of the producer.
        factor: the operand is ``factor`` times this value.
    """

    node: fx.Node
    dims: Dims
    factor: float = 1.0


def trace(operand: fx.Node) -> tuple[Step, ...]:
    """The layout operations, upcasts and number factors that lead to `operand`, producer first."""
    nodes = [operand]
    while (before := _moved_or_scaled(nodes[-1])) is not None:
        nodes.append(before)
    nodes.reverse()
    start = 0
    while True:
        found, failed = _follow(nodes[start:])
        if failed is None:
            return _with_factors(found)
        start += failed  # this reshape tears axes apart: its result is a new beginning


def as_it_is(operand: fx.Node) -> tuple[Step, ...]:
    """The operand alone, without a look at how it came about."""
    return (Step(operand, fresh_dims(shape_of(operand), operand)),)


def _follow(nodes: list[fx.Node]) -> tuple[list[tuple[fx.Node, Dims]], int | None]:
    dims = _first_dims(nodes[0])
    found = [(nodes[0], dims)]
    for index, node in enumerate(nodes[1:], 1):
        if _number_factor(node) is None:
            try:
                dims = view_dims(node, dims)
            except LayoutError:
                return found, index
        found.append((node, dims))
    return found, None


def _with_factors(found: list[tuple[fx.Node, Dims]]) -> tuple[Step, ...]:
    steps: list[Step] = []
    factor = 1.0
    for node, dims in reversed(found):
        steps.append(Step(node, dims, factor))
        factor *= _number_factor(node) or 1.0
    return tuple(reversed(steps))


def _moved_or_scaled(node: fx.Node) -> fx.Node | None:
    if _number_factor(node) is not None:
        found = node.args[0]
        return found if isinstance(found, fx.Node) else None
    before = moved_input(node)
    if before is None or not isinstance(before.meta.get("val"), torch.Tensor):
        return None
    if overload_packet(node) in CASTS and not _widens(before, node):
        return None
    return before


def _widens(before: fx.Node, after: fx.Node) -> bool:
    a, b = before.meta["val"].dtype, after.meta["val"].dtype
    return bool(a == b or (torch.promote_types(a, b) == b and a.itemsize < b.itemsize))


def _number_factor(node: fx.Node) -> float | None:
    """c for ``x * c`` and ``x / c`` with a Python number c (never 0), on floating x."""
    packet = overload_packet(node)
    if packet not in (aten.mul, aten.div, aten.true_divide) or len(node.args) != 2 or node.kwargs:
        return None
    x, factor = node.args[0], number(node.args[1])
    if not isinstance(x, fx.Node) or not factor or not isinstance(x.meta.get("val"), torch.Tensor):
        return None
    if x.meta["val"].dtype != node.meta["val"].dtype:
        return None
    return factor if packet is aten.mul else 1.0 / factor


# -- repetitions before a computation --------------------------------------------------------------


def _first_dims(node: fx.Node) -> Dims:
    """Axes of a value's own, which is the same all along some of them if all it is made of is."""
    shown = resolve_all(_shown(node, _MAX_DEPTH))
    if not any(f.repeated for dim in shown for f in dim):
        return fresh_dims(shape_of(node), node)
    return tuple(
        tuple(Factor(Axis(f.axis.size, (node, index)), f.repeated) for f in dim)
        for index, dim in enumerate(shown)
    )


def _shown(node: fx.Node, depth: int) -> Dims:
    fresh = fresh_dims(shape_of(node), node)
    if not depth or any(map(is_written_through, node.users)):
        return fresh
    before = moved_input(node)
    with contextlib.suppress(LayoutError):
        if before is not None:
            return view_dims(node, _shown(before, depth))
    with contextlib.suppress(LayoutError):  # a part of it counts as computed
        return _computed(node, fresh, depth - 1)
    return fresh


def _computed(node: fx.Node, fresh: Dims, depth: int) -> Dims:
    packet = overload_packet(node)
    if packet is None:
        return fresh
    if _is_pointwise(node):
        return _together(node, depth)
    given = arguments(node)
    if packet is aten.select:
        dims = _shown(given["self"], depth)
        along = given["dim"] % len(dims)
        return (*dims[:along], *dims[along + 1 :])
    if packet is aten.slice:
        dims = _shown(given["self"], depth)
        along = given["dim"] % len(dims)
        return (*dims[:along], fresh[along], *dims[along + 1 :])
    along_all = given.get("dim")
    if packet in _REDUCTIONS and isinstance(along_all, list | tuple) and along_all:
        dims = _shown(given["self"], depth)
        gone = {d % len(dims) for d in along_all}
        kept: Dims = ((),) if given.get("keepdim") else ()
        return tuple(d for i, dim in enumerate(dims) for d in (kept if i in gone else (dim,)))
    return fresh


def _together(node: fx.Node, depth: int) -> Dims:
    """Dimensions of a result each of whose entries is made of one entry of every input."""
    rank = len(shape_of(node))
    dims: list[Dim] = [()] * rank
    for value in node.all_input_nodes:
        if not isinstance(value.meta.get("val"), torch.Tensor):
            continue
        own = _shown(value, depth)
        for index, dim in enumerate(own, rank - len(own)):
            if dims[index] and dim:
                pairs = align(dims[index], dim)
                dims[index] = tuple(Factor(a.axis, a.repeated and b.repeated) for a, b in pairs)
            else:
                dims[index] = dims[index] or dim
    return tuple(dims)


def _is_pointwise(node: fx.Node) -> bool:
    tags = node.target.tags if isinstance(node.target, OpOverload) else ()
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


_MAX_DEPTH = 4  # computations, layout aside
_REDUCTIONS = {aten.norm, aten.linalg_vector_norm, aten.sum, aten.mean, aten.amax}
