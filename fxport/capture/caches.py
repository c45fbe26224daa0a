"""What forward reads back from a cache right after it has written it is what it wrote.

Before                                          After
    copy_(slice(cache, 1, 0, T), k)
    keys = slice(cache, 1, 0, T)
    f(keys)                                         f(k)

Only where the last write before a use covers all that the use sees; of a part of that it reads the
same part of what was written. Writes to other parts (``cache[0]``, ``cache[1]``) do not count. Then
it does not matter what earlier calls have left in the cache; a write whose memory nothing else
needs goes. Where the cache stops a gradient (``detach``,
``torch.no_grad``), so does a `detach` of what was written.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.gradients import without_gradients
from fxport.capture.inputs import GraphInput
from fxport.capture.memory import Memory, changed_by, is_fresh, is_mutation

__all__ = ["drop_unread_writes", "read_what_was_written"]

aten = torch.ops.aten

_CUTS = (aten.slice.Tensor, aten.select.int)
# Their result is the first argument itself.
_SAME = (aten.detach.default, aten.alias.default, aten.copy_.default)


@dataclass(frozen=True)
class _Part:
    """``base[start : start + size, ..]`` along every dimension.

    Attributes:
        base: what the slices were cut from.
        starts, sizes: one per dimension of `base`; numbers or expressions in B and T.
        picked: dimensions of size 1 that a view of this part leaves out.
    """

    base: fx.Node
    starts: tuple[sympy.Expr, ...]
    sizes: tuple[sympy.Expr, ...]
    picked: frozenset[int]


def read_what_was_written(gm: fx.GraphModule) -> tuple[str, ...]:
    """Rewrites the graph in place; metadata is kept.

    Returns:
        Names of the inputs that are no longer written to: what they hold has no effect.
    """
    if not any(map(is_mutation, gm.graph.nodes)):
        return ()
    memory = Memory(gm.graph)
    inputs = gm.graph.find_nodes(op="placeholder")
    kept = [n for n in inputs if memory.written_by(n)]
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    uses = [
        (node, user)
        for node in gm.graph.nodes
        if memory.written_by(node) and (part := _part(node)) is not None and part.base is not node
        for user in list(node.users)
    ]
    for node, user in uses:
        _forward(gm, node, user, memory, order)
    drop_unread_writes(gm)
    memory = Memory(gm.graph)
    return tuple(_name(n) for n in kept if not memory.written_by(n))


def _name(node: fx.Node) -> str:
    source = node.meta.get("input")
    return source.name if isinstance(source, GraphInput) else node.name


def _forward(
    gm: fx.GraphModule, node: fx.Node, user: fx.Node, memory: Memory, order: dict[fx.Node, int]
) -> None:
    """Gives `user` what was written last where it sees `node`, if that is certain."""
    read = _part(node)
    if read is None or user.op != "call_function" or _is_cut(user):
        return
    if is_mutation(user) and node in changed_by(user):
        return  # it is written here; a mask made row by row has as many such writes as rows
    writes = [w for w in memory.written_by(node) if not _is_elsewhere(w, read)]
    if user in writes:
        return
    if not is_fresh(user) and any(order[w] > order[user] for w in writes):
        return  # a view, and what it shows changes later
    last = max((w for w in writes if order[w] < order[user]), key=order.__getitem__, default=None)
    written = None if last is None else _written(last)
    if last is None or written is None:
        return
    part, value = written
    cuts = _cuts(part, read)
    if cuts is None:
        return
    if memory.shared(value) is memory.shared(node):
        return  # the write may have changed what it read
    if any(order[w] > order[last] for w in memory.written_by(value)):
        return  # the cache has a copy of what the value was
    with gm.graph.inserting_before(user):
        if _stops_gradients(last, node):
            detached = gm.graph.call_function(aten.detach.default, (value,))
            detached.meta = dict(value.meta)
            value = detached
        kept = node.meta["val"].dtype
        if value.meta["val"].dtype != kept:
            narrower = value.meta["val"].to(kept)
            value = gm.graph.call_function(aten.to.dtype, (value, kept))
            value.meta = {**node.meta, "val": narrower}
        for dim, start, end in cuts:
            shown = value.meta["val"].narrow(dim, start, end - start)
            value = gm.graph.call_function(aten.slice.Tensor, (value, dim, start, end))
            value.meta = {**node.meta, "val": shown}
        user.replace_input_with(node, value)


def _stops_gradients(write: fx.Node, read: fx.Node) -> bool:
    """Whether none comes from what is read to what was written, other than in one step."""
    apart = set(_chain(arguments(write)["self"])).symmetric_difference(_chain(read))
    steps = {write, *apart}
    return any(n.target is aten.detach.default or without_gradients(n) for n in steps)


def _chain(node: fx.Node) -> list[fx.Node]:
    """A view, and what it shows, and so on."""
    found = [node]
    while _is_cut(node):
        node = arguments(_unbound(node) or node)["self"]
        found.append(node)
    return found


def _cuts(written: _Part, read: _Part) -> list[tuple[int, int, int]] | None:
    """The slices (dim, start, end) of what fills `written` that `read` sees; None: not only that.

    Sizes that are no plain numbers must be the same.
    """
    if (read.base, read.picked) != (written.base, written.picked):
        return None
    cuts = []
    kept = [d for d in range(len(read.sizes)) if d not in read.picked]
    for dim in range(len(read.sizes)):
        start, size = read.starts[dim] - written.starts[dim], read.sizes[dim]
        if start == 0 and size == written.sizes[dim]:
            continue
        plain = all(n.is_Integer for n in (start, size, written.sizes[dim]))
        if not plain or dim in read.picked or not 0 <= start <= written.sizes[dim] - size:
            return None
        cuts.append((kept.index(dim), int(start), int(start + size)))
    return cuts


def _is_elsewhere(write: fx.Node, read: _Part) -> bool:
    """Whether a write leaves all of what is read as it is."""
    parts = [_part(node) for node in changed_by(write)]
    return all(part is not None and _are_apart(part, read) for part in parts)


def _are_apart(one: _Part, other: _Part) -> bool:
    if one.base is not other.base:
        return False
    for dim in range(len(one.sizes)):
        ahead = other.starts[dim] - one.starts[dim]
        if (ahead - one.sizes[dim]).is_nonnegative or (-ahead - other.sizes[dim]).is_nonnegative:
            return True
    return False


def _written(write: fx.Node) -> tuple[_Part, fx.Node] | None:
    """The part that a plain copy fills, and with what."""
    if write.target is not aten.copy_.default:
        return None
    given = arguments(write)
    target, value = given["self"], given["src"]
    part = _part(target)
    if part is None or not isinstance(value, fx.Node) or shape_of(value) != shape_of(target):
        return None
    return part, value


def _is_cut(node: fx.Node) -> bool:
    return node.target in (*_CUTS, *_SAME) or _unbound(node) is not None


def _unbound(node: fx.Node) -> fx.Node | None:
    """``keys, values = cache`` takes rows of what this returns."""
    source = node.args[0] if node.target is operator.getitem else None
    if isinstance(source, fx.Node) and source.target is aten.unbind.int:
        return source
    return None


def _part(node: fx.Node) -> _Part | None:
    """Which part of which tensor a chain of slices shows."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if node.target in _SAME:
        return _part(arguments(node)["self"])
    if not _is_cut(node):
        sizes = tuple(map(sympy.sympify, shape_of(node)))
        return _Part(node, (sympy.Integer(0),) * len(sizes), sizes, frozenset())
    unbound = _unbound(node)
    given = arguments(unbound or node)
    outer = _part(given["self"])
    if outer is None:
        return None
    kept = [d for d in range(len(outer.sizes)) if d not in outer.picked]
    dim = kept[given["dim"] % len(kept)]
    is_slice = node.target is aten.slice.Tensor
    at = node.args[1] if unbound else given["start"] if is_slice else given["index"]
    first = _number(at, outer.sizes[dim])
    if first is None or (is_slice and given["step"] != 1):
        return None
    size = sympy.sympify(shape_of(node)[kept.index(dim)]) if is_slice else sympy.Integer(1)
    return _Part(
        outer.base,
        _with(outer.starts, dim, outer.starts[dim] + first),
        _with(outer.sizes, dim, size),
        outer.picked if is_slice else outer.picked | {dim},
    )


def _number(start: Any, size: sympy.Expr) -> sympy.Expr | None:
    """Where a slice begins, counted from the front."""
    if start is None:
        return sympy.Integer(0)
    if isinstance(start, fx.Node):
        value = start.meta.get("val")
        return value.node.expr if isinstance(value, torch.SymInt) else None
    return sympy.Integer(start) if start >= 0 else size + start


def _with(values: tuple[sympy.Expr, ...], dim: int, value: sympy.Expr) -> tuple[sympy.Expr, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def drop_unread_writes(gm: fx.GraphModule) -> None:
    """Erases the writes that the outputs do not depend on."""
    needed = Memory(gm.graph).needed(gm.graph)
    for node in reversed(list(gm.graph.nodes)):
        if is_mutation(node) and node not in needed and not node.users:
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
