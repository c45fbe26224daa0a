"""Exponentials divided by their sum: what is summed, and what else stands in the denominator.

e / sum(e)               (e * mask) / sum(e * mask)         e / (sum(e) + 1)
(e @ v) / sum(e)         exp(x - m) / (sum(exp(x - m)) + exp(-m))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.memory import Memory
from fxport.passes.attention_products import as_product
from fxport.passes.attention_site import MaskKind
from fxport.passes.attention_views import number, overload_packet

__all__ = [
    "Denominator",
    "Kept",
    "denominator_of",
    "divides_rows",
    "filled_with",
    "kept_by",
    "kept_reduction",
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


def kept_by(node: fx.Node) -> Kept | None:
    """``e * mask``, ``masked_fill(e, mask, 0)`` or ``where(mask, e, 0)``; the caller knows e."""
    packet = overload_packet(node)
    if packet is aten.masked_fill:
        given = arguments(node)
        if number(given["value"]) == 0 and isinstance(given["mask"], fx.Node):
            return _kept(node, node.args[0], MaskKind.FILL, given["mask"], False)
    elif packet is aten.where and len(node.args) == 3:
        if _is_zero(node.args[2]):
            return _kept(node, node.args[1], MaskKind.FILL, node.args[0], True)
        if _is_zero(node.args[1]):
            return _kept(node, node.args[2], MaskKind.FILL, node.args[0], False)
    elif packet is aten.mul:
        for before, mask in (node.args[:2], node.args[1::-1]):
            if isinstance(before, fx.Node) and overload_packet(before) in _POSITIVE:
                return _kept(node, before, MaskKind.KEEP, mask, False)
    return None


def _kept(
    node: fx.Node, before: object, kind: MaskKind, mask: object, inverted: bool
) -> Kept | None:
    if not isinstance(before, fx.Node) or not isinstance(mask, fx.Node) or before is mask:
        return None
    if overload_packet(before) not in _POSITIVE or shape_of(before) != shape_of(node):
        return None
    return Kept(node, before, kind, mask, inverted)


def _is_zero(value: object) -> bool:
    if not isinstance(value, fx.Node):
        return number(value) == 0
    return filled_with(value) == 0


def filled_with(node: fx.Node) -> float | None:
    """The number that every entry of a freshly made tensor is, if nothing is written into it."""
    if Memory(node.graph).written_by(node):
        return None
    while overload_packet(node) in _VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    packet = overload_packet(node)
    if packet in _ZEROS:
        return 0.0
    if packet in _ONES:
        return 1.0
    if packet in _FULL:
        return number(arguments(node)["fill_value"])
    if packet is aten.mul:  # -9e15 * ones_like(scores)
        of, factor = node.args[0], number(node.args[1])
        each = filled_with(of) if isinstance(of, fx.Node) else None
        return None if each is None or factor is None else each * factor
    return number(arguments(node)["s"]) if packet is aten.scalar_tensor else None


_POSITIVE = {
    aten.exp, aten.softmax, aten._softmax, aten.special_softmax, aten._safe_softmax
}  # fmt: skip
_VIEWS = {aten.expand, aten.view, aten.reshape, aten.unsqueeze, aten.to}
_ZEROS = {aten.zeros, aten.new_zeros, aten.zeros_like}
_ONES = {aten.ones, aten.new_ones, aten.ones_like}
_FULL = {aten.full, aten.new_full, aten.full_like}


# -- the denominator -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Denominator:
    """``sum(summed, dim)``, its dimension kept, plus a number or ``exp(-maximum)``.

    Attributes:
        nodes: what it consists of.
        sink: log of the number.
        maximum: set if what is added is ``exp(-maximum)``.
    """

    summed: fx.Node
    dim: int
    nodes: tuple[fx.Node, ...]
    sink: float | None = None
    maximum: fx.Node | None = None


def denominator_of(node: fx.Node) -> Denominator | None:
    """What a quotient is divided by, if that is a sum."""
    plain = kept_reduction(node, aten.sum)
    if plain is not None or overload_packet(node) is not aten.add:
        return plain
    if number(arguments(node).get("alpha", 1)) != 1:
        return None
    for total, other in (node.args[:2], node.args[1::-1]):
        found = kept_reduction(total, aten.sum) if isinstance(total, fx.Node) else None
        if found is None:
            continue
        added = filled_with(other) if isinstance(other, fx.Node) else number(other)
        if added is not None and 0 < added < math.inf:
            nodes = (*found.nodes, node)
            return Denominator(found.summed, found.dim, nodes, sink=math.log(added))
        negative = _argument(other, aten.exp)
        maximum = None if negative is None else _argument(negative, aten.neg)
        if maximum is not None and isinstance(other, fx.Node) and negative is not None:
            nodes = (*found.nodes, negative, other, node)
            return Denominator(found.summed, found.dim, nodes, maximum=maximum)
    return None


def _argument(node: object, packet: object) -> fx.Node | None:
    if not isinstance(node, fx.Node) or overload_packet(node) is not packet:
        return None
    found = node.args[0]
    return found if isinstance(found, fx.Node) else None


def kept_reduction(node: fx.Node, packet: object) -> Denominator | None:
    """A reduction over one dimension that is kept, or given back by unsqueeze."""
    total = node
    if overload_packet(node) is aten.unsqueeze:
        total = arguments(node)["self"]
    if overload_packet(total) is not packet:
        return None
    given = arguments(total)
    dims = given.get("dim")
    if dims is None or len(dims) != 1 or given.get("dtype") is not None:
        return None
    rank = given["self"].meta["val"].dim()
    dim = dims[0] % rank
    if total is node:
        return Denominator(given["self"], dim, (node,)) if given.get("keepdim") else None
    if given.get("keepdim") or arguments(node)["dim"] % rank != dim:
        return None
    return Denominator(given["self"], dim, (total, node))


def divides_rows(top: fx.Node, exponential: fx.Node, dim: int) -> bool:
    """Whether `top` is a product of the exponentials in whose rows the sum stands as it is."""
    product = as_product(top)
    if product is None or exponential not in (product.left, product.right):
        return False
    own = product.labels[0 if product.left is exponential else 1]
    result = product.labels[2]
    return (
        dim == len(own) - 1
        and len(result) == len(own)
        and result[:-1] == own[:-1]
        and own[-1] not in result
    )
