"""What is linear in the weights is done to the outputs; several values are put side by side.

Before                                        After
    o = (w1 - lam * w2) @ v                       o = w1 @ v - lam * (w2 @ v)

    o = (w[:, :, 0] - lam * w[:, :, 1]) @ v       a = w @ v[:, :, None]
                                                  o = a[:, :, 0] - lam * a[:, :, 1]

    o1, o2 = w @ v1, w @ v2                       a = w @ cat([v1, v2], -1)
                                                  o1, o2 = a[..., :D1], a[..., D1:]

As in differential attention. The weights then have the one use that an attention may have. Where
none of them becomes one after all, everything is put back as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention_emit import Emitter
from fxport.passes.attention_layout import is_one
from fxport.passes.attention_products import Product, as_product
from fxport.passes.attention_softmax import Softmax
from fxport.passes.attention_terms import WIDEST
from fxport.passes.attention_views import moved_input, number, overload_packet
from fxport.passes.graph_facts import (
    GraphFacts,
    Source,
    computes,
    lends_shape_only,
    only_checks,
    reachable,
)

__all__ = ["Respelled", "respell_uses"]

aten = torch.ops.aten

_SUMS = {aten.add, aten.sub}
_SCALES = {aten.mul, aten.div, aten.true_divide}
_PIECES = {aten.chunk, aten.split, aten.split_with_sizes}
_MAX_DEPTH = 12


@dataclass(frozen=True)
class _Saved:
    """What a node was that was taken out of the graph."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]


@dataclass
class Respelled:
    """What was changed around some softmaxes.

    Attributes:
        weights: their results.
    """

    weights: set[fx.Node]
    _removed: dict[fx.Node, _Saved] = field(default_factory=dict)
    _made: list[fx.Node] = field(default_factory=list)
    _instead: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def put(self, old: fx.Node, new: fx.Node) -> None:
        """Has the users of `old` use `new`."""
        old.replace_all_uses_with(new)
        self._instead[old] = new

    def take_out(self, gm: fx.GraphModule, old: Sequence[fx.Node], made: Iterable[fx.Node]) -> None:
        """Takes those of `old`, in graph order, that nothing uses any more out of the graph."""
        self._made += made
        for node in reversed(old):
            if not node.users:
                self._removed[node] = _Saved(node.args, dict(node.kwargs), dict(node.meta))
                gm.graph.erase_node(node)

    def merge(self, later: Respelled) -> None:
        """Takes over what was changed after this."""
        self.weights |= later.weights
        self._removed.update(later._removed)
        self._made += later._made
        self._instead.update(later._instead)

    def put_back(self, gm: fx.GraphModule) -> None:
        """The graph as it was."""
        made, again = set(self._made), dict[fx.Node, fx.Node]()
        for old in self._instead:
            if old not in made:  # made by one change, replaced by the next
                new = self._final(old)
                new.replace_all_uses_with(self._rebuilt(gm, old, new, again))
        for node in sorted((n for n in self._made if not n._erased), reverse=True):
            if not node.users:
                gm.graph.erase_node(node)

    def _rebuilt(
        self, gm: fx.GraphModule, old: fx.Node, place: fx.Node, again: dict[fx.Node, fx.Node]
    ) -> fx.Node:
        if old in again or old not in self._removed:
            return again.get(old, old)
        saved = self._removed[old]
        args, kwargs = fx.node.map_arg(
            (saved.args, saved.kwargs), lambda n: self._rebuilt(gm, n, place, again)
        )
        with gm.graph.inserting_before(place):
            again[old] = gm.graph.create_node(old.op, old.target, args, kwargs)
        again[old].meta = saved.meta
        return again[old]

    def _final(self, node: fx.Node) -> fx.Node:
        while node in self._instead:
            node = self._instead[node]
        return node


