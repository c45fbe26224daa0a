"""Keys and values in several parts, as the whole that they are parts of.

Before                                               After
    s = cat([q @ k1.mT * c, q @ k2.mT * c], -1)          s = q @ cat([k1.mT, k2.mT], -1) * c
    w = softmax(s, -1)                                   w = softmax(s, -1)
    o = w[..., :n] @ v1 + w[..., n:] @ v2                o = w @ cat([v1, v2], -2)

Masks on single parts become one, which forbids nothing in the others. Where no attention comes of
it, everything is put back as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of, shape_of_tensor
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.layout import Size, is_one
from fxport.passes.attention.products import Product, as_product
from fxport.passes.attention.respelled import Respelled
from fxport.passes.attention.site import Left
from fxport.passes.attention.softmax import is_softmax_call
from fxport.passes.attention.views import (
    SCALES,
    is_pointwise,
    moved_input,
    number,
    overload_packet,
)
from fxport.passes.constants import is_symbolic
from fxport.passes.graph_facts import GraphFacts, Source

__all__ = ["join_scores", "join_values"]

aten = torch.ops.aten

_LISTS = {aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split}
_CUTS = {aten.slice, aten.narrow}
_MAX_STEPS = 8  # between scores and their softmax


class _Other(Exception):
    """These are no parts of one product."""


# -- scores ----------------------------------------------------------------------------------------


def join_scores(gm: fx.GraphModule, facts: GraphFacts) -> list[Respelled]:
    """Changes the graph in place: scores that are concatenated, of one query."""
    found = []
    for node in [n for n in gm.graph.nodes if overload_packet(n) is aten.cat]:
        given = arguments(node)
        last = len(shape_of(node)) - 1
        weights = _softmax_after(node) if given["dim"] % (last + 1) == last else None
        if weights is None or len(given["tensors"]) < 2:
            continue
        emitter = Emitter(gm, node, [n for part in given["tensors"] for n in _read_by(part)])
        taken: list[fx.Node] = []
        try:
            new = _whole(emitter, list(given["tensors"]), taken)
        except (_Other, Left):
            emitter.undo()
            continue
        found += _put(gm, facts, emitter, node, new, taken, {weights})
    return found


def _read_by(part: fx.Node) -> list[fx.Node]:
    """What a part is made of, masks first: it stays, whatever becomes of the part."""
    if overload_packet(part) is aten.masked_fill:
        return [arguments(part)["mask"], *_read_by(part.args[0])]  # type: ignore[arg-type]
    if overload_packet(part) in SCALES:
        return _read_by(part.args[0]) if isinstance(part.args[0], fx.Node) else []
    product = as_product(part)
    return [product.left, product.right] if product is not None else []


def _softmax_after(node: fx.Node) -> fx.Node | None:
    """The softmax over the last dimension that scores lead to."""
    for _ in range(_MAX_STEPS):
        users = [u for u in node.users if is_softmax_call(u)]
        if users:
            along = arguments(users[0])["dim"] % len(shape_of(node))
            return users[0] if along == len(shape_of(node)) - 1 else None
        follows = [u for u in node.users if moved_input(u) is node or is_pointwise(u)]
        if not follows:
            return None
        node = follows[0]
    return None


def _whole(emitter: Emitter, parts: list[fx.Node], taken: list[fx.Node]) -> fx.Node:
    """The scores whose parts along the last dimension these are.

    Raises:
        _Other: they are no scores of one query, treated alike.
    """
    taken += parts
    if any(overload_packet(part) is aten.masked_fill for part in parts):
        return _filled(emitter, parts, taken)
    first = parts[0]
    if overload_packet(first) in SCALES:
        if any(p.target is not first.target or not _alike(p, first) for p in parts):
            raise _Other
        whole = _whole(emitter, [_tensor(p.args[0]) for p in parts], taken)
        return emitter.call(first.target, whole, *first.args[1:], **first.kwargs)  # type: ignore[arg-type]
    return _one_product(emitter, parts)


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two factors are one number, or one tensor with a single entry."""
    a, b = one.args[1], other.args[1]
    if one.kwargs != other.kwargs:
        return False
    if isinstance(a, fx.Node):
        value = a.meta["val"]
        whole = not isinstance(value, torch.Tensor) or all(map(is_one, shape_of(a)))
        return a is b and whole
    return number(a) is not None and a == b


def _tensor(value: object) -> fx.Node:
    if not isinstance(value, fx.Node) or is_symbolic(value):
        raise _Other
    return value


