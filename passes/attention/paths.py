"""Ways from a product of Q and K to the softmax, and what becomes of its dimensions there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.errors import ReasonCode
from fxport.passes.attention.layout import Axis, Dim, Dims, Factor, LayoutError, is_one
from fxport.passes.attention.products import as_product
from fxport.passes.attention.site import Left, Torn
from fxport.passes.attention.views import is_cast, moved_input, overload_packet, view_dims

__all__ = ["PADS", "Walk", "obstacles", "paths", "product_behind", "walk"]

aten = torch.ops.aten

_MAX_OBSTACLES = 3  # in a row

PADS = {aten.pad, aten.constant_pad_nd}
_BINARY = {aten.mul, aten.div, aten.true_divide, aten.add, aten.sub, aten.maximum}
_UNARY = {
    aten.tanh, aten.clamp, aten.clamp_min, aten.masked_fill, aten.neg, aten.nan_to_num
}  # fmt: skip
_PARTS = {aten.diagonal, aten.select, aten.slice, aten.narrow}
_ELEMENTWISE = _BINARY | _UNARY | {aten.where, aten.max}


def paths(end: fx.Node) -> Iterator[list[fx.Node]]:
    """Ways from a product of two tensors to `end`, product first, through known operations."""
    if as_product(end) is not None:
        yield [end]
        return
    for candidate in _carriers(end):
        for path in paths(candidate):
            yield [*path, end]


def _carriers(node: fx.Node) -> list[fx.Node]:
    """Inputs that may carry the scores."""
    packet = overload_packet(node)
    if packet is aten.cat:
        given: list[Any] = list(arguments(node)["tensors"])
    elif packet in PADS:
        given = [node.args[0]]
    elif packet is aten.where:
        given = list(node.args[1:])
    elif packet in _BINARY or node.target is aten.max.other:
        given = list(node.args[:2])
    elif packet in _UNARY:
        given = [node.args[0]]
    else:
        moved = moved_input(node)
        given = [] if moved is None or (_converts(node) and not is_cast(node)) else [moved]
    return [g for g in given if _is_score_like(g)]


def obstacles(end: fx.Node) -> Iterator[fx.Node]:
    """Where the ways back from `end` through known operations come to an end, without a product."""
    carriers = _carriers(end)
    if not carriers:
        yield end
    for carrier in carriers:
        yield from obstacles(carrier)


def product_behind(obstacle: fx.Node, depth: int = _MAX_OBSTACLES) -> Iterator[fx.Node]:
    """The products that would be found if this operation, which keeps the shape, were known.

    And others behind it, if there are; and the product that this operation takes a part of.
    """
    whole = _whole(obstacle)
    if as_product(whole) is not None:
        yield whole
    for given in obstacle.all_input_nodes:
        if _is_score_like(given) and shape_of(given) == shape_of(obstacle):
            found = [path[0] for path in paths(given)]
            yield from found
            if not found and depth > 1:
                for other in obstacles(given):
                    yield from product_behind(other, depth - 1)


def _whole(part: fx.Node) -> fx.Node:
    while overload_packet(part) in _PARTS:
        part = part.all_input_nodes[0]
    return part


def _converts(node: fx.Node) -> bool:
    return overload_packet(node) in (aten.to, aten._to_copy, aten.type_as)


def _is_score_like(value: object) -> bool:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return False
    tensor = value.meta["val"]
    return bool(tensor.is_floating_point() and tensor.dim() >= 2)


@dataclass(frozen=True)
class Walk:
    """Dimensions along a path, product first.

    Attributes:
        nodes: the path.
        dims: of each node's value; after an elementwise operation broadcast to its result.
        sink_axis: the key axis with the sink's column on it, once sinks were concatenated.
        sink_first: whether the sink is column 0 rather than the last.
        key_without_sink: the key axis before that.
    """

    nodes: tuple[fx.Node, ...]
    dims: tuple[Dims, ...]
    sink_axis: Axis | None = None
    sink_first: bool = False
    key_without_sink: Dim = ()


def walk(path: list[fx.Node], dims: Dims) -> Walk:
    """Follows the dimensions of a product's result along a path.

    Raises:
        Left: they cannot be followed.
    """
    found = [_broadcast(dims, path[0])]
    sink: tuple[Axis, bool, Dim] | None = None
    for before, node in itertools.pairwise(path):
        try:
            if overload_packet(node) is aten.cat or overload_packet(node) in PADS:
                if sink is not None:
                    raise Left(ReasonCode.UNSUPPORTED_FEATURE, "two sinks", node)
                sink, after = _with_sink(node, before, found[-1])
                found.append(after)
            elif overload_packet(node) in _ELEMENTWISE:
                found.append(_broadcast(found[-1], node))
            else:
                found.append(view_dims(node, found[-1]))
        except LayoutError:
            raise Torn("the scores are reshaped in a way that mixes their axes", node) from None
    return Walk(tuple(path), tuple(found), *(sink or ()))


def _with_sink(node: fx.Node, carrier: fx.Node, dims: Dims) -> tuple[tuple[Axis, bool, Dim], Dims]:
    if overload_packet(node) in PADS:
        return _with_padding(node, dims)
    given = arguments(node)
    tensors, along = list(given["tensors"]), given["dim"] % len(dims)
    other = [t for t in tensors if t is not carrier]
    columns = [shape_of(t)[along] for t in other if len(shape_of(t)) == len(dims)]
    if len(tensors) != 2 or len(columns) != 1 or not is_one(columns[0]):
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the scores are concatenated here", node)
    axis = Axis(shape_of(node)[along], (node, along))
    after = (*dims[:along], (Factor(axis),), *dims[along + 1 :])
    return (axis, tensors[0] is not carrier, dims[along]), after


def _with_padding(node: fx.Node, dims: Dims) -> tuple[tuple[Axis, bool, Dim], Dims]:
    given = arguments(node)
    amounts = list(given["pad"])
    if given.get("mode", "constant") != "constant" or amounts not in ([0, 1], [1, 0]):
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the scores are padded here", node)
    axis = Axis(shape_of(node)[-1], (node, len(dims) - 1))
    return (axis, amounts == [1, 0], dims[-1]), (*dims[:-1], (Factor(axis),))


def _broadcast(dims: Dims, node: fx.Node) -> Dims:
    """The dimensions after an elementwise operation, whose other operand may be larger."""
    shape = shape_of(node)
    padded: Dims = ((),) * (len(shape) - len(dims)) + dims
    return tuple(
        dim if dim or is_one(size) else (Factor(Axis(size, (node, i)), True),)
        for i, (dim, size) in enumerate(zip(padded, shape, strict=True))
    )
