"""Scores ``q.k`` that meet values by a way that no softmax of this graph accounts for.

    e = exp(q @ k.T);  (e @ v) / unknown(e)              another denominator, or a detached one
    sigmoid(q @ k.T) @ v     relu(q @ k.T) @ v           no softmax at all
    checkpoint(softmax, q @ k.T) @ v                     a part of it in a body of its own
    softmax(-cdist(q, k)) @ v                            scores that are no q.k
    softmax(-((q[:, None] - k) ** 2).sum(-1)) @ v
    softmax(tanh(q[:, None] + k) @ w) @ v            additive attention
    softmax(leaky_relu(a[:, None] + b)) @ v          as in graph attention

Reported, so that nothing is slow in silence. What is linear in the scores all the way (linear
attention, retention) has nothing that a kernel for attention would do, and is not reported.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, TypeAlias

import torch
from torch import fx

from fxport.capture.arguments import shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.errors import ReasonCode
from fxport.passes.attention.bodies import body_of
from fxport.passes.attention.layout import is_one
from fxport.passes.attention.made import power_of
from fxport.passes.attention.products import as_product, factors_of, sums_products
from fxport.passes.attention.site import Left
from fxport.passes.attention.softmax import Softmax, is_softmax_call, softmaxes
from fxport.passes.attention.views import is_pointwise, moved_input, number, overload_packet
from fxport.passes.experts.products import is_by_expert
from fxport.passes.graph_facts import GraphFacts, Source

__all__ = ["Unread", "may_be_unread", "unread_scores"]

aten = torch.ops.aten

# Pointwise, and yet linear in the scores (or the scores with something added).
_LINEAR = {
    aten.mul, aten.div, aten.true_divide, aten.add, aten.sub, aten.neg, aten.masked_fill,
    aten.where, aten.clone, aten.nan_to_num,
}  # fmt: skip
# Not pointwise, and yet every result is made of a few scores.
_CARRIES = {
    aten.detach, aten.dropout, aten.rsub, aten.tril, aten.triu, aten.cat, aten.pad,
    aten.constant_pad_nd, aten.slice, aten.narrow, aten.cumsum, aten.flip, aten.roll, aten.gather,
    aten.scatter, aten.index_put, aten.diagonal, aten.stack, aten.real, aten.imag,
    aten.view_as_real, aten.view_as_complex, aten._conj, aten.resolve_conj,
}  # fmt: skip
_ORDERS = {aten.sort, aten.topk}
_SUMS = {aten.sum, aten.mean, aten.norm, aten.linalg_vector_norm}
_MAX_DEPTH = 4  # operations between pairs of queries and keys and their sum


@dataclass(frozen=True)
class Unread:
    """What was found in one graph.

    Attributes:
        reported: the operations that stand between q.k and the values, each with its reason.
        between: the softmaxes that stand there, by their start, each with the reason for the case
            that the pass sees no attention in it.
        of_pairs: those of them whose scores are made of pairs of queries and keys entry by entry.
    """

    reported: tuple[tuple[fx.Node, Left], ...]
    between: dict[fx.Node, Left]
    of_pairs: frozenset[fx.Node]


@dataclass(frozen=True)
class _Way:
    """How a value was made of scores.

    Attributes:
        node: the value.
        bend: the operation that is not linear, an exponential before any other.
        softmax: whether that is a softmax that is known.
        outside: whether it is in the body of another operation.
        border: the operation that a part of the way is a body of.
        pairs: whether the scores are no product of queries with keys.
        softmax_only: whether they are scores only if a softmax is what they meet.
    """

    node: fx.Node
    bend: fx.Node | None = None
    softmax: bool = False
    outside: bool = False
    border: fx.Node | None = None
    pairs: bool = False
    softmax_only: bool = False

    def at(self, node: fx.Node) -> _Way:
        return replace(self, node=node)


def unread_scores(facts: GraphFacts, known: Collection[Softmax]) -> Unread:
    """All that one graph shows, the bodies of its higher-order operations included.

    What lies in one of those bodies as a whole is left to a call with the body.
    """
    scope = _Scope(facts, known, {})
    reported: dict[fx.Node, Left] = {}
    between: dict[fx.Node, Left] = {}
    of_pairs: set[fx.Node] = set()
    for ways in scope.to_values().values():
        for way in _telling(ways):
            assert way.bend is not None
            own = way.softmax and not way.outside
            (between if own else reported).setdefault(way.bend, _reason(way))
            of_pairs |= {way.bend} if own and way.pairs else set()
    return Unread(tuple(reported.items()), between, frozenset(of_pairs))


def _telling(ways: list[_Way]) -> list[_Way]:
    """Of the ways to one product with values: those by a softmax, or an exponential, or one."""
    met = [way for way in ways if not way.softmax_only or (way.softmax and not way.outside)]
    bent = [way for way in met if way.bend is not None]
    softmaxes = [way for way in bent if way.softmax]
    powers = [way for way in bent if way.bend is not None and power_of(way.bend) is not None]
    return softmaxes or powers or bent[:1]


def _reason(way: _Way) -> Left:
    assert way.bend is not None
    code = ReasonCode.UNSUPPORTED_FEATURE
    if way.border is not None:
        return Left(
            code,
            f"a part of this attention runs in `{way.border.target}`, the rest outside of it",
            way.bend,
            "let it cover q.k, the softmax and the product with the values, or none of them",
        )
    if way.softmax and way.pairs:
        return Left(
            code,
            "the scores are made of each query with each key entry by entry, and are no "
            "product q.k: no kernel has it",
            way.bend,
            "it stays as it is, and needs memory for all queries with all keys",
        )
    if way.softmax:
        return Left(
            code,
            "scores of queries and keys reach this softmax, or its weights the values, by "
            "operations that are not followed here",
            way.bend,
        )
    if power_of(way.bend) is not None:
        return Left(
            code,
            "exponentials of q.k meet the values, and are not known to be divided by "
            "their sum over the keys and nothing more",
            way.bend,
            "softmax(x), or e = exp(x - amax(x)) and e / e.sum(), all of it with its gradient; a "
            "learned sink in the sum is a column of the scores: "
            "softmax(cat([x, sink], -1))[..., :-1]",
        )
    return Left(
        code,
        f"scores of queries and keys meet the values by `{way.bend.target}`, which is no softmax: "
        "no kernel has it",
        way.bend,
        "it stays as it is, and needs memory for all queries with all keys",
    )


_Met: TypeAlias = tuple[_Way, fx.Node]  # a way, and the product with values that it ends before


def _across(before: _Way, after: _Way, border: fx.Node) -> _Way:
    """A way that went through the body of `border`."""
    outside = before.outside or after.bend is not before.bend
    return replace(after, border=border, outside=outside)


def may_be_unread(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether scores may begin at a node: cheap, and true of too much."""
    product = as_product(node)
    if product is None:
        sums = overload_packet(node) in _SUMS or overload_packet(node) is aten.cdist
        return sums or body_of(gm, node) is not None
    return not any(map(_is_stored, (product.left, product.right)))


