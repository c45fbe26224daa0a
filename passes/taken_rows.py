"""Rows that are taken by their numbers, said with `select` and `slice`.

Before                                            After
    getitem(unbind(x, 1), T - 1)                      select(x, 1, -1)
    getitem(split_with_sizes(x, [T - 1, 1], 1), 1)    slice(x, 1, -1, end)
    getitem(split_with_sizes(table, [T, L - T]), 0)   slice(table, 0, 0, T)
    getitem(meshgrid([arange(B), arange(T)]), 1)      expand(arange(T), [B, T])
    select(flip(x, [1]), 1, 0)                        select(x, 1, -1)
    index_select(x, 1, tensor([T - 1]))               slice(x, 1, -1, end)
    gather(x, 1, full([B, 1, C], T - 1))              slice(x, 1, -1, end)
    index(x, [arange(B), full([B], T - 1)])           index(select(x, 1, -1), [arange(B)])
    gather(x, 1, arange(T) [B, T, C])                 x
    flip(flip(x, [1]), [1])                           x

The head looks for a choice of the last position, the analysis for rows that each token takes of
itself. The number of the row is derived from sizes (`one_number`); another one than the last, or
one counted from the front, stays as it is written.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of, takes_all
from fxport.capture.memory import Memory
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.views import overload_packet
from fxport.passes.graph_facts import erase_dead
from fxport.passes.masks.reach import is_plain_position
from fxport.passes.one_number import every_entry

__all__ = ["name_taken_rows"]

aten = torch.ops.aten

_END = sys.maxsize


def name_taken_rows(gm: fx.GraphModule) -> int:
    """Rewrites the graph in place; returns how many rows were named. What is written to stays."""
    memory = Memory(gm.graph)
    written = {node for node in gm.graph.nodes if memory.written_by(node)}
    named = 0
    for node in list(gm.graph.nodes):
        rule = _RULES.get(node.target if node.target is operator.getitem else overload_packet(node))
        if rule is None:
            continue
        emit = Emitter(gm, node, node.all_input_nodes)
        found = rule(node, emit)
        if found is None:
            continue
        read = {
            node,
            found,
            *node.all_input_nodes,
            *(n for m in emit.made for n in m.all_input_nodes),
        }
        if read & written:
            emit.undo()
            continue
        node.replace_all_uses_with(found)
        named += 1
    if named:
        erase_dead(gm)
        gm.recompile()
    return named


def _row(number: sympy.Expr | None, size: Any) -> int | None:
    """A row that is the last one whatever the size, or has a plain number; -1 is the last."""
    if number is None:
        return None
    if number in (size - 1, -1):
        return -1
    return int(number) if number.is_Integer and number >= 0 else None


def _one(emit: Emitter, x: fx.Node, dim: int, row: int | None, *, keep: bool) -> fx.Node | None:
    if row is None:
        return None
    if not keep:
        return emit.call(aten.select.int, x, dim, row)
    return emit.call(aten.slice.Tensor, x, dim, row, _END if row == -1 else row + 1)


# --- what falls into parts ---------------------------------------------------------------------


def _part(node: fx.Node, emit: Emitter) -> fx.Node | None:
    source, number = node.args
    if not isinstance(source, fx.Node):
        return None
    packet, part = overload_packet(source), every_entry(number)
    if packet is aten.meshgrid:
        return _of_grid(source, number, emit)
    if packet not in _PARTS or part is None:
        return None
    given = arguments(source)
    x: fx.Node = given["self"]
    dim = given["dim"] % len(shape_of(x))
    size = shape_of(x)[dim]
    sizes = given.get("split_sizes")
    if sizes and part == 0 and isinstance(sizes[0], fx.Node):
        return emit.call(aten.slice.Tensor, x, dim, 0, sizes[0])
    if isinstance(size, int):
        return None  # features: how many parts there are is known
    if packet is aten.unbind:
        return _one(emit, x, dim, _row(part, size), keep=False)
    if source.target is aten.split.Tensor:
        single = given["split_size"] == 1
        return _one(emit, x, dim, _row(part, size), keep=True) if single else None
    ends = _ends(source, given, size)
    last = ends is not None and part in (len(ends), -1) and ends[-1] == size - 1
    return _one(emit, x, dim, -1, keep=True) if last else None


def _of_grid(grid: fx.Node, number: Any, emit: Emitter) -> fx.Node | None:
    """One of the vectors, as often as the others are long; rows come first, or with "xy" last."""
    given = arguments(grid)
    vectors = given["tensors"]
    if type(number) is not int or any(len(shape_of(v)) != 1 for v in vectors):
        return None
    number %= len(vectors)
    order = list(range(len(vectors)))
    if given.get("indexing", "ij") == "xy":
        order[:2] = order[1::-1]
    found = vectors[number]
    for _ in range(order.index(number) + 1, len(order)):
        found = emit.call(aten.unsqueeze.default, found, -1)
    return emit.call(aten.expand.default, found, [_length(emit, vectors[i]) for i in order])


def _length(emit: Emitter, vector: fx.Node) -> Any:
    """The end of a range, not the range itself: that counts rows, and may go."""
    size = shape_of(vector)[0]
    if isinstance(size, int):
        return size
    end = arguments(vector).get("end") if overload_packet(vector) is aten.arange else None
    return end if every_entry(end) == size else emit.call(aten.sym_size.int, vector, 0)


def _ends(source: fx.Node, given: dict[str, Any], size: Any) -> list[sympy.Expr] | None:
    """Where all parts but the last end."""
    sizes = given.get("split_sizes")
    if sizes is None:
        indices = given.get("indices")
        if source.target is not aten.tensor_split.indices or not indices:
            return None
        found = [every_entry(i) for i in indices]
        if any(f is None for f in found):
            return None
        return [size + f if f.is_negative else f for f in found if f is not None]
    found = [every_entry(s) for s in sizes]
    if any(f is None for f in found):
        return None
    known = [f for f in found if f is not None]
    return [sympy.Add(*known[:i]) for i in range(1, len(known))]


_PARTS = (aten.unbind, aten.split, aten.split_with_sizes, aten.tensor_split)


# --- the other way round -----------------------------------------------------------------------


def _turned(x: Any) -> tuple[fx.Node, int] | None:
    """What is flipped along one axis, and which; slices of everything may stand between."""
    while isinstance(x, fx.Node) and x.target is aten.slice.Tensor and takes_all(x):
        x = arguments(x)["self"]
    if overload_packet(x) is not aten.flip:
        return None
    given = arguments(x)
    rank = len(shape_of(given["self"]))
    dims = {d % rank for d in given["dims"]}
    return (given["self"], dims.pop()) if len(dims) == 1 else None


def _of_flipped(node: fx.Node, emit: Emitter) -> fx.Node | None:
    given = arguments(node)
    turned = _turned(given["self"])
    if turned is None:
        return None
    x, dim = turned
    size = shape_of(x)[dim]
    if given["dim"] % len(shape_of(x)) != dim or isinstance(size, int):
        return None
    selects = node.target is aten.select.int
    if not selects and shape_of(node)[dim] != 1:
        return None
    first = every_entry(given["index"] if selects else given["start"] or 0)
    if first is None:
        return None
    row = _row(sympy.sympify(size) - 1 - first if not first.is_negative else -1 - first, size)
    return _one(emit, x, dim, row, keep=not selects)


def _flip(node: fx.Node, emit: Emitter) -> fx.Node | None:
    given = arguments(node)
    turned = _turned(given["self"])
    again = [d % len(shape_of(node)) for d in given["dims"]]
    return turned[0] if turned is not None and again == [turned[1]] else None


# --- index tensors -----------------------------------------------------------------------------


def _selected(node: fx.Node, emit: Emitter) -> fx.Node | None:
    given = arguments(node)
    x, index = given["self"], given["index"]
    dim = given["dim"] % len(shape_of(x))
    size = shape_of(x)[dim]
    if isinstance(size, int):
        return None
    if shape_of(index) == (size,) and is_plain_position(index):
        return x  # type: ignore[no-any-return]
    if shape_of(index) not in ((1,), ()):
        return None
    return _one(emit, x, dim, _row(every_entry(index), size), keep=True)


def _gathered(node: fx.Node, emit: Emitter) -> fx.Node | None:
    given = arguments(node)
    x, index = given["self"], given["index"]
    shape = shape_of(x)
    dim = given["dim"] % len(shape) if shape else 0
    others = [i for i in range(len(shape)) if i != dim]
    if isinstance(shape[dim], int) or any(shape_of(index)[i] != shape[i] for i in others):
        return None
    if shape_of(index)[dim] == shape[dim]:
        return x if _counts_along(index, dim) else None
    if shape_of(index)[dim] != 1:
        return None
    return _one(emit, x, dim, _row(every_entry(index), shape[dim]), keep=True)


def _counts_along(index: fx.Node, dim: int) -> bool:
    """Whether every entry is its own place along this axis: ``arange(T)[None, :, None]``."""
    while overload_packet(index) is not aten.arange:
        source = next(iter(index.all_input_nodes), None)
        packet = overload_packet(index)
        if source is None or index.meta["val"].dtype != torch.int64:
            return False
        if packet in (aten.expand, aten.expand_as, aten.broadcast_to):
            dim -= len(shape_of(index)) - len(shape_of(source))
            if dim < 0 or shape_of(source)[dim] != shape_of(index)[dim]:
                return False
        elif packet in (aten.view, aten.reshape, aten.unsqueeze):
            before, after = shape_of(source), shape_of(index)
            places = [i for i, s in enumerate(before) if s != 1]
            others = [s for i, s in enumerate(after) if i != dim]
            if len(places) != 1 or before[places[0]] != after[dim] or any(s != 1 for s in others):
                return False
            dim = places[0]
        elif packet not in (aten.to, aten.clone, aten.contiguous, aten.alias, aten.detach):
            return False
        index = source
    return dim == 0 and is_plain_position(index)


def _indexed(node: fx.Node, emit: Emitter) -> fx.Node | None:
    """``x[:, i]`` of one number, or ``x[rows, i]`` of the same number for every row."""
    given = arguments(node)
    x, indices = given["self"], list(given["indices"])
    used = [i for i, index in enumerate(indices) if index is not None]
    last = used[-1]
    size, shape = shape_of(x)[last], shape_of(indices[last])
    if isinstance(size, int) or indices[last].meta["val"].dtype == torch.bool:
        return None
    if len(used) == 1 and shape == (size,) and is_plain_position(indices[last]):
        return x  # type: ignore[no-any-return]
    row = _row(every_entry(indices[last]), size)
    if row is None:
        return None
    if len(used) == 1 and shape in ((1,), ()):
        return _one(emit, x, last, row, keep=shape == (1,))
    if len(used) != 2 or used[0] + 1 != last or shape != shape_of(indices[used[0]]):
        return None
    rest: Sequence[Any] = indices[: used[0] + 1]
    return emit.call(aten.index.Tensor, emit.call(aten.select.int, x, last, row), list(rest))


_RULES: dict[Any, Callable[[fx.Node, Emitter], fx.Node | None]] = {
    operator.getitem: _part,
    aten.select: _of_flipped,
    aten.slice: _of_flipped,
    aten.flip: _flip,
    aten.index_select: _selected,
    aten.gather: _gathered,
    aten.index: _indexed,
}
