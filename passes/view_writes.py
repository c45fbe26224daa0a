"""Replaces a write into a part of a tensor by a tensor made of the parts.

Before                                      After
    x = stack(..)              [4, B, T, C]     x = stack(..)
    part = slice(x, 0, 1, 4)   [3, B, T, C]     part = slice(x, 0, 1, 4)
    add_(part, z)                               new = add(part, z)
                                                y = cat([slice(x, 0, 0, 1), new], 0)
    f(part), g(x)                               f(new), g(y)

    flat = view(x, [-1, C])    [B * T, C]       flat = view(x, [-1, C])
    index_put_(flat, [mask], z)                 new = index_put(flat, [mask], z)
    g(x)                                        g(view(new, [B, T, C]))

Sound only while nothing else that may show the part is read afterwards: every view on the way from
the tensor to the part gets its new value, as does what shows all of one of them in another shape;
other views made before may not be used again.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.memory import Memory, is_fresh
from fxport.passes.attention.emit import Emitter

__all__ = ["PartOf", "Reshaped", "apart", "drop_ways_back", "parts_above", "write_parts"]

aten = torch.ops.aten

# Their results share no memory with each other.
_SPLITS = {
    aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default,
    aten.unbind.int, aten.tensor_split.sections, aten.tensor_split.indices,
}  # fmt: skip


@dataclass(frozen=True)
class PartOf:
    """A view that shows entries `start` to `end` of one axis of another tensor.

    Attributes:
        whole: the other tensor.
        drops: whether the axis is gone, as after ``x[0]``.
    """

    view: fx.Node
    whole: fx.Node
    dim: int
    start: int
    end: int
    drops: bool


@dataclass(frozen=True)
class Reshaped:
    """A view and another tensor that show the same, in two shapes."""

    view: fx.Node
    whole: fx.Node


def parts_above(view: fx.Node, mutation: fx.Node) -> list[PartOf | Reshaped] | None:
    """The parts that must be written anew with `view`; None where others may see the change.

    Innermost first, and what shows all of such a part in another shape. Empty where nothing but
    `view` itself is read after `mutation`.
    """
    memory = Memory(mutation.graph)
    place = memory.shared(view)
    shared = [n for n in mutation.graph.nodes if memory.shared(n) is place and n is not view]
    if any(n.op != "call_function" for n in (view, *shared)):
        return None
    read_later = [
        n
        for n in shared
        if n < mutation and any(mutation < u for u in n.users) and not apart(n, view)
    ]
    found: list[PartOf | Reshaped] = []
    above, shown = view, {view}
    while read_later:
        beside = next((p for n in read_later if (p := _beside(n, shown)) is not None), None)
        part = beside or _part(above)
        if part is None:
            return None
        if beside is None:
            above = part.whole
        found.append(part)
        shown.add(part.whole)
        read_later = [n for n in read_later if n is not part.whole]
    return found


def _beside(node: fx.Node, shown: set[fx.Node]) -> Reshaped | None:
    """`node` as all of a tensor that is made anew, in another shape."""
    if node.target is not aten.view.default or arguments(node)["self"] not in shown:
        return None
    return Reshaped(arguments(node)["self"], node)


def _part(view: fx.Node) -> PartOf | Reshaped | None:
    if view.target is aten.view.default:
        return Reshaped(view, arguments(view)["self"])
    if view.target not in (aten.slice.Tensor, aten.select.int):
        return None
    given = arguments(view)
    whole = given["self"]
    dim = given["dim"] % len(shape_of(whole))
    size = shape_of(whole)[dim]
    if not isinstance(size, int):
        return None
    if view.target is aten.select.int:
        index = given["index"]
        if not isinstance(index, int):
            return None
        start = range(size)[index]
        return PartOf(view, whole, dim, start, start + 1, drops=True)
    start, end = given["start"] or 0, size if given["end"] is None else given["end"]
    if not isinstance(start, int) or not isinstance(end, int) or given["step"] != 1:
        return None
    kept = range(size)[start:end]
    return PartOf(view, whole, dim, kept.start, kept.stop, drops=False) if len(kept) else None


def write_parts(
    gm: fx.GraphModule,
    view: fx.Node,
    new: fx.Node,
    parts: list[PartOf | Reshaped],
    mutation: fx.Node,
) -> None:
    """Makes every tensor above a written view anew, for those who read it after `mutation`.

    Args:
        new: what `view` holds now.
    """
    # Sizes of inputs first: no size then keeps what was there before the write.
    inputs = [n for n in gm.graph.find_nodes(op="placeholder") if _is_tensor(n)]
    emitter = Emitter(gm, mutation, [*inputs, new, *(part.whole for part in parts)])
    made = {view: new}
    for part in parts:
        made[part.whole] = _around(emitter, part, made[part.view])
        for user in list(part.whole.users):
            if mutation < user:
                user.replace_input_with(part.whole, made[part.whole])


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _around(emitter: Emitter, part: PartOf | Reshaped, new: fx.Node) -> fx.Node:
    """The tensor that `part` is a view of, made of what the view holds now."""
    if isinstance(part, Reshaped):
        shape = emitter.sizes(shape_of(part.whole))
        return emitter.call(aten.view.default, new, shape)
    dim, size = part.dim, shape_of(part.whole)[part.dim]
    if part.drops:
        new = emitter.call(aten.unsqueeze.default, new, dim)
    pieces = [new]
    if part.start > 0:
        pieces.insert(0, emitter.call(aten.slice.Tensor, part.whole, dim, 0, part.start))
    if part.end < size:
        pieces.append(emitter.call(aten.slice.Tensor, part.whole, dim, part.end, size))
    return pieces[0] if len(pieces) == 1 else emitter.call(aten.cat.default, pieces, dim)


_VIEWED = (aten.view.default,)
_SHAPED = (*_VIEWED, aten.reshape.default, aten.flatten.using_ints)  # these may copy


def drop_ways_back(graph: fx.Graph) -> None:
    """A tensor that is viewed in another shape and back is the tensor itself.

    So is one that was copied on the way, if nobody writes to any of the three.
    """
    memory = Memory(graph)
    for node in [n for n in graph.nodes if n.target in _SHAPED]:
        there = arguments(node)["self"]
        if there.target not in _SHAPED:
            continue
        source = arguments(there)["self"]
        views = node.target in _VIEWED and there.target in _VIEWED
        unwritten = not any(map(memory.written_by, (node, there, source)))
        if shape_of(source) == shape_of(node) and (views or unwritten):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def apart(one: fx.Node, other: fx.Node) -> bool:
    """Whether two views show different pieces of a tensor that was split."""
    pieces = dict(_pieces(one))
    return any(source in pieces and pieces[source] != index for source, index in _pieces(other))


def _pieces(view: fx.Node) -> Iterator[tuple[fx.Node, int]]:
    """(split, which piece) for every split on the way to a view."""
    node: fx.Node | None = view
    while node is not None and not (node.op == "call_function" and is_fresh(node)):
        source = next(iter(node.all_input_nodes), None)
        if node.target is operator.getitem and source is not None and source.target in _SPLITS:
            yield source, cast(int, node.args[1]) % len(source.meta["val"])
        node = source
