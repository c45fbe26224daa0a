"""Products with weights that are looked up for each row, without a copy for each row.

Before: W [E, O, I], x [S, I], experts [S]          After
    w = index(W, [experts])           [S, O, I]         y = expert_linear(x, W, experts)
    y = bmm(w, unsqueeze(x, -1))      [S, O, 1]         y = unsqueeze(y, -1)
    b = index(bias, [experts])        [S, O]            b = embedding(bias, experts)

`index_select` alike. Experts count only where they come from ``topk``, ``sort`` or ``argmax``:
others may be negative, which counts from the end. W is a parameter, or made of parameters alone.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import fxport.ops.experts  # noqa: F401  (registers the op)
from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.location import user_location
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.products import Product, as_product
from fxport.passes.attention.views import overload_packet
from fxport.passes.graph_facts import erase_if_unused
from fxport.report import Decision, Outcome

__all__ = ["is_by_expert", "multiply_by_expert"]

aten = torch.ops.aten

_LOOK_UPS = {aten.index.Tensor, aten.index_select.default}
_INDICES = {aten.topk: 1, aten.sort: 1, aten.max: 1}
_WHOLE = {aten.argmax, aten.argsort}
_VIEWS = {
    aten.view, aten.reshape, aten.flatten, aten.unsqueeze, aten.squeeze, aten.transpose, aten.t,
    aten.permute, aten.slice, aten.select, aten.to, aten.contiguous, aten.clone, aten.detach,
}  # fmt: skip


def multiply_by_expert(gm: fx.GraphModule) -> tuple[Decision, ...]:
    """Rewrites every look-up of weights by chosen experts; one decision for each product."""
    decisions: list[Decision] = []
    look_ups = [n for n in gm.graph.nodes if n.target in _LOOK_UPS]
    for node in look_ups:
        table, experts = node.args[0], _chosen(node)
        if experts is None or not _of_weights(table):
            continue
        rank = len(shape_of(table))
        if rank == 2:
            emitter = Emitter(gm, node, [experts])
            node.replace_all_uses_with(emitter.call(aten.embedding.default, table, experts))
            erase_if_unused(gm, [node])
        elif rank == 3:
            decisions += [
                made
                for user in list(node.users)
                if (made := _multiply(gm, user, node, table, experts)) is not None
            ]
    gm.recompile()
    return tuple(decisions)


def is_by_expert(product: Product) -> bool:
    """Whether this multiplies each row by the weight of its own expert."""
    for copies in (product.left, product.right):
        if copies.target not in _LOOK_UPS or (experts := _chosen(copies)) is None:
            continue
        table: Any = copies.args[0]
        if len(shape_of(table)) == 3 and _of_weights(table):
            return _Letters.of(product, copies, experts) is not None
    return False


def _chosen(node: fx.Node) -> fx.Node | None:
    """The experts of ``table[experts]``, if they are certainly not negative."""
    bound = arguments(node)
    if "indices" in bound:
        indices = list(bound["indices"])
    else:
        indices = [bound["index"]] if bound["dim"] % len(shape_of(bound["self"])) == 0 else []
    if len(indices) != 1:
        return None
    experts: Any = indices[0]
    source = experts
    while isinstance(source, fx.Node) and overload_packet(source) in _VIEWS:
        source = source.args[0]
    if not isinstance(source, fx.Node):
        return None
    known = overload_packet(source) in _WHOLE
    if source.target is operator.getitem:
        of, place = source.args
        known = isinstance(of, fx.Node) and _INDICES.get(overload_packet(of)) == place
    return experts if known else None


def _of_weights(table: Any) -> bool:
    """Whether this is a parameter, or made of parameters alone."""
    pending = [table]
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or not node.all_input_nodes:
            known = isinstance(node, fx.Node) and node.op == "placeholder" and "input" in node.meta
            if not known or graph_input(node).kind is not InputKind.PARAMETER:
                return False
        pending += node.all_input_nodes
    return True


def _multiply(
    gm: fx.GraphModule, node: fx.Node, copies: fx.Node, table: fx.Node, experts: fx.Node
) -> Decision | None:
    """Rewrites one product of the copies, if it is one of a row and its own expert."""
    product = as_product(node)
    if product is None or product.added is not None or product.alpha != 1:
        return None
    if (product.left is copies) is (product.right is copies):
        return None
    found = _Letters.of(product, copies, experts)
    if found is None or copies.meta["val"].dtype != found.x.meta["val"].dtype:
        return None
    emitter = Emitter(gm, node, [experts, found.x])
    weight = table if found.summed_last else emitter.call(aten.transpose.int, table, 1, 2)
    x = found.rows(emitter)
    value = emitter.call(torch.ops.fxport.expert_linear.default, x, weight, experts)
    node.replace_all_uses_with(found.as_asked(emitter, value))
    erase_if_unused(gm, [node])
    return Decision(
        "experts",
        Outcome.REWRITTEN,
        f"{len(shape_of(table))}-dimensional weight of {shape_of(table)[0]} experts",
        "fxport::expert_linear: rows sorted by expert, no weight copied for a row",
        location=user_location(node),
    )


@dataclass(frozen=True)
class _Letters:
    """The dimensions of ``einsum(copies, x)``.

    Attributes:
        x: the rows.
        of_x, result: their labels, and those of the product.
        experts: labels of the dimensions of the experts, and their sizes.
        summed, new: the label that x and the weight share, and that of the weight alone.
        summed_last: the weight is ``[E, new, summed]``.
    """

    x: fx.Node
    of_x: tuple[str, ...]
    result: tuple[str, ...]
    experts: dict[str, Any]
    summed: str
    new: str
    summed_last: bool

    @property
    def single(self) -> list[str]:
        """Dimensions of size 1 that only x has."""
        return [c for c in self.of_x if c not in self.experts and c != self.summed]

    @classmethod
    def of(cls, product: Product, copies: fx.Node, experts: fx.Node) -> _Letters | None:
        """None if this is another product than that of a row and its own expert's weight."""
        of_left, of_right, result = product.labels
        first = product.left is copies
        of_copies, of_x = (of_left, of_right) if first else (of_right, of_left)
        summed_last = of_copies[-1] not in result
        new, summed = of_copies[-2:] if summed_last else of_copies[:-3:-1]
        chosen = dict(zip(of_copies[:-2], shape_of(experts), strict=True))
        x = product.right if first else product.left
        found = cls(x, of_x, result, chosen, summed, new, summed_last)
        sizes = dict(zip(of_x, shape_of(x), strict=True))
        fits = (
            all(c in result for c in chosen)
            and all(
                sizes.get(c, 1) == n or (c, n) in found.spread(sizes) for c, n in chosen.items()
            )
            and all(sizes[c] == 1 and c in result for c in found.single)
            and (new in result, new in of_x) == (True, False)
            and (summed in result, summed in of_x) == (False, True)
        )
        return found if fits else None

    def rows(self, emitter: Emitter) -> fx.Node:
        """x as ``[*experts, summed]``."""
        present = [c for c in self.experts if c in self.of_x]
        value = _permuted(emitter, self.x, self.of_x, (*self.single, *present, self.summed))
        for _ in self.single:
            value = emitter.call(aten.squeeze.dim, value, 0)
        for dim, letter in enumerate(self.experts):
            if letter not in present:
                value = emitter.call(aten.unsqueeze.default, value, dim)
        spread = dict(self.spread(dict(zip(self.of_x, shape_of(self.x), strict=True))))
        if spread:
            sizes = [spread.get(letter, -1) for letter in self.experts]
            value = emitter.call(aten.expand.default, value, [*sizes, -1])
        return value

    def spread(self, sizes: dict[str, Any]) -> list[tuple[str, int]]:
        """Dimensions of the experts along which x is the same, with their sizes."""
        counted = [(c, n) for c, n in self.experts.items() if isinstance(n, int) and n != 1]
        return [(c, n) for c, n in counted if sizes.get(c, 1) == 1]

    def as_asked(self, emitter: Emitter, value: fx.Node) -> fx.Node:
        """``[*experts, new]`` in the order of the result."""
        for _ in self.single:
            value = emitter.call(aten.unsqueeze.default, value, 0)
        return _permuted(emitter, value, (*self.single, *self.experts, self.new), self.result)


def _permuted(
    emitter: Emitter, value: fx.Node, have: tuple[str, ...], want: tuple[str, ...]
) -> fx.Node:
    order = [have.index(c) for c in want]
    if order == sorted(order):
        return value
    return emitter.call(aten.permute.default, value, order)