def respell_uses(
    gm: fx.GraphModule, facts: GraphFacts, softmaxes: Iterable[Softmax]
) -> list[Respelled]:
    """Changes the graph in place; one record for softmaxes that share a product."""
    known = {s.weights for s in softmaxes if s.quotient is None}
    found: list[Respelled] = []
    made: dict[_Whole, fx.Node] = {}
    for node in list(gm.graph.nodes):
        product = as_product(node)
        if product is not None and product.added is None and product.alpha == 1:
            for operand in (product.left, product.right):
                done = _Spread(gm, facts, known, product, operand, made).run()
                if done is not None:
                    _record(found, done)
                    break
    for weights in known:
        joined = _Join(gm, facts, weights).run()
        if joined is not None:
            _record(found, joined)
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
        if not moved and self._selection(node) is not None:
            return True
        before = self._scaled(node, moved)
        if before is not None:
            return self._combines(before, depth + 1, moved)
        before = _laid_out(node)
        return before is not None and self._combines(before, depth + 1, True)

    def _value(self, emitter: Emitter, node: fx.Node, moves: tuple[fx.Node, ...] = ()) -> fx.Node:
        """The product with the values of this part of the weights, after `moves`, last first."""
        if self._is_sum(node, bool(moves)):
            self._chain.append(node)
            parts = [self._value(emitter, n, moves) for n in node.args[:2]]  # type: ignore[arg-type]
            return emitter.call(node.target, *parts, **node.kwargs)  # type: ignore[arg-type]
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
        before = _laid_out(node)
        if before is not None and self._combines(before, 0, True):
            self._chain.append(node)
            return self._value(emitter, before, (*moves, node))
        self._weights |= _weights_behind(node, self._known)
        return self._of_part(emitter, node, moves)

    def _of_part(self, emitter: Emitter, node: fx.Node, moves: tuple[fx.Node, ...]) -> fx.Node:
        for move in reversed(moves):
            args = (node, *move.args[1:])
            node = emitter.call(move.target, *args, **move.kwargs)  # type: ignore[arg-type]
        product = self._product.node
        given, named = fx.node.map_arg(
            (product.args, dict(product.kwargs)), lambda n: node if n is self._operand else n
        )
        return emitter.call(product.target, *given, **named)  # type: ignore[arg-type]

    def _is_sum(self, node: fx.Node, moved: bool) -> bool:
        """Whether this is a sum whose terms have all keys; if it is moved, all of its shape."""
        if overload_packet(node) not in _SUMS or len(node.args) != 2:
            return False
        terms = node.args
        if not all(_is_tensor(t) for t in terms) or terms[0] is terms[1]:
            return False
        whole = shape_of(node)
        shapes = [shape_of(t) for t in terms]  # type: ignore[arg-type]
        if moved or any(len(shape) != len(whole) for shape in shapes):
            return all(shape == whole for shape in shapes)
        return all(shape[i] == whole[i] for shape in shapes for i in self._summed)

    def _scaled(self, node: fx.Node, moved: bool) -> fx.Node | None:
        """What this is a multiple of, by factors that do not vary along the keys."""
        packet = overload_packet(node)
        if packet is aten.neg:
            return node.args[0]  # type: ignore[return-value]
        if packet not in _SCALES or arguments(node).get("rounding_mode") is not None:
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
        if found is None or not self._rows_stay or not _weights_behind(found.base, self._known):
            return None
        of_matmul = overload_packet(self._product.node) in _MATMULS
        rank = len(shape_of(found.base)) + (found.cut is not None)
        return found if of_matmul and found.dim < rank - 2 else None

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
    given, packet = arguments(parts), overload_packet(parts)
    if packet is aten.unbind:
        return _one_of(given["self"], (parts, node), given["dim"], node.args[1])
    if packet not in _PIECES:
        return None
    base = given["self"]
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


def _laid_out(node: fx.Node) -> fx.Node | None:
    """What a node has in another layout, in the same precision."""
    before = moved_input(node)
    same = before is not None and before.meta["val"].dtype == node.meta["val"].dtype
    return before if same else None


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
    if packet in _SCALES | _SUMS:
        before = list(node.args[:2])
    elif packet in (aten.dropout, aten.neg):
        before = list(node.args[:1])
    else:
        selected = _selected(node)
        before = [moved_input(node) if selected is None else selected.base]
    return set().union(*(_weights_behind(n, known, depth - 1) for n in before))


# -- several values --------------------------------------------------------------------------------


class _Join:
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
        scaled = overload_packet(first) in _SCALES
        return scaled or moved_input(first) is not None or overload_packet(first) is aten.dropout
    return all(_laid_out(u) is not None and _says(u) == _says(first) for u in users)


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
