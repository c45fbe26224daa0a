"""A column of ones beside the values, which sums the weights.

Before                                     After
    o = e @ cat([v, ones], -1)                 o = e @ v
    o[..., :-1] / o[..., -1:]                  o / (e @ ones)

Where no attention comes of it, everything is put back as it was.
"""

from __future__ import annotations

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.layout import is_one
from fxport.passes.attention.made import filled_with, power_of
from fxport.passes.attention.paths import PADS
from fxport.passes.attention.products import Product, as_product
from fxport.passes.attention.quotient import kept_by
from fxport.passes.attention.respelled import Respelled
from fxport.passes.attention.views import number, overload_packet
from fxport.passes.graph_facts import GraphFacts, Source

__all__ = ["sums_apart"]

aten = torch.ops.aten


def sums_apart(gm: fx.GraphModule, facts: GraphFacts) -> list[Respelled]:
    """Changes the graph in place."""
    found = []
    for node in list(gm.graph.nodes):
        product = as_product(node)
        if product is None or product.added is not None or product.alpha != 1:
            continue
        for weights, values, own, other in (
            (product.left, product.right, *product.labels[:2]),
            (product.right, product.left, *product.labels[1::-1]),
        ):
            if power_of(weights) is None and kept_by(weights) is None:
                continue
            done = _apart(gm, facts, product, (weights, values), (own, other))
            if done is not None:
                found.append(done)
    return found


def _apart(
    gm: fx.GraphModule,
    facts: GraphFacts,
    product: Product,
    operands: tuple[fx.Node, fx.Node],
    labels: tuple[tuple[str, ...], tuple[str, ...]],
) -> Respelled | None:
    (weights, values), (own, other) = operands, labels
    packet, node = overload_packet(values), product.node
    if packet is not aten.cat and packet not in PADS:
        return None
    given, rank = arguments(values), len(other)
    dim = given["dim"] % rank if packet is aten.cat else rank - 1
    label, result = other[dim], product.labels[2]
    free = label not in own and label in result and len(shape_of(values)) == rank
    users = {u: _piece(u, result.index(label)) for u in node.users} if free else {}
    written = any(Source.MUTATED in facts.source(n) for n in (node, values))
    if set(users.values()) != {"values", "ones"} or written:
        return None
    emitter = Emitter(gm, node, [])
    parts = _parts(emitter, values, dim)
    if parts is None:
        return None
    products = {
        name: emitter.call(
            node.target,  # type: ignore[arg-type]
            *(part if n is values else n for n in node.args),
            **node.kwargs,
        )
        for name, part in zip(("values", "ones"), parts, strict=True)
    }
    done = Respelled({weights})
    for user, name in users.items():
        new = products[name]
        if overload_packet(user) is aten.select:
            new = emitter.call(aten.select.int, new, result.index(label), 0)
        done.put(user, new)
    facts.add(emitter.made, node)
    done.take_out(gm, sorted([node, *users]), emitter.made)
    return done


def _piece(node: fx.Node, along: int) -> str:
    """Which part of the result a use of it takes: "values", "ones", or ""."""
    packet = overload_packet(node)
    if packet not in (aten.slice, aten.select):
        return ""
    given = arguments(node)
    whole = shape_of(given["self"])
    last = whole[along] - 1
    if given["dim"] % len(whole) != along or not isinstance(last, int):
        return ""
    if packet is aten.select:
        return "ones" if given["index"] in (-1, last) else ""
    start, size = given["start"] or 0, shape_of(node)[along]
    if given["step"] != 1 or not isinstance(start, int):
        return ""
    if start == 0 and size == last:
        return "values"
    return "ones" if start in (-1, last) and is_one(size) else ""


def _parts(emitter: Emitter, values: fx.Node, dim: int) -> tuple[fx.Node, fx.Node] | None:
    given = arguments(values)
    if overload_packet(values) is aten.cat:
        tensors = list(given["tensors"])
        if len(tensors) != 2 or filled_with(tensors[1]) != 1:
            return None
        return (tensors[0], tensors[1]) if is_one(shape_of(tensors[1])[dim]) else None
    plain = given.get("mode", "constant") == "constant" and list(given["pad"]) == [0, 1]
    if not plain or number(given.get("value")) != 1:
        return None
    first = emitter.call(aten.slice.Tensor, given["self"], dim, 0, 1)
    return given["self"], emitter.call(aten.ones_like.default, first)
