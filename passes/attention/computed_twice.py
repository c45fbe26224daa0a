"""A value computed at two places: ``exp(x) / exp(x).sum()`` has its exponentials twice."""

from __future__ import annotations

from itertools import zip_longest

import torch
from torch import fx

from fxport.capture.memory import Memory
from fxport.passes.attention.products import as_product
from fxport.passes.graph_facts import computes

__all__ = ["computed_again"]


def computed_again(node: fx.Node, first: fx.Node) -> tuple[fx.Node, ...] | None:
    """The nodes by which `node` computes what `first` is, up to what both are made of.

    Products are not followed: scores computed twice stay two.

    Returns:
        None if the two may differ. Nothing may be written into the nodes afterwards; that
        nothing is into what both are made of is seen to here.
    """
    own: dict[fx.Node, fx.Node] = {}
    shared: dict[fx.Node, None] = {}
    pending = [(node, first)]
    while pending:
        one, other = pending.pop()
        if one is other:
            shared[one] = None
        elif one not in own:
            operands = _operands(one, other)
            if operands is None:
                return None
            own[one] = other
            pending += operands
        elif own[one] is not other:
            return None
    memory = Memory(node.graph)
    return None if any(map(memory.written_by, shared)) else tuple(own)


def _operands(one: fx.Node, other: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
    """Pairs of operands that must be alike for two nodes to be."""
    alike = one.op == other.op == "call_function" and one.target is other.target
    if not alike or not computes(one) or as_product(one) is not None:
        return None
    if _dtype(one) != _dtype(other):  # autocast asks where a node stands
        return None
    given: list[tuple[object, object]] = []
    _flatten((one.args, one.kwargs), (other.args, other.kwargs), given)
    found = []
    for a, b in given:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            found.append((a, b))
        elif type(a) is not type(b) or a != b:
            return None
    return found


def _flatten(one: object, other: object, into: list[tuple[object, object]]) -> None:
    if isinstance(one, dict) and isinstance(other, dict):
        one, other = sorted(one.items()), sorted(other.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        for a, b in zip_longest(one, other, fillvalue=_NOTHING):
            _flatten(a, b, into)
    else:
        into.append((one, other))


_NOTHING = object()


def _dtype(node: fx.Node) -> object:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None
