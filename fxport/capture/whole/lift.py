"""What is computed piece by piece and joined again, of all at once.

Before, at T = 1200                                      After
    a, b, c = split(x [B, T, C], 512, 1)
    cat([mlp(a), mlp(b), mlp(c)], 1)                         mlp(x)

    w0 = softmax(q[:128] @ k[:128].T + mask[:128, :128])
    w1 = softmax(q[128:256] @ k[:256].T + mask[128:256, :256])
    ...
    cat([w0 @ v[:128], w1 @ v[:256], ...], 0)                softmax(q @ k.T + mask) @ v

Only where each step keeps the entries along the pieces apart (see `along`), and what the later
keys would add to an earlier piece is masked: by its values, at this very length.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.whole.along import KEEPING, SPLITS, along, draws, rank_of
from fxport.capture.whole.emit import again, call, named
from fxport.capture.whole.hidden import Values

__all__ = ["join_pieces"]

aten = torch.ops.aten

_MOST = 512  # pieces
_STORED = "_fxport_pieces_"


def join_pieces(gm: fx.GraphModule, lengths: Collection[int]) -> int:
    """Rewrites a graph of plain sizes in place; returns how many joins went.

    Args:
        lengths: of axes that hold tokens.
    """
    joined = 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.cat.default):
        given = arguments(node)
        pieces, dim = tuple(given["tensors"]), given["dim"] % rank_of(node)
        if not 1 < len(pieces) <= _MOST or shape_of(node)[dim] not in lengths:
            continue
        if any(rank_of(piece) != rank_of(node) for piece in pieces):
            continue  # torch takes an empty vector for nothing of any shape
        for fill in (True, False):
            whole = _Lift(gm, pieces, dim, fill).run()
            if whole is not None:
                node.replace_all_uses_with(whole)
                joined += 1
                break
    if joined:
        gm.graph.eliminate_dead_code()
    return joined


class _Stop(Exception):
    """The pieces are no parts of one computation."""


@dataclass(frozen=True)
class _Whole:
    """What the values of all pieces are parts of.

    Attributes:
        rows: the axis of which piece i has its own entries; None where each has all.
        ends: the axis of which piece i has all entries up to its own last one.
        zero: behind them lie zeros.
    """

    node: fx.Node
    rows: int | None = None
    ends: int | None = None
    zero: bool = False


class _Lift:
    """
    Args:
        dim: along which the pieces are joined.
        fill: what lies behind the masks that each piece makes for itself.
    """

    def __init__(
        self, gm: fx.GraphModule, pieces: tuple[fx.Node, ...], dim: int, fill: bool
    ) -> None:
        self._gm, self._pieces, self._dim, self._fill = gm, pieces, dim, fill
        sizes = [shape_of(piece)[dim] for piece in pieces]
        self._ends = list(itertools.accumulate(sizes))
        self._starts = [0, *self._ends[:-1]]
        self._size = self._ends[-1]
        self._values = Values(gm.graph)
        self._known: dict[tuple[fx.Node, ...], _Whole] = {}
        self._made: list[fx.Node] = []

    def run(self) -> fx.Node | None:
        try:
            found = self._whole(self._pieces)
            if (found.rows, found.ends) == (self._dim, None):
                return found.node
        except _Stop:
            pass
        for node in reversed(self._made):
            self._gm.graph.erase_node(node)
        return None

    def _whole(self, nodes: tuple[fx.Node, ...]) -> _Whole:
        if nodes not in self._known:
            if any(map(self._values.is_written, nodes)):
                raise _Stop
            self._known[nodes] = self._found(nodes)
        return self._known[nodes]

    def _found(self, nodes: tuple[fx.Node, ...]) -> _Whole:
        first = nodes[0]
        if all(n is first for n in nodes):
            return _Whole(first)
        if (own := self._own_parts(nodes)) is not None:
            return own
        if (up_to := self._up_to(nodes)) is not None:
            return up_to
        try:
            return self._computed(nodes)
        except _Stop:
            constant = self._constant(nodes)
            if constant is None:
                raise
            return constant

    # --- parts of one value ----------------------------------------------------------------------

    def _own_parts(self, nodes: tuple[fx.Node, ...]) -> _Whole | None:
        parts = [_part(node) for node in nodes]
        first = parts[0]
        if first is None:
            return None
        source, dim, _, _ = first
        wanted = [(source, dim, *span) for span in zip(self._starts, self._ends, strict=True)]
        if parts != wanted:
            return None
        return _Whole(self._cut(source, dim, nodes[0]), rows=dim)

    def _up_to(self, nodes: tuple[fx.Node, ...]) -> _Whole | None:
        """``x[:, :end]``; the last piece may take all without saying so."""
        parts = [_part(node) for node in nodes]
        dims = {p[1] for p, end in zip(parts, self._ends, strict=True) if p and p[2:] == (0, end)}
        for dim in dims:
            wholes = []
            for node, part, end in zip(nodes, parts, self._ends, strict=True):
                if part is not None and part[1:] == (dim, 0, end):
                    wholes.append(part[0])
                elif dim < rank_of(node) and shape_of(node)[dim] == end == self._size:
                    wholes.append(node)
            if len(wholes) == len(nodes):
                inner = self._whole(tuple(wholes))
                if inner.ends is not None or inner.rows == dim:
                    raise _Stop
                return _Whole(self._cut(inner.node, dim, nodes[0]), rows=inner.rows, ends=dim)
        return None

    def _cut(self, source: fx.Node, dim: int, at: fx.Node) -> fx.Node:
        """The entries that there are pieces of."""
        if shape_of(source)[dim] == self._size:
            return source
        return self._add(call(at, aten.slice.Tensor, (source, dim, 0, self._size), {}))

    # --- steps ------------------------------------------------------------------------------------

    def _computed(self, nodes: tuple[fx.Node, ...]) -> _Whole:
        first = nodes[0]
        if first.op != "call_function" or any(n.target != first.target for n in nodes):
            raise _Stop
        if draws(first):
            raise _Stop
        given = [named(node) for node in nodes]
        lifted = {k: self._argument(tuple(g.get(k) for g in given)) for k in given[0]}
        rows = _axis(first, lifted, "rows")
        ends, zero = self._ending(first, lifted)
        sizes = {axis: self._size for axis in (rows, ends) if axis is not None}
        if not self._alike(nodes, rows, ends):
            raise _Stop
        other = {k: _nodes(v) for k, v in lifted.items() if not isinstance(v, _Literal)}
        return _Whole(self._add(again(first, other, sizes)), rows, ends, zero)

    def _argument(self, values: tuple[Any, ...]) -> Any:
        """A `_Whole`, a list of such, or a `_Literal`."""
        one = values[0]
        if all(isinstance(v, fx.Node) for v in values):
            return self._whole(values)
        if any(isinstance(v, fx.Node) for v in values):
            raise _Stop
        if isinstance(one, list | tuple) and any(isinstance(v, fx.Node) for v in one):
            if any(len(v) != len(one) for v in values):
                raise _Stop
            return [self._argument(column) for column in zip(*values, strict=True)]
        return _Literal(values)

    def _ending(self, node: fx.Node, lifted: dict[str, Any]) -> tuple[int | None, bool]:
        """The axis of the result that ends with each piece, and whether zeros lie behind."""
        wholes = [w for value in lifted.values() for w in _flat(value)]
        if all(w.ends is None for w in wholes):
            return None, False
        packet = getattr(node.target, "overloadpacket", None)
        own = lifted.get("self")
        if packet is aten.softmax and isinstance(own, _Whole) and own.ends is not None:
            last = rank_of(node) - 1
            over = arguments(node)["dim"] % (last + 1)
            if over == own.ends == last and own.rows == last - 1:
                if not self._values.hide(own.node, self._behind()):
                    raise _Stop
                return last, True
        if packet is aten.scaled_dot_product_attention and self._attends(node, lifted):
            return None, False
        if _sums_over_ends(node, wholes):
            return None, False
        axis = _axis(node, lifted, "ends")
        return axis, packet in KEEPING and wholes[0].zero

    def _attends(self, node: fx.Node, lifted: dict[str, Any]) -> bool:
        mask, last = lifted["attn_mask"], rank_of(node) - 1
        if not isinstance(mask, _Whole) or arguments(node)["is_causal"]:
            return False
        behind = rank_of(mask.node) - 1
        keys = [
            lifted[name].ends == last - 1 and lifted[name].rows is None for name in ("key", "value")
        ]
        value = self._values.of(mask.node)
        if not all(keys) or value is None or (mask.rows, mask.ends) != (behind - 1, behind):
            return False
        hidden = ~value if value.dtype == torch.bool else value == float("-inf")
        return bool((hidden | ~self._behind()).all())

    def _behind(self) -> Tensor:
        """Where keys lie behind the piece of a row."""
        last = torch.cat(
            [
                torch.full((end - start,), end)
                for start, end in zip(self._starts, self._ends, strict=True)
            ]
        )
        return torch.arange(self._size) >= last[:, None]

    def _alike(self, nodes: tuple[fx.Node, ...], rows: int | None, ends: int | None) -> bool:
        """Whether nothing but the sizes of the pieces differs between the calls."""
        given = [named(node) for node in nodes]
        for name, value in given[0].items():
            if name in ("size", "shape"):
                continue  # the shapes themselves are compared
            others = [g.get(name) for g in given]
            if _is_literal(value) and any(repr(o) != repr(value) for o in others):
                return False
        shapes = [_shape(node) for node in nodes]
        if shapes[0] is None:  # a list of parts along another axis: looked at one by one
            return True
        for shape, start, end in zip(shapes, self._starts, self._ends, strict=True):
            wanted = list(shapes[0])
            if rows is not None:
                wanted[rows] = end - start
            if ends is not None:
                wanted[ends] = end
            if shape is None or list(shape) != wanted:
                return False
        return True

    # --- constants --------------------------------------------------------------------------------

    def _constant(self, nodes: tuple[fx.Node, ...]) -> _Whole | None:
        """What each piece makes for itself of numbers alone."""
        found = [self._values.of(node) for node in nodes]
        values = [v for v in found if v is not None]
        if len(values) < len(nodes) or len({(v.dtype, v.dim()) for v in values}) > 1:
            return None
        rank = values[0].dim()
        sizes = [end - start for start, end in zip(self._starts, self._ends, strict=True)]
        rows = [d for d in range(rank) if [v.shape[d] for v in values] == sizes]
        ends = [d for d in range(rank) if [v.shape[d] for v in values] == self._ends]
        if ends and rows:
            values = [
                F.pad(v, _behind_axis(v, ends[-1], self._size), value=self._filling(v))
                for v in values
            ]
        elif ends:
            if not all(
                torch.equal(values[-1].narrow(ends[-1], 0, v.shape[ends[-1]]), v) for v in values
            ):
                return None
            return _Whole(self._stored(values[-1], nodes[0]), ends=ends[-1])
        if not rows:
            return None
        shapes = {(*v.shape[: rows[0]], *v.shape[rows[0] + 1 :]) for v in values}
        if len(shapes) > 1:
            return None
        whole = self._stored(torch.cat(values, rows[0]), nodes[0])
        return _Whole(whole, rows[0], ends[-1] if ends else None)

    def _filling(self, value: Tensor) -> float | bool:
        if value.dtype == torch.bool:
            return self._fill
        return float("-inf") if self._fill and value.is_floating_point() else 0

    def _stored(self, value: Tensor, at: fx.Node) -> fx.Node:
        held = dict(self._gm.named_buffers(recurse=False))
        name = next(
            (n for n, v in held.items() if n.startswith(_STORED) and _equal(v, value)), None
        )
        if name is None:
            name = f"{_STORED}{len(held)}"
            self._gm.register_buffer(name, value, persistent=False)
        with self._gm.graph.inserting_before(at):
            node = self._gm.graph.get_attr(name)
        node.meta["val"] = at.meta["val"].fake_mode.from_tensor(value)
        return self._add(node)

    def _add(self, node: fx.Node | None) -> fx.Node:
        if node is None:
            raise _Stop
        self._made.append(node)
        return node


@dataclass(frozen=True)
class _Literal:
    """Numbers, one for each piece."""

    values: tuple[Any, ...]


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _is_literal(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return not any(isinstance(v, fx.Node) for v in value)
    return not isinstance(value, fx.Node)


def _flat(value: Any) -> list[_Whole]:
    if isinstance(value, list):
        return [w for v in value for w in _flat(v)]
    return [value] if isinstance(value, _Whole) else []


def _nodes(value: Any) -> Any:
    if isinstance(value, list):
        return [_nodes(v) for v in value]
    return value.node if isinstance(value, _Whole) else value.values[0]


def _axes(value: Any, what: str) -> Any:
    if isinstance(value, list):
        return [_axes(v, what) for v in value]
    return getattr(value, what) if isinstance(value, _Whole) else None


def _axis(node: fx.Node, lifted: dict[str, Any], what: str) -> int | None:
    """The axis of the result that the axes of its operands become.

    Raises:
        _Stop: there is none.
    """
    wanted = {k: _axes(v, what) for k, v in lifted.items() if _flat(v)}
    if all(getattr(w, what) is None for v in lifted.values() for w in _flat(v)):
        return None
    shape = _shape(node)
    rank = len(shape) if shape is not None else rank_of(node.all_input_nodes[0])
    for dim in range(rank):
        found = along(node, dim)
        if found is not None and all(found.get(k) == v for k, v in wanted.items()):
            return dim
    raise _Stop


def _sums_over_ends(node: fx.Node, wholes: list[_Whole]) -> bool:
    """A product that adds up over what ends with each piece, where one side has zeros behind."""
    if len(wholes) != 2 or any(w.ends is None for w in wholes) or not any(w.zero for w in wholes):
        return False
    left, right = wholes
    packet = getattr(node.target, "overloadpacket", None)
    if packet in (aten.matmul, aten.bmm, aten.mm):
        return left.ends == rank_of(left.node) - 1 and right.ends == rank_of(right.node) - 2
    if packet is aten.einsum:
        terms, _, result = arguments(node)["equation"].replace(" ", "").partition("->")
        first, second = terms.split(",")
        letter = first[left.ends]  # type: ignore[index]
        apart = first.count(letter) == second.count(letter) == 1 and letter not in result
        return apart and second[right.ends] == letter and "." not in terms  # type: ignore[index]
    return False


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    return shape_of(node) if isinstance(node.meta["val"], Tensor) else None


def _behind_axis(value: Tensor, axis: int, size: int) -> list[int]:
    return [0, 0] * (value.dim() - 1 - axis) + [0, size - value.shape[axis]]


def _part(node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    """(whole, axis, start, end) of a part of another value."""
    if node.target is operator.getitem:
        made: Any = node.args[0]
        if getattr(made.target, "overloadpacket", None) not in SPLITS:
            return None
        index = int(node.args[1]) % len(made.meta["val"])  # type: ignore[arg-type]
        given = arguments(made)
        dim = given["dim"] % rank_of(given["self"])
        ends = [0, *itertools.accumulate(part.shape[dim] for part in made.meta["val"])]
        return given["self"], dim, ends[index], ends[index + 1]
    if node.target is aten.slice.Tensor:
        given = arguments(node)
        dim = given["dim"] % rank_of(node)
        size = shape_of(given["self"])[dim]
        end = size if given["end"] is None else given["end"]
        kept = range(size)[given["start"] or 0 : end]
        return (given["self"], dim, kept.start, kept.stop) if given["step"] == 1 else None
    if node.target is aten.narrow.default:
        given = arguments(node)
        start = given["start"]
        return given["self"], given["dim"] % rank_of(node), start, start + given["length"]
    return None
