"""Several products of the same weights become one, with the values put side by side.

Before                       After
    o1 = w @ v1                  a = w @ cat([v1, v2], -1)
    o2 = w @ v2                  o1, o2 = a[..., :D1], a[..., D1:]
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import fx

from fxport.capture.arguments import shape_of
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.products import Product, as_product
from fxport.passes.attention.respelled import Respelled
from fxport.passes.attention.terms import WIDEST
from fxport.passes.attention.views import SCALES, laid_out, moved_input, overload_packet
from fxport.passes.graph_facts import (
    GraphFacts,
    Source,
    computes,
    lends_shape_only,
    only_checks,
    reachable,
)

__all__ = ["Join"]

aten = torch.ops.aten


class Join:
    """The products of the same weights."""

    def __init__(self, gm: fx.GraphModule, facts: GraphFacts, weights: fx.Node) -> None:
        self._gm, self._facts, self._weights = gm, facts, weights
        self._used, self._same = [weights], list[fx.Node]()

    def run(self) -> Respelled | None:
        users = self._products()
        if len(users) < 2:
            return None
        products = [p for u in users if (p := _weights_first(u, self._used)) is not None]
        if len(products) != len(users) or not self._alike(products):
            return None
        own, other, result = products[0].labels
        free = [label for label in other if label not in own and label in result]
        values = [p.right for p in products]
        if len(free) != 1 or not _join_along(values, other.index(free[0])):
            return None
        place = self._place(users, values)
        if place is None:
            return None
        emitter = Emitter(self._gm, place, [])
        joined = emitter.call(aten.cat.default, values, other.index(free[0]))
        first = products[0]
        args, kwargs = fx.node.map_arg(
            (first.node.args, dict(first.node.kwargs)),
            lambda n: joined if n is first.right else n,
        )
        whole = emitter.call(first.node.target, *args, **kwargs)  # type: ignore[arg-type]
        done, start = Respelled({self._weights}), 0
        for product in products:
            size = shape_of(product.right)[other.index(free[0])]
            along = result.index(free[0])
            part = emitter.call(aten.slice.Tensor, whole, along, start, start + size)
            done.put(product.node, part)
            start += size  # type: ignore[assignment]
        self._facts.add(emitter.made, place)
        done.take_out(self._gm, sorted([*self._same, *users]), emitter.made)
        return done

    def _products(self) -> list[fx.Node]:
        """What the weights are multiplied with, if nothing else is done with them.

        The same layout may be brought about for every product anew.
        """
        while True:
            users = [u for used in self._used for u in used.users if not _is_harmless(used, u)]
            if users and all(map(as_product, users)):
                return sorted(users)
            if not users or not _is_same_step(users):
                return []
            self._same += users[1:]
            self._used = users

    def _alike(self, products: list[Product]) -> bool:
        first = products[0]
        nodes = [p.node for p in products]
        facts = self._facts
        return (
            all(p.labels == first.labels and p.node.target is first.node.target for p in products)
            and not any(Source.MUTATED in facts.source(n) for n in nodes)
            and all(facts.grad_switched(nodes, n) is None for n in nodes)
        )

    def _place(self, users: list[fx.Node], values: list[fx.Node]) -> fx.Node | None:
        """Where all values are known and no result is used yet: at the first of the products.

        Values that are made after it are made before it now, as long as nothing in between does
        more than compute.
        """
        first, last = users[0], users[-1]
        between = [first]
        while between[-1] is not last:
            between.append(between[-1].next)
        needed = reachable(values)
        late = [n for n in needed if first < n]
        if not set(needed) & set(users) and all(map(computes, between)):
            for node in sorted(late):
                first.prepend(node)
            return first
        return None


def _is_harmless(value: fx.Node, user: fx.Node) -> bool:
    return only_checks(user) or lends_shape_only(value, user)


def _is_same_step(users: list[fx.Node]) -> bool:
    """One step that keeps weights what they are, or several that are the same layout."""
    first = users[0]
    if len(users) == 1:
        scaled = overload_packet(first) in SCALES
        return scaled or moved_input(first) is not None or overload_packet(first) is aten.dropout
    return all(laid_out(u) is not None and _says(u) == _says(first) for u in users)


def _says(node: fx.Node) -> tuple[object, ...]:
    """What a layout operation does; sizes that are computed show in the result's shape."""
    numbers = fx.node.map_arg((node.args[1:], dict(node.kwargs)), lambda _: None)
    return node.target, shape_of(node), numbers


def _weights_first(node: fx.Node, weights: Collection[fx.Node]) -> Product | None:
    product = as_product(node)
    if product is None or product.added is not None or product.alpha != 1:
        return None
    if (product.left in weights) == (product.right in weights):
        return None
    if product.left in weights:
        return product
    a, b, out = product.labels
    return replace(product, left=product.right, right=product.left, labels=(b, a, out))


def _join_along(values: list[fx.Node], dim: int) -> bool:
    """Whether these can be concatenated to values that are not too wide."""
    shapes = [shape_of(v) for v in values]
    rest = {(*s[:dim], *s[dim + 1 :]) for s in shapes}
    widths = [s[dim] for s in shapes if isinstance(s[dim], int)]
    dtypes = {v.meta["val"].dtype for v in values}
    fits = len(widths) == len(values) and sum(widths) <= WIDEST
    return fits and len(rest) == len(dtypes) == 1
