"""What is linear in the weights is done to the outputs.

Before                                        After
    o = (w1 - lam * w2) @ v                       o = w1 @ v - lam * (w2 @ v)

    o = (w[:, :, 0] - lam * w[:, :, 1]) @ v       a = w @ v[:, :, None]
                                                  o = a[:, :, 0] - lam * a[:, :, 1]

Several values of the same weights are put side by side (`join`).
As in differential attention. The weights then have the one use that an attention may have. Where
none of them becomes one after all, everything is put back as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.join import Join
from fxport.passes.attention.layout import is_one
from fxport.passes.attention.parts import join_values
from fxport.passes.attention.products import Product, as_product
from fxport.passes.attention.respelled import Respelled
from fxport.passes.attention.softmax import Softmax
from fxport.passes.attention.views import (
    CASTS,
    SCALES,
    laid_out,
    moved_input,
    number,
    overload_packet,
)
from fxport.passes.constants import is_symbolic
from fxport.passes.graph_facts import GraphFacts, Source

__all__ = ["respell_uses"]

aten = torch.ops.aten

_SUMS = {aten.add, aten.sub}
_PIECES = {aten.chunk, aten.split, aten.split_with_sizes}
_MAX_DEPTH = 12


def respell_uses(
    gm: fx.GraphModule, facts: GraphFacts, softmaxes: Iterable[Softmax]
) -> list[Respelled]:
    """Changes the graph in place; one record for softmaxes that share a product."""
    known = {s.weights for s in softmaxes if s.quotient is None}
    found: list[Respelled] = []
    made: dict[_Whole, fx.Node] = {}
    for joined in join_values(gm, facts, lambda node: _weights_behind(node, known)):
        _record(found, joined)
    for node in list(gm.graph.nodes):
        product = as_product(node)
        if product is not None and product.added is None and product.alpha == 1:
            for operand in (product.left, product.right):
                done = _Spread(gm, facts, known, product, operand, made).run()
                if done is not None:
                    _record(found, done)
                    break
    for weights in known:
        whole = Join(gm, facts, weights).run()
        if whole is not None:
            _record(found, whole)
    return found


def _record(found: list[Respelled], new: Respelled) -> None:
    """Records that are about the same softmax become one."""
    first = next((f for f in found if f.weights & new.weights), None)
    if first is None:
        found.append(new)
        return
    first.merge(new)
    for other in [f for f in found if f is not first and f.weights & first.weights]:
        found.remove(other)
        first.merge(other)


# -- sums and selections ---------------------------------------------------------------------------


_Cut: TypeAlias = tuple[int, tuple[int, int]] | None
_Whole: TypeAlias = tuple[fx.Node, fx.Node, int, _Cut]  # weights, values, where they were selected


@dataclass(frozen=True)
class _Selection:
    """``select(unflatten(base, *cut), dim, index)``, without the unflatten if there is no cut."""

    base: fx.Node
    nodes: tuple[fx.Node, ...]
    dim: int
    index: int
    cut: _Cut = None


class _Spread:
    """One product with a combination of weights."""

    def __init__(
        self,
        gm: fx.GraphModule,
        facts: GraphFacts,
        known: Collection[fx.Node],
        product: Product,
        operand: fx.Node,
        made: dict[_Whole, fx.Node],
    ) -> None:
        self._gm, self._facts, self._known = gm, facts, known
        self._product, self._operand, self._made = product, operand, made
        left = operand is product.left
        self._values = product.right if left else product.left
        own, other, result = product.labels if left else (product.labels[1], *product.labels[::2])
        self._summed = [i for i, label in enumerate(own) if label not in result]
        # Then what broadcasts to the weights broadcasts to the result.
        self._rows_stay = left and own[:-1] == result[:-1] and len(own) == len(other)
        self._chain: list[fx.Node] = []
        self._weights: set[fx.Node] = set()

    def run(self) -> Respelled | None:
        node, operand = self._product.node, self._operand
        if operand is self._values or not self._combines(operand):
            return None
        emitter = Emitter(self._gm, node, [])
        new = self._value(emitter, operand)
        chain = {*self._chain, node}
        same = (
            new.meta["val"].shape == node.meta["val"].shape
            and new.meta["val"].dtype == node.meta["val"].dtype
        )
        closed = all(set(n.users) <= chain for n in self._chain if _is_tensor(n))
        if not same or not closed or not self._weights or not self._undisturbed():
            emitter.undo()
            for key in [k for k, n in self._made.items() if n in emitter.made]:
                del self._made[key]
            return None
        self._facts.add(emitter.made, node)
        done = Respelled(set(self._weights))
        done.put(node, new)
        done.take_out(self._gm, sorted(chain), emitter.made)
        return done

    def _undisturbed(self) -> bool:
        facts, node = self._facts, self._product.node
        written = any(Source.MUTATED in facts.source(n) for n in (*self._chain, node))
        return not written and facts.grad_switched(self._chain, node) is None

    def _combines(self, node: fx.Node, depth: int = 0, moved: bool = False) -> bool:
        """Whether something other than factors and layout stands between weights and this."""
        if depth > _MAX_DEPTH:
            return False
        if self._is_sum(node, moved):
            return any(_weights_behind(n, self._known) for n in node.args[:2])
        if not moved and self._shifted(node) is not None:
            return bool(_weights_behind(node.args[0], self._known))
        if not moved and self._selection(node) is not None:
            return True
        before = self._scaled(node, moved)
        if before is not None:
            return self._combines(before, depth + 1, moved)
        before = laid_out(node)
        return before is not None and self._combines(before, depth + 1, True)

    def _value(self, emitter: Emitter, node: fx.Node, moves: tuple[fx.Node, ...] = ()) -> fx.Node:
        """The product with the values of this part of the weights, after `moves`, last first."""
        if self._is_sum(node, bool(moves)):
            self._chain.append(node)
            parts = [self._value(emitter, n, moves) for n in node.args[:2]]  # type: ignore[arg-type]
            return emitter.call(node.target, *parts, **node.kwargs)  # type: ignore[arg-type]
        shift = None if moves else self._shifted(node)
        if shift is not None:
            self._chain.append(node)
            value = self._value(emitter, node.args[0])  # type: ignore[arg-type]
            total = emitter.call(aten.sum.dim_IntList, self._values, [-2], True)
            total = emitter.call(aten.mul.Tensor, total, shift)
            return emitter.call(node.target, value, total, **node.kwargs)  # type: ignore[arg-type]
        selection = None if moves else self._selection(node)
        if selection is not None:
            self._chain += selection.nodes
            whole = self._of_whole(emitter, selection)
            return emitter.call(aten.select.int, whole, selection.dim, selection.index)
        before = self._scaled(node, bool(moves))
        if before is not None and self._combines(before, 0, bool(moves)):
            self._chain.append(node)
            value = self._value(emitter, before, moves)
            args = [value if n is before else n for n in node.args]
            return emitter.call(node.target, *args, **node.kwargs)  # type: ignore[arg-type]
        before = laid_out(node)
        if before is not None and self._combines(before, 0, True):
            self._chain.append(node)
            return self._value(emitter, before, (*moves, node))
        self._weights |= _weights_behind(node, self._known)
        return self._of_part(emitter, node, moves)

    def _of_part(self, emitter: Emitter, node: fx.Node, moves: tuple[fx.Node, ...]) -> fx.Node:
        if not moves and self._by_rows() and _is_identity(node):
            return self._values
        for move in reversed(moves):
            args = (node, *move.args[1:])
            node = emitter.call(move.target, *args, **move.kwargs)  # type: ignore[arg-type]
        product = self._product.node
        given, named = fx.node.map_arg(
            (product.args, dict(product.kwargs)), lambda n: node if n is self._operand else n
        )
        return emitter.call(product.target, *given, **named)  # type: ignore[arg-type]

    def _shifted(self, node: fx.Node) -> object | None:
        """The number that is added to or subtracted from all weights, ``w + 1e-8``."""
        if overload_packet(node) not in _SUMS or len(node.args) != 2 or not self._by_rows():
            return None
        weights, shift = node.args
        size = isinstance(shift, fx.Node) and is_symbolic(shift)
        return shift if _is_tensor(weights) and (size or number(shift) is not None) else None

    def _by_rows(self) -> bool:
        """Whether every row of the weights is multiplied with the values as a whole."""
        return self._rows_stay and overload_packet(self._product.node) in _MATMULS

    def _is_sum(self, node: fx.Node, moved: bool) -> bool:
        """Whether this is a sum whose terms have all keys; if it is moved, all of its shape."""
        if overload_packet(node) not in _SUMS or len(node.args) != 2:
            return False
        terms = node.args
        if not all(_is_tensor(t) for t in terms) or terms[0] is terms[1]:
            return False
        whole = shape_of(node)
        shapes = [shape_of(t) for t in terms]  # type: ignore[arg-type]
        if not moved and self._by_rows() and any(len(s) != len(whole) for s in shapes):
            return whole in shapes and all(len(s) > 1 and s == whole[-len(s) :] for s in shapes)
        if moved or any(len(shape) != len(whole) for shape in shapes):
            return all(shape == whole for shape in shapes)
        return all(shape[i] == whole[i] for shape in shapes for i in self._summed)

    def _scaled(self, node: fx.Node, moved: bool) -> fx.Node | None:
        """What this is a multiple of, by factors that do not vary along the keys."""
        packet = overload_packet(node)
        if packet is aten.neg:
            return node.args[0]  # type: ignore[return-value]
        if packet not in SCALES or arguments(node).get("rounding_mode") is not None:
            return None
        orders = (node.args[:2], node.args[1::-1])[: 2 if packet is aten.mul else 1]
        for carrier, factor in orders:
            if not _is_tensor(carrier) or carrier is factor:
                continue
            fits = self._is_row_factor(factor, moved)
            if fits and shape_of(carrier) == shape_of(node):  # type: ignore[arg-type]
                return carrier  # type: ignore[return-value]
        return None

    def _is_row_factor(self, factor: object, moved: bool) -> bool:
        if not _is_tensor(factor):
            return number(factor) is not None
        shape = shape_of(factor)  # type: ignore[arg-type]
        if all(map(is_one, shape)):
            return True
        return not moved and self._rows_stay and is_one(shape[-1])

    # -- selections ------------------------------------------------------------------------------

    def _selection(self, node: fx.Node) -> _Selection | None:
        found = _selected(node)
        if found is None or not _weights_behind(found.base, self._known):
            return None
        rank = len(shape_of(found.base)) + (found.cut is not None)
        return found if self._by_rows() and found.dim < rank - 2 else None

    def _of_whole(self, emitter: Emitter, selection: _Selection) -> fx.Node:
        self._weights |= _weights_behind(selection.base, self._known)
        key = (selection.base, self._values, selection.dim, selection.cut)
        if key in self._made:
            return self._made[key]
        whole = self._cut(emitter, selection.base, selection.cut)
        values = emitter.call(aten.unsqueeze.default, self._values, selection.dim)
        self._made[key] = emitter.call(aten.matmul.default, whole, values)
        return self._made[key]

    def _cut(self, emitter: Emitter, base: fx.Node, cut: _Cut) -> fx.Node:
        if cut is None:
            return base
        key = (base, base, 0, cut)
        if key not in self._made:
            self._made[key] = emitter.call(aten.unflatten.int, base, *cut)
        return self._made[key]


_MATMULS = {aten.matmul, aten.bmm}


def _is_identity(node: object) -> bool:
    """Whether this is a fresh identity matrix, in whatever precision."""
    while isinstance(node, fx.Node) and overload_packet(node) in CASTS:
        node = node.args[0]
    if overload_packet(node) is not aten.eye or not isinstance(node, fx.Node):
        return False
    rows, columns = shape_of(node)
    return bool(rows == columns)


def _selected(node: fx.Node) -> _Selection | None:
    """What a node selects, past the slices of everything that ``x[:, :, 0]`` begins with."""
    found = _directly_selected(node)
    while found is not None and _is_everything(found.base):
        base = found.base.args[0]
        assert isinstance(base, fx.Node)
        found = replace(found, base=base, nodes=(found.base, *found.nodes))
    return found


def _is_everything(node: fx.Node) -> bool:
    packet = overload_packet(node)
    if packet is aten.slice:
        return arguments(node)["step"] == 1 and shape_of(node) == shape_of(node.args[0])  # type: ignore[arg-type]
    return packet is aten.alias


def _directly_selected(node: fx.Node) -> _Selection | None:
    packet = overload_packet(node)
    if packet is aten.select:
        given = arguments(node)
        return _one_of(given["self"], (node,), given["dim"], given["index"])
    if packet is aten.slice:
        return _slice_of(node)
    parts = node.args[0] if node.target is operator.getitem else None
    if not isinstance(parts, fx.Node) or not isinstance(node.args[1], int):
        return None
    packet = overload_packet(parts)
    if packet is not aten.unbind and packet not in _PIECES:
        return None  # of a checkpoint or an autograd.Function, say
    given = arguments(parts)
    base = given["self"]
    if packet is aten.unbind:
        return _one_of(base, (parts, node), given["dim"], node.args[1])
    dim = given["dim"] % len(shape_of(base))
    size, count = shape_of(node)[dim], len(parts.meta["val"])
    if not isinstance(size, int) or shape_of(base)[dim] != count * size:
        return None
    return _Selection(base, (parts, node), dim, node.args[1] % count, (dim, (count, size)))


def _slice_of(node: fx.Node) -> _Selection | None:
    given = arguments(node)
    base, step, start = given["self"], given["step"], given["start"] or 0
    dim = given["dim"] % len(shape_of(base))
    whole, size = shape_of(base)[dim], shape_of(node)[dim]
    if not isinstance(whole, int) or not isinstance(size, int) or not isinstance(start, int):
        return None
    start += whole if start < 0 else 0
    if step == 1 and size < whole and start % size == 0 and whole % size == 0:
        return _Selection(base, (node,), dim, start // size, (dim, (whole // size, size)))
    if step > 1 and size * step == whole and start < step:
        return _Selection(base, (node,), dim + 1, start, (dim, (size, step)))
    return None


def _one_of(base: fx.Node, nodes: tuple[fx.Node, ...], dim: int, index: int) -> _Selection | None:
    dim %= len(shape_of(base))
    size = shape_of(base)[dim]
    if not isinstance(size, int) or not isinstance(index, int):
        return None
    return _Selection(base, nodes, dim, index % size)


def _is_tensor(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def _weights_behind(
    node: object, known: Collection[fx.Node], depth: int = _MAX_DEPTH
) -> set[fx.Node]:
    """The softmaxes that a value is the weights of, but for layout, precision and factors."""
    if not _is_tensor(node) or not depth:
        return set()
    assert isinstance(node, fx.Node)
    if node in known:
        return {node}
    packet = overload_packet(node)
    before: list[object]
    if packet in SCALES | _SUMS:
        before = list(node.args[:2])
    elif packet in (aten.dropout, aten.neg):
        before = list(node.args[:1])
    else:
        selected = _selected(node)
        before = [moved_input(node) if selected is None else selected.base]
    return set().union(*(_weights_behind(n, known, depth - 1) for n in before))