def _filled(emitter: Emitter, parts: list[fx.Node], taken: list[fx.Node]) -> fx.Node:
    fills = [p for p in parts if overload_packet(p) is aten.masked_fill]
    values = {number(arguments(p)["value"]) for p in fills}
    masks = [_tensor(arguments(p)["mask"]) for p in fills]
    if len(values) != 1 or None in values:
        raise _Other
    (value,) = values
    inner = [_tensor(p.args[0]) if p in fills else p for p in parts]
    if any(shape_of(a) != shape_of(b) for a, b in zip(inner, parts, strict=True)):
        raise _Other
    whole = _whole(emitter, inner, taken)
    lead = _lead([shape_of(m)[:-1] for m in masks])
    columns = []
    for part in parts:
        shape = (*lead, shape_of(part)[-1])
        if part not in fills:
            sizes = emitter.sizes(shape)
            columns.append(emitter.call(aten.new_zeros.default, masks[0], sizes))
            continue
        columns.append(_expanded(emitter, arguments(part)["mask"], shape))
    mask = emitter.call(aten.cat.default, columns, -1)
    return emitter.call(aten.masked_fill.Scalar, whole, mask, value)


def _one_product(emitter: Emitter, parts: Sequence[fx.Node]) -> fx.Node:
    products = [_plain(part) for part in parts]
    first = products[0]
    label = first.labels[2][-1]
    if not _are_alike(products) or any(p.left is not first.left for p in products):
        raise _Other
    if label in first.labels[0]:
        raise _Other
    return _with(emitter, first, first.left, _joined(emitter, products, label))


