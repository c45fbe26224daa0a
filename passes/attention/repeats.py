"""Repeated heads by indexing or concatenation, as the repetition that they are.

    index_select(k, 1, [0, 0, 1, 1])                    repeat_interleave(k, 2, 1)
    k[:, tensor([0, 1, 0, 1])]                    ->    repeat(k, [1, 2, 1, 1])
    cat([k[:, :1], k[:, :1], k[:, 1:], k[:, 1:]], 1)    repeat_interleave(k, 2, 1)
    stack([k, k], 2)                                    expand(unsqueeze(k, 2), [-1, -1, 2, ..])

The values are the same to the last bit. Only indices that the code itself spells out count: a
registered buffer may change.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.views import overload_packet
from fxport.passes.graph_facts import GraphFacts, Source, erase_if_unused
from fxport.passes.masks.values import constant_value

__all__ = ["spell_out_repeats"]

aten = torch.ops.aten

_MAX_HEADS = 1024  # longer index lists are no heads
_CANDIDATES = {aten.index, aten.index_select, aten.cat, aten.concat, aten.stack}
# Which entries of a value's dimension a node is, one after the other.
_Entries = tuple[fx.Node, list[int]]


def spell_out_repeats(gm: fx.GraphModule) -> None:
    """Replaces what is certainly a repetition along one dimension."""
    candidates = [n for n in gm.graph.nodes if overload_packet(n) in _CANDIDATES]
    if not candidates:
        return
    facts = GraphFacts(gm)
    for node in candidates:
        if not isinstance(node.meta.get("val"), torch.Tensor) or node.meta["val"].dim() < 3:
            continue
        if not node.meta["val"].is_floating_point() or _is_written(facts, node):
            continue
        emitter = Emitter(gm, node, [node])
        new = _stacked_whole(emitter, node) or _repetition(emitter, facts, node)
        if new is not None:
            node.replace_all_uses_with(new)
            erase_if_unused(gm, [node])


def _is_written(facts: GraphFacts, node: fx.Node) -> bool:
    """A copy may be written into; a view of the original must not be."""
    return bool(facts.source(node) & Source.MUTATED)


def _stacked_whole(emitter: Emitter, node: fx.Node) -> fx.Node | None:
    if overload_packet(node) is not aten.stack:
        return None
    given = arguments(node)
    tensors = given["tensors"]
    if len(tensors) < 2 or any(t is not tensors[0] for t in tensors):
        return None
    rank = node.meta["val"].dim()
    dim = given["dim"] % rank
    sizes = [len(tensors) if i == dim else -1 for i in range(rank)]
    single = emitter.call(aten.unsqueeze.default, tensors[0], dim)
    return emitter.call(aten.expand.default, single, sizes)


def _repetition(emitter: Emitter, facts: GraphFacts, node: fx.Node) -> fx.Node | None:
    found = _indexed(facts, node) or _joined(node)
    if found is None:
        return None
    (base, entries), dim = found
    first, size = min(entries), max(entries) + 1 - min(entries)
    if len(entries) % size or len(entries) > _MAX_HEADS:
        return None
    entries = [e - first for e in entries]
    if size != len(entries) and size != shape_of(base)[dim]:
        base = emitter.call(aten.slice.Tensor, base, dim, first, first + size)
    copies = len(entries) // size
    if entries == [i for i in range(size) for _ in range(copies)]:
        if copies == 1:
            return None  # everything, once: a copy, not a repetition
        return emitter.call(aten.repeat_interleave.self_int, base, copies, dim)
    if entries == list(range(size)) * copies:
        repeats = [copies if i == dim else 1 for i in range(node.meta["val"].dim())]
        return emitter.call(aten.repeat.default, base, repeats)
    return None


def _indexed(facts: GraphFacts, node: fx.Node) -> tuple[_Entries, int] | None:
    packet = overload_packet(node)
    given = arguments(node)
    if packet is aten.index_select:
        dim, index = given["dim"], given["index"]
    elif packet is aten.index:
        places = [(i, x) for i, x in enumerate(given["indices"]) if x is not None]
        if len(places) != 1:
            return None
        dim, index = places[0]
    else:
        return None
    base = given["self"]
    value = index.meta["val"]
    source = facts.source(index)
    if value.dim() != 1 or value.dtype not in (torch.int64, torch.int32):
        return None
    if source & ~Source.BUFFER or (source and not facts.only_lifted(index)):
        return None
    if not isinstance(value.shape[0], int) or value.shape[0] > _MAX_HEADS:
        return None
    dim %= base.meta["val"].dim()
    size = shape_of(base)[dim]
    try:
        entries = constant_value(index, {}).tolist()
    except ValueError:  # a size enters it
        return None
    if not isinstance(size, int):
        return None
    return (base, [e % size for e in entries]), dim


def _joined(node: fx.Node) -> tuple[_Entries, int] | None:
    """Pieces of one tensor along the dimension in which they are joined."""
    packet = overload_packet(node)
    if packet not in (aten.cat, aten.concat, aten.stack):
        return None
    given = arguments(node)
    if not isinstance(given["dim"], int):
        return None
    dim = given["dim"] % node.meta["val"].dim()
    take = _selected if packet is aten.stack else _sliced
    pieces = [take(t, dim) for t in given["tensors"]]
    bases = {p[0] for p in pieces if p is not None}
    if len(pieces) < 2 or None in pieces or len(bases) != 1:
        return None
    return (bases.pop(), [e for p in pieces if p is not None for e in p[1]]), dim


def _sliced(node: fx.Node, dim: int) -> _Entries | None:
    """The value that slices were cut from, and which part of it along `dim` they are."""
    if dim >= len(shape_of(node)):
        return None  # a tensor without elements may be joined whatever its rank: a new cache
    size = shape_of(node)[dim]
    first = 0
    while overload_packet(node) in (aten.slice, aten.alias):
        if overload_packet(node) is aten.alias:  # a slice of everything
            node = node.args[0]  # type: ignore[assignment]
            continue
        given: dict[str, Any] = arguments(node)
        base, start = given["self"], given["start"] or 0
        along, whole = given["dim"] % len(shape_of(node)), shape_of(given["self"])[dim]
        if along == dim:
            if given["step"] != 1 or not isinstance(start, int) or not isinstance(whole, int):
                break
            first += max(start + whole, 0) if start < 0 else start
        elif shape_of(base) != shape_of(node) or given["step"] != 1:
            break
        node = base
    return (node, list(range(first, first + size))) if isinstance(size, int) else None


def _selected(node: fx.Node, dim: int) -> _Entries | None:
    if overload_packet(node) is aten.select:
        given = arguments(node)
        base, index = given["self"], given["index"]
    elif node.target is operator.getitem and overload_packet(node.args[0]) is aten.unbind:
        unbound, index = node.args
        assert isinstance(unbound, fx.Node)
        given = arguments(unbound)
        base = given["self"]
    else:
        return None
    rank = len(shape_of(base))
    if dim >= rank or given["dim"] % rank != dim or not isinstance(index, int):
        return None
    found = _sliced(base, dim)
    return (found[0], [found[1][index]]) if found is not None else None
