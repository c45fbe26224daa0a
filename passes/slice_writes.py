"""Replaces a fresh tensor that is written piece by piece with the pieces, joined.

Before                                      After
    k = new_empty(x, [B, H, T, 48])
    copy_(slice(k, 3, 0, 32), a)
    copy_(slice(k, 3, 32, 48), b)
    f(k)                                        f(cat([a, b], 3))

Only where the pieces cover one axis exactly and in full, before anything reads the tensor: then
what it held at first does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.memory import is_fresh, is_mutation

__all__ = ["join_written_pieces"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Piece:
    """``base[..., start:end] = source`` along `dim`."""

    view: fx.Node
    write: fx.Node
    source: fx.Node
    dim: int
    start: int
    end: int


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
    if not _cover(pieces, shape_of(base)):
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
    with gm.graph.inserting_after(last):
        joined = gm.graph.call_function(
            aten.cat.default, ([p.source for p in pieces], pieces[0].dim)
        )
    joined.meta = {**last.meta, "val": base.meta["val"]}
    base.replace_all_uses_with(joined, lambda user: user not in own)
    for piece in pieces:
        gm.graph.erase_node(piece.write)
        gm.graph.erase_node(piece.view)
    gm.graph.erase_node(base)
    return True


def _base(write: fx.Node) -> fx.Node | None:
    """The fresh tensor that a slice written to is a view of."""
    view = arguments(write)["self"]
    if not isinstance(view, fx.Node) or view.target is not aten.slice.Tensor:
        return None
    base = arguments(view)["self"]
    is_own = isinstance(base, fx.Node) and base.op == "call_function" and is_fresh(base)
    return base if is_own else None


def _pieces(base: fx.Node) -> list[_Piece]:
    """What is written into `base`, in the order of what it covers."""
    pieces = [p for view in base.users if (p := _piece(base, view)) is not None]
    return sorted(pieces, key=lambda p: p.start)


def _piece(base: fx.Node, view: fx.Node) -> _Piece | None:
    if view.target is not aten.slice.Tensor or len(view.users) != 1:
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
    bounds = _bounds(given, shape_of(base)[dim])
    if not same_type or shape_of(source) != shape_of(view) or bounds is None:
        return None
    return _Piece(view, write, source, dim, *bounds)


def _bounds(given: dict[str, Any], size: Any) -> tuple[int, int] | None:
    start, end = given["start"] or 0, given["end"]
    if not isinstance(size, int) or not isinstance(start, int) or given["step"] != 1:
        return None
    if end is not None and not isinstance(end, int):
        return None
    bounds = range(size)[start:end]
    return bounds.start, bounds.stop


def _cover(pieces: list[_Piece], shape: tuple[Any, ...]) -> bool:
    """One after the other along one axis, from its first entry to its last."""
    if len(pieces) < 2 or len({p.dim for p in pieces}) > 1:
        return False
    ends = [0, *(p.end for p in pieces)]
    starts = [*(p.start for p in pieces), shape[pieces[0].dim]]
    return ends == starts