# -- values ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """``base[.., start : start + size, ..]`` along `dim`.

    Attributes:
        nodes: what it is taken with.
    """

    base: fx.Node
    dim: int
    start: Size
    size: Size
    nodes: tuple[fx.Node, ...]


_WeightsOf: TypeAlias = Callable[[fx.Node], set[fx.Node]]


def join_values(gm: fx.GraphModule, facts: GraphFacts, behind: _WeightsOf) -> list[Respelled]:
    """Changes the graph in place: sums of products of parts of the same weights with values.

    Args:
        behind: the results of softmaxes that a value is made of.
    """
    found = []
    for node in [n for n in gm.graph.nodes if overload_packet(n) is aten.add]:
        emitter = Emitter(gm, node, [n for term in node.all_input_nodes for n in _values_of(term)])
        taken = [node]
        try:
            new, weights = _sum(emitter, node, taken, behind)
        except (_Other, Left):
            emitter.undo()
            continue
        found += _put(gm, facts, emitter, node, new, taken, weights)
    return found


def _values_of(term: fx.Node) -> list[fx.Node]:
    """The values in a sum of products."""
    if overload_packet(term) is aten.add:
        return [n for inner in term.all_input_nodes for n in _values_of(inner)]
    product = as_product(term)
    if product is None:
        return []
    return [product.right if _part(product.left) is not None else product.left]


def _sum(
    emitter: Emitter, node: fx.Node, taken: list[fx.Node], behind: _WeightsOf
) -> tuple[fx.Node, set[fx.Node]]:
    """The product with all values that a sum of products is, and the weights in it.

    Raises:
        _Other: it is none.
    """
    products = [_plain(term) for term in _terms(node, taken)]
    parts = _in_order([_weights_first(p) for p in products])
    first, part = parts[0]
    weights = behind(part.base)
    label = first.labels[0][part.dim]
    if not weights or not _are_alike([p for p, _ in parts]) or label in first.labels[2]:
        raise _Other
    for product, piece in parts:
        taken += [product.node, *piece.nodes]
    values = _joined(emitter, [p for p, _ in parts], label)
    return _with(emitter, first, part.base, values), weights


def _terms(node: fx.Node, taken: list[fx.Node]) -> Iterator[fx.Node]:
    for term in node.args[:2]:
        inner = _tensor(term)
        if overload_packet(inner) is aten.add and len(inner.users) == 1:
            taken.append(inner)
            yield from _terms(inner, taken)
        else:
            yield inner
    if number(arguments(node)["alpha"]) != 1:
        raise _Other


def _weights_first(product: Product) -> tuple[Product, _Part]:
    part = _part(product.left)
    if part is not None:
        return product, part
    part = _part(product.right)
    if part is None:
        raise _Other
    a, b, out = product.labels
    swapped = replace(product, left=product.right, right=product.left, labels=(b, a, out))
    return swapped, part


def _part(node: fx.Node) -> _Part | None:
    """The part of a value that a node is, if it is one."""
    if overload_packet(node) in _CUTS:
        given = arguments(node)
        base, start, step = given["self"], given["start"] or 0, given.get("step", 1)
        dim = given["dim"] % len(shape_of(node))
        if isinstance(start, fx.Node):
            start = start.meta["val"]
        first = start if isinstance(start, int) else start.node.expr
        if isinstance(start, int) and start < 0:
            first = shape_of(base)[dim] + start
        nodes = [node]
        while overload_packet(base) is aten.slice and shape_of(base) == shape_of(base.args[0]):
            nodes.append(base)  # ``w[:, :, :, n:]`` begins with slices of everything
            base = base.args[0]
        return _Part(base, dim, first, shape_of(node)[dim], tuple(nodes)) if step == 1 else None
    pieces = node.args[0] if node.target is operator.getitem else None
    if overload_packet(pieces) not in _LISTS or not isinstance(pieces, fx.Node):
        return None
    given = arguments(pieces)
    dim = given["dim"] % len(shape_of(node))
    index = node.args[1]
    assert isinstance(index, int)
    before = [shape_of_tensor(v)[dim] for v in pieces.meta["val"]]
    start = sum(before[: index % len(before)])
    return _Part(given["self"], dim, start, shape_of(node)[dim], (pieces, node))


def _in_order(found: list[tuple[Product, _Part]]) -> list[tuple[Product, _Part]]:
    """The parts one after the other, if together they are the whole.

    Raises:
        _Other: they are not.
    """
    base, dim = found[0][1].base, found[0][1].dim
    at: Size = 0
    ordered = []
    for _ in found:
        here = [(p, part) for p, part in found if part.start == at]
        if len(here) != 1 or here[0][1].base is not base or here[0][1].dim != dim:
            raise _Other
        ordered += here
        at = at + here[0][1].size
    if len(found) < 2 or at != shape_of(base)[dim]:
        raise _Other
    return ordered


# -- both ------------------------------------------------------------------------------------------


def _put(
    gm: fx.GraphModule,
    facts: GraphFacts,
    emitter: Emitter,
    node: fx.Node,
    new: fx.Node,
    taken: Sequence[fx.Node],
    weights: set[fx.Node],
) -> list[Respelled]:
    """The one result in place of `node` and of all that was `taken` for it; else as it was."""
    if not _same(new, node) or not _undisturbed(facts, taken, node):
        emitter.undo()
        return []
    facts.add(emitter.made, node)
    done = Respelled(weights)
    done.put(node, new)
    done.take_out(gm, sorted({node, *taken}), emitter.made)
    return [done]


def _plain(node: fx.Node) -> Product:
    product = as_product(node)
    if product is None or product.added is not None or product.alpha != 1:
        raise _Other
    if product.left is product.right or overload_packet(node) is aten.sum:
        raise _Other
    return product


def _with(emitter: Emitter, product: Product, left: fx.Node, right: fx.Node) -> fx.Node:
    """The product with other operands."""
    new = {product.left: left, product.right: right}
    args, kwargs = fx.node.map_arg(
        (product.node.args, dict(product.node.kwargs)), lambda n: new.get(n, n)
    )
    return emitter.call(product.node.target, *args, **kwargs)  # type: ignore[arg-type]


def _are_alike(products: Sequence[Product]) -> bool:
    """Whether these are one operation, but for dimensions of the batch that the right may lack."""
    widest = max((p.labels[1] for p in products), key=len)
    return all(
        p.node.target is products[0].node.target
        and p.labels[::2] == products[0].labels[::2]
        and p.labels[1] == widest[len(widest) - len(p.labels[1]) :]
        for p in products
    )


def _joined(emitter: Emitter, products: Sequence[Product], label: str) -> fx.Node:
    """The right operands end to end, one for all entries of the batch repeated for each."""
    tensors = [p.right for p in products]
    widest = max((p.labels[1] for p in products), key=len)
    dim = widest.index(label) - len(widest)
    shapes = [shape_of(t) for t in tensors]
    if len({t.meta["val"].dtype for t in tensors}) != 1 or min(map(len, shapes)) < -dim:
        raise _Other
    own = [s[dim] for s in shapes]
    rest = _lead([(*s[:dim], 1, *s[len(s) + dim + 1 :]) for s in shapes])
    dim += len(rest)
    wanted = [(*rest[:dim], size, *rest[dim + 1 :]) for size in own]
    whole = [_expanded(emitter, t, shape) for t, shape in zip(tensors, wanted, strict=True)]
    return emitter.call(aten.cat.default, whole, dim)


def _lead(shapes: Sequence[tuple[Size, ...]]) -> tuple[Size, ...]:
    """The shape to which all of these broadcast.

    Raises:
        _Other: there is none.
    """
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(s)) + s for s in shapes]
    found = []
    for sizes in zip(*padded, strict=True):
        several = {s for s in sizes if not is_one(s)}
        if len(several) > 1:
            raise _Other
        found.append(several.pop() if several else 1)
    return tuple(found)


def _expanded(emitter: Emitter, tensor: fx.Node, shape: tuple[Size, ...]) -> fx.Node:
    if shape_of(tensor) == shape:
        return tensor
    return emitter.call(aten.expand.default, tensor, emitter.sizes(shape))


def _same(new: fx.Node, old: fx.Node) -> bool:
    a, b = new.meta["val"], old.meta["val"]
    return shape_of(new) == shape_of(old) and bool(a.dtype == b.dtype)


def _undisturbed(facts: GraphFacts, taken: Sequence[fx.Node], result: fx.Node) -> bool:
    """Operands are read at the result now, under its autograd."""
    read = {n for node in taken for n in (node, *node.all_input_nodes) if not is_symbolic(n)}
    tensors = [n for n in read if isinstance(n.meta.get("val"), torch.Tensor)]
    written = any(Source.MUTATED in facts.source(n) for n in tensors)
    return not written and facts.grad_switched([*taken], result) is None
