"""Exponentials divided by their sum: what is summed, and what else stands in the denominator.

e / sum(e)               (e * mask) / sum(e * mask)         e / (sum(e) + 1)
(e @ v) / sum(e)         exp(x - m) / (sum(exp(x - m)) + exp(-m))
e * sum(e).reciprocal()  e / sum(e).clamp(min=1e-9)         e = exp2(x * log2(e))
e / (sum(e) + exp(sink)) exp(x - m) / (sum(exp(x - m)) + exp(sink - m))        (e @ v) / (e @ 1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.layout import Dims, LayoutError, fresh_dims, resolve
from fxport.passes.attention.made import filled_with, is_zero, power_of
from fxport.passes.attention.products import as_product
from fxport.passes.attention.site import MaskKind
from fxport.passes.attention.views import (
    moved_input,
    number,
    overload_packet,
    unviewed,
    view_dims,
    viewed,
)

__all__ = [
    "Denominator",
    "Kept",
    "Sink",
    "argument_of",
    "denominator_of",
    "divides_rows",
    "division_of",
    "fills_of",
    "kept_by",
    "reduction_of",
]

aten = torch.ops.aten


@dataclass(frozen=True)
class Kept:
    """Exponentials set to 0 where a mask says so: their scores might as well be -inf.

    Attributes:
        node: the user's operation.
        before: the exponentials.
        kind: KEEP for a product with the mask, FILL for a choice.
    """

    node: fx.Node
    before: fx.Node
    kind: MaskKind
    mask: fx.Node
    inverted: bool


def kept_by(node: fx.Node, of: fx.Node | None = None) -> Kept | None:
    """``e * mask``, ``masked_fill(e, mask, 0)`` or ``where(mask, e, 0)``.

    Args:
        of: what e must be; without it, exponentials.
    """
    packet = overload_packet(node)
    for before, mask, value, inverted in fills_of(node):
        if is_zero(value):
            return _kept(node, of, before, MaskKind.FILL, mask, inverted)
    if packet is aten.mul:
        for before, mask in (node.args[:2], node.args[1::-1]):
            found = _kept(node, of, before, MaskKind.KEEP, mask, False)
            if found is not None:
                return found
    return None


def fills_of(node: fx.Node) -> tuple[tuple[Any, Any, Any, bool], ...]:
    """Readings of a fill, the usual first: what is kept, mask, fill, whether the mask keeps."""
    packet = overload_packet(node)
    if packet is aten.masked_fill:
        given = arguments(node)
        return ((given["self"], given["mask"], given["value"], False),)
    if packet is aten.where and len(node.args) == 3:
        mask, one, other = node.args
        return ((one, mask, other, True), (other, mask, one, False))
    return ()


def _kept(
    node: fx.Node, of: fx.Node | None, before: object, kind: MaskKind, mask: object, inverted: bool
) -> Kept | None:
    if not isinstance(before, fx.Node) or not isinstance(mask, fx.Node) or before is mask:
        return None
    fits = _is_positive(before) if of is None else before is of
    if not fits or shape_of(before) != shape_of(node):
        return None
    return Kept(node, before, kind, mask, inverted)


def _is_positive(node: fx.Node) -> bool:
    if overload_packet(node) in _SOFTMAXES or power_of(node) is not None:
        return True
    division = division_of(node)
    under = denominator_of(division[1]) if division is not None else None
    if division is None or under is None:
        return False
    return under.summed is division[0] and _is_positive(division[0])


_SOFTMAXES = {aten.softmax, aten._softmax, aten.special_softmax, aten._safe_softmax}


# -- the division ----------------------------------------------------------------------------------


def division_of(node: fx.Node) -> tuple[fx.Node, fx.Node, tuple[fx.Node, ...]] | None:
    """(a, b, the nodes in between) of ``a / b`` or ``a * (1 / b)``."""
    packet = overload_packet(node)
    if packet in (aten.div, aten.true_divide):
        top, bottom = node.args[:2]
        plain = arguments(node).get("rounding_mode") is None
        if plain and isinstance(top, fx.Node) and isinstance(bottom, fx.Node):
            return top, bottom, ()
    elif packet is aten.mul:
        for top, inverse in (node.args[:2], node.args[1::-1]):
            found = _inverted(inverse)
            if isinstance(top, fx.Node) and found is not None:
                return top, *found
    return None


def _inverted(inverse: object) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """(x, the nodes) of ``1 / x``, which becomes ``1 * reciprocal(x)``."""
    if not isinstance(inverse, fx.Node):
        return None
    packet = overload_packet(inverse)
    if packet is aten.mul and 1 in map(number, inverse.args):
        inner = next((a for a in inverse.args if isinstance(a, fx.Node)), None)
        found = _inverted(inner)
        return None if found is None else (found[0], (*found[1], inverse))
    power = packet is aten.pow and number(inverse.args[1]) == -1
    below = inverse.args[0] if packet is aten.reciprocal or power else None
    return (below, (inverse,)) if isinstance(below, fx.Node) else None


# -- the denominator -------------------------------------------------------------------------------


Sink: TypeAlias = float | tuple[fx.Node, Dims]


@dataclass(frozen=True)
class Denominator:
    """``sum(summed, dim)`` in some layout, plus ``exp(sink)`` or ``exp(sink - maximum)``.

    Attributes:
        nodes: what it consists of.
        of: dimensions of `summed`.
        dims: of the denominator, in the same axes.
        sink: a number, or a tensor with the dimensions of the sum that it is added to.
        maximum: what is subtracted from the sink.
        bound: it is made at least this.
    """

    summed: fx.Node
    dim: int
    nodes: tuple[fx.Node, ...]
    of: Dims
    dims: Dims
    sink: Sink | None = None
    maximum: fx.Node | None = None
    bound: float = 0.0

    @property
    def in_place(self) -> bool:
        """Whether it meets `summed` as if the dimension had been kept."""
        return _same(self.dims, (*self.of[: self.dim], (), *self.of[self.dim + 1 :]))


def denominator_of(node: fx.Node) -> Denominator | None:
    """What a quotient is divided by, if that is a sum."""
    nodes: tuple[fx.Node, ...] = (node,)
    bound = 0.0
    while overload_packet(node) in _BOUNDS | _SPREADS and isinstance(node.args[0], fx.Node):
        if overload_packet(node) in _BOUNDS:
            given = arguments(node)
            least = number(given["min"])
            if bound or least is None or least <= 0 or given.get("max") is not None:
                return None
            bound = least
        node = node.args[0]
        nodes = (node, *nodes)
    found = _sum_of(node)
    if found is None:
        return None
    return replace(found, nodes=(*found.nodes, *nodes), bound=bound)


_BOUNDS = {aten.clamp, aten.clamp_min}
_SPREADS = {aten.expand, aten.expand_as}


def _sum_of(node: fx.Node) -> Denominator | None:
    plain = reduction_of(node, aten.sum)
    if plain is not None:
        return plain
    before = moved_input(node)
    if before is not None:
        return _viewed(node, _sum_of(before))
    if overload_packet(node) is not aten.add or number(arguments(node).get("alpha", 1)) != 1:
        return None
    for total, other in (node.args[:2], node.args[1::-1]):
        found = reduction_of(total, aten.sum) if isinstance(total, fx.Node) else None
        if found is None:
            continue
        added = filled_with(other) if isinstance(other, fx.Node) else number(other)
        if added is not None and 0 < added < math.inf:
            return replace(found, nodes=(*found.nodes, node), sink=math.log(added))
        placed = _exponential_beside(other, found.dims) if isinstance(other, fx.Node) else None
        if placed is not None:
            sink, maximum, nodes = placed
            return replace(found, nodes=(*found.nodes, *nodes, node), sink=sink, maximum=maximum)
    return None


def _viewed(view: fx.Node, found: Denominator | None) -> Denominator | None:
    try:
        dims = view_dims(view, found.dims) if found is not None else ()
    except LayoutError:
        return None
    return None if found is None else replace(found, dims=dims, nodes=(*found.nodes, view))


def _exponential_beside(
    other: fx.Node, dims: Dims
) -> tuple[Sink, fx.Node | None, tuple[fx.Node, ...]] | None:
    """(sink, m, nodes) of an exponential that is added to a sum of dimensions `dims`.

    ``exp(sink).view(1, -1, 1, 1)`` is that of a sink whose own dimension is the sum's second.
    """
    power, views = unviewed(other)
    exponent = argument_of(power, aten.exp)
    if exponent is None:
        return None
    if not views:
        sink, maximum, nodes = _sink_in(exponent, dims)
        return sink, maximum, (*nodes, other)
    own = fresh_dims(shape_of(exponent), exponent)
    try:
        seen = viewed(views, own)
    except LayoutError:
        return None
    missing = len(dims) - len(seen)
    if missing < 0 or any(sum(resolve(d) == resolve(s) for s in seen) != 1 for d in own if d):
        return None
    meets = [resolve(s) for s in seen]
    sink_dims = tuple(dims[missing + meets.index(resolve(d))] if d else () for d in own)
    return (exponent, sink_dims), None, (power, *views)


def _sink_in(exponent: fx.Node, dims: Dims) -> tuple[Sink, fx.Node | None, tuple[fx.Node, ...]]:
    """(sink, m, nodes) of ``-m``, ``sink - m`` and ``sink``."""
    maximum = argument_of(exponent, aten.neg)
    if maximum is not None:
        return 0.0, maximum, (exponent,)
    if overload_packet(exponent) is aten.sub and arguments(exponent).get("alpha", 1) == 1:
        sink, maximum = exponent.args[:2]  # type: ignore[assignment]
        if isinstance(sink, fx.Node) and isinstance(maximum, fx.Node):
            return (sink, dims), maximum, (exponent,)
    return (exponent, dims), None, ()


def argument_of(node: object, packet: object) -> fx.Node | None:
    if not isinstance(node, fx.Node) or overload_packet(node) is not packet:
        return None
    found = node.args[0]
    return found if isinstance(found, fx.Node) else None


def reduction_of(node: fx.Node, packet: object) -> Denominator | None:
    """A reduction over one dimension, in whatever layout."""
    total, views = unviewed(node)
    by_ones = packet is aten.sum and as_product(total) is not None
    if overload_packet(total) is not packet and not by_ones and not _is_norm(total, packet):
        return None
    reduced = (_by_ones(total) if by_ones else None) or _by_call(total)
    if reduced is None:
        return None
    summed, dim, of, rest = reduced
    try:
        return Denominator(summed, dim, (total, *views), of, viewed(views, rest))
    except LayoutError:
        return None


_Reduced: TypeAlias = tuple[fx.Node, int, Dims, Dims]  # what, along, its dimensions, the result's


def _by_call(total: fx.Node) -> _Reduced | None:
    given = arguments(total)
    dims = given.get("dim")
    summed, dtype = given["self"], given.get("dtype")
    if not isinstance(dims, list | tuple) or len(dims) != 1:
        return None
    if dtype is not None and dtype != summed.meta["val"].dtype:
        return None
    of = fresh_dims(shape_of(summed), summed)
    dim = dims[0] % len(of)
    rest = (*of[:dim], *([()] if given.get("keepdim") else []), *of[dim + 1 :])
    return summed, dim, of, rest


def _by_ones(total: fx.Node) -> _Reduced | None:
    """The product with a column of ones."""
    product = as_product(total)
    if product is None or product.added is not None or product.alpha != 1:
        return None
    ways = ((product.left, product.right), (product.right, product.left))
    for (summed, ones), own in zip(ways, product.labels[:2], strict=True):
        result = product.labels[2]
        gone = [label for label in own if label not in result]
        if filled_with(ones) != 1 or len(gone) != 1:
            continue
        of = fresh_dims(shape_of(summed), summed)
        by_label = dict(zip(own, of, strict=True))
        sizes = dict(zip(own, shape_of(summed), strict=True))
        if any(s != sizes.get(r, 1) for r, s in zip(result, shape_of(total), strict=True)):
            continue
        return summed, own.index(gone[0]), of, tuple(by_label.get(r, ()) for r in result)
    return None


_NORMS = {aten.norm: "p", aten.linalg_vector_norm: "ord"}


def _is_norm(node: fx.Node, packet: object) -> bool:
    """The sum of positive numbers, written as a norm."""
    name = _NORMS.get(overload_packet(node)) if packet is aten.sum else None
    return name is not None and arguments(node)[name] == 1 and _is_positive(node.args[0])  # type: ignore[arg-type]


def divides_rows(top: fx.Node, under: Denominator) -> bool:
    """Whether `top` is a product of the exponentials in whose rows the sum stands as it is."""
    product = as_product(top)
    if product is None or under.summed not in (product.left, product.right):
        return False
    own = product.labels[0 if product.left is under.summed else 1]
    result = product.labels[2]
    if len(own) != len(under.of) or own[under.dim] in result:
        return False
    if any(label not in result for i, label in enumerate(own) if i != under.dim):
        return False
    by_label = dict(zip(own, under.of, strict=True))
    return _same(under.dims, tuple(by_label.get(label, ()) for label in result))


def _same(divisor: Dims, wanted: Dims) -> bool:
    """Whether a divisor broadcasts to these dimensions."""
    missing = len(wanted) - len(divisor)
    padded: Dims = ((),) * missing + divisor
    return missing >= 0 and all(
        resolve(a) == resolve(b) for a, b in zip(padded, wanted, strict=True)
    )