def _is_stored(node: fx.Node) -> bool:
    return node.op == "get_attr" or (
        node.op == "placeholder" and graph_input(node).kind is not InputKind.DATA
    )


class _Scope:
    """One graph: what carries scores on in it."""

    def __init__(
        self,
        facts: GraphFacts,
        known: Collection[Softmax],
        bodies: dict[fx.GraphModule, _Scope],
    ) -> None:
        self.facts = facts
        self.read = {n: s.start for s in known for n in s.nodes}
        self.bodies = bodies

    def _inner(self, gm: fx.GraphModule) -> _Scope:
        if gm not in self.bodies:
            self.bodies[gm] = _Scope(GraphFacts(gm), list(softmaxes(gm.graph)), self.bodies)
        return self.bodies[gm]

    def made(self) -> Iterator[_Way]:
        """The scores: products of data with data, and what bodies return that is made of them."""
        for node in self.facts.gm.graph.nodes:
            if self._is_product_of_data(node):
                yield _Way(node)
            elif self._is_sum_of_pairs(node):
                yield _Way(node, pairs=True)
            elif node.op == "call_function" and self._is_of_pairs(node, 0):
                yield _Way(node, pairs=True, softmax_only=True)
            body = body_of(self.facts.gm, node)
            if body is not None:
                inner = self._inner(body.gm)
                for way in inner.made():
                    _, returned = inner.follow(way)
                    for end in returned:
                        for result in body.left(end.node):
                            yield replace(end, node=result, outside=True, border=node)

    def to_values(self) -> dict[fx.Node, list[_Way]]:
        """The ways from scores to each product with values."""
        found: dict[fx.Node, list[_Way]] = {}
        for start in self.made():
            for way, product in self.follow(start)[0]:
                found.setdefault(product, []).append(way)
        return found

    def follow(self, start: _Way) -> tuple[list[_Met], list[_Way]]:
        """The ways to a product with values that are not made of these scores; and to the output.

        A way ends before the product.
        """
        pending, seen = [start], {(start.node, start.bend, start.softmax_only)}
        here: list[_Met] = []
        inside: list[_Met] = []
        returned: list[_Way] = []
        while pending:
            way = pending.pop(0)
            for user in way.node.users:
                if user.op == "output":
                    returned.append(way)
                elif _is_product(user, way.node):
                    here.append((way, user))
                found, onwards = self._after(way, user)
                inside += found
                for after in onwards:
                    reached = (after.node, after.bend, after.softmax_only)
                    if reached not in seen:
                        seen.add(reached)
                        pending.append(after)
        made = {node for node, _, _ in seen}
        return [met for met in here if self._takes_values(met[1], made)] + inside, returned

    def _after(self, way: _Way, user: fx.Node) -> tuple[list[_Met], list[_Way]]:
        """Products in the body that a user runs, and what carries the scores on after the user."""
        body = body_of(self.facts.gm, user)
        if body is None:
            return [], self._carried(way, user)
        met: list[_Met] = []
        onwards: list[_Way] = []
        for place in body.entered(way.node):
            found, returned = self._inner(body.gm).follow(way.at(place))
            met += [(_across(way, end, user), product) for end, product in found]
            for end in returned:
                onwards += [_across(way, end, user).at(n) for n in body.left(end.node)]
        return met, onwards

    def _carried(self, way: _Way, user: fx.Node) -> list[_Way]:
        if overload_packet(user) in _SUMS and as_product(user) is None:  # over the heads, say
            return [replace(way, node=user, softmax_only=True)]
        return [self._bent(way.at(user))] if _carries(user, way.node) else []

    def _bent(self, way: _Way) -> _Way:
        node = way.node
        if node in self.read:
            return replace(way, bend=self.read[node], softmax=True, outside=False)
        if way.softmax or not _bends(node):
            return way
        first = way.bend is None or power_of(node) is not None
        return replace(way, bend=node) if first else way

    def _is_product_of_data(self, node: fx.Node) -> bool:
        """Sums of data times data."""
        if overload_packet(node) is aten.cdist:
            return self._is_data(*node.args[:2])
        product = as_product(node)
        if product is None or not self._is_data(product.left, product.right):
            return False
        one_by_one = overload_packet(node) is aten.sum
        plain = one_by_one and shape_of(product.left) == shape_of(product.right)
        return product.left is not product.right and not plain and not is_by_expert(product)

    def _is_sum_of_pairs(self, node: fx.Node) -> bool:
        """Sums, with learned factors or not, of what is made of every query with every key."""
        summed = overload_packet(node) in _SUMS or sums_products(node)
        return summed and any(map(self._is_of_pairs, node.all_input_nodes))

    def _is_data(self, *values: Any) -> bool:
        return all(isinstance(v, fx.Node) and Source.DATA in self.facts.source(v) for v in values)

    def _is_of_pairs(self, value: Any, depth: int = _MAX_DEPTH) -> bool:
        """``f(q[:, :, None] - k[:, None])``, entry by entry."""
        if not isinstance(value, fx.Node) or not is_pointwise(value):
            return False
        if not value.meta["val"].is_floating_point():
            return False
        given = [n for n in value.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        if any(_spread(a, b) and self._is_data(a, b) for a, b in combinations(given, 2)):
            return True
        whole = [n for n in given if shape_of(n) == shape_of(value)]
        return depth > 0 and any(self._is_of_pairs(n, depth - 1) for n in whole)

    def _takes_values(self, product: fx.Node, made: Collection[fx.Node]) -> bool:
        """Whether something of the data enters that is not made of the scores themselves."""
        others = [n for n in product.all_input_nodes if n not in made]
        return any(Source.DATA in self.facts.source(n) for n in others)


def _spread(one: fx.Node, other: fx.Node) -> bool:
    """Whether each of two values is repeated along a dimension of the other."""
    a, b = shape_of(one), shape_of(other)
    if len(a) != len(b) or len(a) < 3:
        return False
    pairs = list(zip(map(is_one, a), map(is_one, b), strict=True))
    return (True, False) in pairs and (False, True) in pairs


def _is_product(node: fx.Node, factor: fx.Node) -> bool:
    if factors_of(node) is not None:
        return shape_of(node) != shape_of(factor)
    if overload_packet(node) is aten.sum:
        return False
    return as_product(node) is not None or sums_products(node)


def _carries(node: fx.Node, value: fx.Node) -> bool:
    """Whether a node's result is made of single entries of a value."""
    if node.target is operator.getitem:
        return overload_packet(value) in _ORDERS and number(node.args[1]) == 0
    packet = overload_packet(node)
    if packet in _ORDERS:
        return True
    result = node.meta.get("val")
    if not isinstance(result, torch.Tensor):
        return False
    if not result.dtype.is_floating_point and not result.dtype.is_complex:
        return False
    known = packet in _CARRIES or is_softmax_call(node) or moved_input(node) is value
    return known or is_pointwise(node)


def _bends(node: fx.Node) -> bool:
    packet = overload_packet(node)
    if packet in _ORDERS or is_softmax_call(node):
        return True
    squares = packet is aten.mul and node.args[0] is node.args[1]
    return squares or (is_pointwise(node) and packet not in _LINEAR)
