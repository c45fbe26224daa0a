"""Replaces a fresh tensor that is written piece by piece with the pieces, joined.

Before                                      After
    k = new_empty(x, [B, H, T, 48])
    copy_(slice(k, 3, 0, 32), a)
    copy_(slice(k, 3, 32, 48), b)
    f(k)                                        f(cat([a, b], 3))

    y = empty_like(x)
    copy_(slice(y, 3, 0, None, 2), a)
    copy_(slice(y, 3, 1, None, 2), b)
    f(y)                                        f(flatten(stack([a, b], 4), 3, 4))

    kv = zeros([2, B, T, C])
    copy_(select(kv, 0, 0), a)
    copy_(select(kv, 0, 1), b)
    f(kv)                                       f(cat([a[None], b[None]], 0))

Only where the pieces cover one axis exactly and in full, one after the other or in turns, before
anything reads the tensor: then what it held at first does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.memory import is_fresh, is_mutation
from fxport.passes.attention.emit import Emitter

__all__ = ["join_written_pieces"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Piece:
    """``base[..., rows] = source`` along `dim`, or the one row of it that was selected."""

    view: fx.Node
    write: fx.Node
    source: fx.Node
    dim: int
    rows: range


def join_written_pieces(gm: fx.GraphModule) -> int:
    """Rewrites the graph in place.

    Returns:
        How many tensors were replaced.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    writes = [n for n in order if is_mutation(n)]
    bases = dict.fromkeys(
        base for n in writes if n.target is aten.copy_.default and (base := _base(n)) is not None
    )
    return sum(_join(gm, base, order, writes) for base in bases)


def _join(
    gm: fx.GraphModule, base: fx.Node, order: dict[fx.Node, int], writes: list[fx.Node]
) -> bool:
    pieces = _pieces(base)
    if not _cover(pieces, shape_of(base)) or not isinstance(base.meta["val"], FakeTensor):
        return False
    first, last = (f(pieces, key=lambda p: order[p.write]).write for f in (min, max))
    own = {p.write for p in pieces} | {p.view for p in pieces}
    if any(order[user] < order[last] for user in base.users if user not in own):
        return False
    # A source that is written to in between would be read too late; and all pieces have a
    # gradient, or none.
    switches = [n for n in order if n.target is torch._C._set_grad_enabled]
    inside = [w for w in (*writes, *switches) if order[first] < order[w] < order[last]]
    if any(w not in own for w in inside):
        return False
    joined = _joined(Emitter(gm, last, [base]), pieces)
    base.replace_all_uses_with(joined, lambda user: user not in own)
    for piece in pieces:
        gm.graph.erase_node(piece.write)
        gm.graph.erase_node(piece.view)
    gm.graph.erase_node(base)
    return True


def _joined(emitter: Emitter, pieces: list[_Piece]) -> fx.Node:
    dim, sources = pieces[0].dim, [_with_dim(emitter, p) for p in pieces]
    if pieces[0].rows.step == 1:
        return emitter.call(aten.cat.default, sources, dim)
    in_turns = emitter.call(aten.stack.default, sources, dim + 1)
    return emitter.call(aten.flatten.using_ints, in_turns, dim, dim + 1)


def _with_dim(emitter: Emitter, piece: _Piece) -> fx.Node:
    """The source, with the dimension that was selected from."""
    if piece.view.target is aten.slice.Tensor:
        return piece.source
    return emitter.call(aten.unsqueeze.default, piece.source, piece.dim)


_PARTS = (aten.slice.Tensor, aten.select.int)


def _base(write: fx.Node) -> fx.Node | None:
    """The fresh tensor that a part written to is a view of."""
    view = arguments(write)["self"]
    if not isinstance(view, fx.Node) or view.target not in _PARTS:
        return None
    base = arguments(view)["self"]
    is_own = isinstance(base, fx.Node) and base.op == "call_function" and is_fresh(base)
    return base if is_own else None


def _pieces(base: fx.Node) -> list[_Piece]:
    """What is written into `base`, in the order of what it covers."""
    pieces = [p for view in base.users if (p := _piece(base, view)) is not None]
    return sorted(pieces, key=lambda p: p.rows.start)


def _piece(base: fx.Node, view: fx.Node) -> _Piece | None:
    if view.target not in _PARTS or len(view.users) != 1:
        return None
    (write,) = view.users
    if write.target is not aten.copy_.default or write.users:
        return None
    bound, given = arguments(write), arguments(view)
    source = bound["src"]
    if bound["self"] is not view or not isinstance(source, fx.Node):
        return None
    same_type = source.meta["val"].dtype == view.meta["val"].dtype
    dim = given["dim"] % len(shape_of(base))
    rows = _rows(given, shape_of(base)[dim])
    if not same_type or shape_of(source) != shape_of(view) or rows is None:
        return None
    return _Piece(view, write, source, dim, rows)


def _rows(given: dict[str, Any], size: Any) -> range | None:
    if "index" in given:
        index = given["index"]
        fixed = isinstance(size, int) and isinstance(index, int)
        return range(index % size, index % size + 1) if fixed else None
    start, end, step = given["start"] or 0, given["end"], given["step"]
    known = all(isinstance(n, int) for n in (size, start, 0 if end is None else end, step))
    return range(size)[start:end:step] if known else None


def _cover(pieces: list[_Piece], shape: tuple[Any, ...]) -> bool:
    """One after the other along one axis, from its first entry to its last; or in turns."""
    if len(pieces) < 2 or len({p.dim for p in pieces}) > 1:
        return False
    size, rows, turns = shape[pieces[0].dim], [p.rows for p in pieces], len(pieces)
    if all(r.step == 1 for r in rows):
        return [0, *(r.stop for r in rows)] == [*(r.start for r in rows), size]
    in_turns = [range(size)[first::turns] for first in range(turns)]
    return size % turns == 0 and rows == in_turns
