"""For which lengths a mask must be looked at to know it for all lengths.

The entry at row i, column j of a mask that is made from ``arange``, constants and slices of
buffers by pointwise operations does not depend on the length T, which only says how many entries
there are: the mask of a shorter length is a corner of the mask of a longer one. So one length
decides all shorter ones. It decides the longer ones too, once it exceeds what the constants can
tell apart: entries change along lines such as ``i - j = 5`` or ``j = 7``, all corners of which lie
within a bound on the constants (`reach`). A slice ``table[:T, :T]`` bounds T by the table's
length there, and the table is looked at whole. Nothing is claimed of what differs by the place in
the batch.

Where T itself enters as a number (``i - j + T``) that does not cancel (`counted`), or an operation
is none of these, all lengths that can occur are looked at if they are few; otherwise nothing is
claimed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.memory import is_mutation
from fxport.passes.attention.views import overload_packet
from fxport.passes.constants import is_symbolic
from fxport.passes.graph_facts import reachable, value_inputs
from fxport.passes.masks.counted import counts_from_end, length_free
from fxport.passes.masks.reach import (
    PADS,
    PRODUCTS,
    WRITES,
    is_plain_position,
    reach,
    unbounded,
)

__all__ = [
    "POINTWISE",
    "RESHAPES",
    "SHAPES",
    "Scope",
    "scope_of",
    "upper_bound",
]

aten = torch.ops.aten

MARGIN = 32
FEW = 300  # lengths that are cheap to try one by one

POINTWISE = PRODUCTS | {
    aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge,
    aten.add, aten.sub, aten.rsub, aten.neg, aten.abs, aten.logical_and, aten.logical_or,
    aten.logical_not, aten.logical_xor, aten.bitwise_and, aten.bitwise_or, aten.bitwise_not,
    aten.bitwise_xor, aten.where, aten.masked_fill, aten.to, aten._to_copy, aten.clone,
    aten.contiguous, aten.alias, aten.detach, aten.lift_fresh, aten.lift_fresh_copy,
    aten.type_as, aten.minimum, aten.maximum, aten.clamp, aten.clamp_min, aten.clamp_max,
    aten.__and__, aten.__or__, aten.__xor__, aten.detach_,
    aten.exp, aten.log, aten.sqrt, aten.pow, aten.sign,
    aten.fill, aten.relu, aten.nan_to_num, aten.isnan, aten.isinf, aten.isfinite, aten.isneginf,
    aten.isposinf, aten.floor, aten.ceil, aten.trunc,
}  # fmt: skip
_FACTORIES = {
    aten.arange, aten.ones, aten.zeros, aten.full, aten.ones_like, aten.zeros_like,
    aten.full_like, aten.new_ones, aten.new_zeros, aten.new_full, aten.scalar_tensor, aten.eye,
}  # fmt: skip
SHAPES = {
    aten.expand, aten.unsqueeze, aten.squeeze, aten.transpose, aten.permute, aten.t,
    aten.expand_as, aten.broadcast_to, aten.mT, aten.numpy_T, aten.adjoint, aten.swapaxes,
    aten.swapdims, aten.movedim, aten.moveaxis,
}  # fmt: skip
RESHAPES = {aten.view, aten.reshape, aten.flatten, aten.view_as, aten.reshape_as}
_GATHERS = {aten.index, aten.embedding, aten.index_select}
_PREFIXES = {aten.tril, aten.triu, aten.cumsum}
_LOOKUPS = {aten.slice, aten.index, aten.select, aten.embedding, aten.index_select, aten.narrow}
# Sizes may stand here without becoming numbers that the mask is computed from.
_SHAPE_ARGUMENTS = {"size", "shape", "end", "sizes", "length", "n", "m"}


@dataclass(frozen=True)
class Scope:
    """What to look at.

    Attributes:
        points: a number for each length symbol, points that together decide all; or none.
        why: without points: why nothing can be claimed.
    """

    points: tuple[dict[sympy.Symbol, int], ...] = ()
    why: str = ""


def upper_bound(symbol: sympy.Symbol, nodes: Iterable[fx.Node]) -> int | None:
    """The largest value that a size symbol is known to take, from the tracer's own ranges."""
    for node in nodes:
        value = node.meta.get("val")
        candidates = [value] if isinstance(value, torch.SymInt) else getattr(value, "shape", ())
        for size in candidates:
            if isinstance(size, torch.SymInt) and symbol in size.node.expr.free_symbols:
                bound = size.node.shape_env.var_to_range[symbol].upper
                return int(bound) if bound.is_Integer and bound < 2**30 else None
    return None


def scope_of(
    tensors: Sequence[fx.Node], symbols: Sequence[sympy.Symbol], added: Collection[fx.Node] = ()
) -> Scope:
    """The scope of the masks that `tensors` are.

    Args:
        symbols: those that the lengths of queries and keys are made of; at least one.
        added: see `length_free`.
    """
    nodes = reachable(tensors, _plain_inputs)
    foreign = next((n for n in nodes if _varies_along_others(n, symbols)), None)
    if foreign is not None:
        return Scope(why=f"`{_name(foreign)}` may treat every entry of the batch differently")
    tables = _table_lengths(nodes)
    bounds = {s: b for s in symbols if (b := _bound(s, nodes, tables)) is not None}
    free = length_free(nodes, tensors, added)
    known = free | _fixed(nodes)
    strange = next((n for n in nodes if n not in known and not _is_local(n, symbols)), None)
    strange = strange or unbounded(nodes)
    if strange is None:
        strange = next((n for n in tables if not tables[n][0].is_Symbol), None)
    if strange is not None:
        only = bounds.get(symbols[0]) if len(symbols) == 1 else None
        if only is not None and only <= FEW:
            return Scope(tuple({symbols[0]: n} for n in range(only, 1, -1)))
        return Scope(why=f"`{_name(strange)}` may treat every length differently")
    whole = max((length for _, length in tables.values()), default=0)
    far = whole + reach(nodes) + MARGIN
    return Scope(_corners({s: min(far, bounds.get(s, far)) for s in symbols}))


def _corners(lengths: dict[sympy.Symbol, int]) -> tuple[dict[sympy.Symbol, int], ...]:
    """All at their largest; lengths that differ (queries and keys) in both orders as well."""
    if len(lengths) == 1:
        return (lengths,)
    shorter = tuple(lengths | {s: max(n - 7, 2)} for s, n in lengths.items())
    return (lengths, *shorter)


def _bound(
    symbol: sympy.Symbol, nodes: Iterable[fx.Node], tables: dict[fx.Node, tuple[sympy.Expr, int]]
) -> int | None:
    known = [length for size, length in tables.values() if size == symbol]
    traced = upper_bound(symbol, nodes)
    return min([*known, *([] if traced is None else [traced])], default=None)


def _varies_along_others(node: fx.Node, symbols: Sequence[sympy.Symbol]) -> bool:
    """Whether entries are told apart along a symbolic dimension that is no length."""
    packet = overload_packet(node)
    if packet is aten.arange or packet in _LOOKUPS:
        before = [s for n in value_inputs(node) if not is_symbolic(n) for s in shape_of(n)]
        sizes = [s for s in shape_of(node) if s not in before or packet in _GATHERS]
    elif packet is aten.cumsum:
        sizes = [shape_of(node)[arguments(node)["dim"]]]
    elif packet in (aten.tril, aten.triu, aten.eye):
        sizes = list(shape_of(node)[-2:])
    elif packet in PADS:
        sizes = [s for s, b in zip(shape_of(node), shape_of(node.args[0]), strict=True) if s != b]  # type: ignore[arg-type]
    elif packet in WRITES or packet is aten.cat:
        sizes = [shape_of(node)[arguments(node)["dim"]]]
    else:
        return False
    return any(
        not isinstance(s, int) and not s.free_symbols <= set(symbols) and not s.is_Integer
        for s in sizes
    )


def _plain_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs that the value depends on, without sizes."""
    return [n for n in value_inputs(node) if not is_symbolic(n)]


def _name(node: fx.Node) -> str:
    return str(overload_packet(node) or node.target)


def _fixed(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """What no length enters: one constant, whatever it is computed by (slopes of heads)."""
    found: set[fx.Node] = set()
    for node in sorted(nodes):
        if not isinstance(node.meta["val"], torch.Tensor) or is_mutation(node):
            continue
        sizes = [*shape_of(node), *(n for n in node.all_input_nodes if is_symbolic(n))]
        given = [n for n in value_inputs(node) if not is_symbolic(n)]
        if not any(map(_is_length, sizes)) and all(n in found for n in given):
            found.add(node)
    return found


def _is_length(size: object) -> bool:
    return _varies(size) if isinstance(size, fx.Node) else not isinstance(size, int)


def _is_local(node: fx.Node, symbols: Sequence[sympy.Symbol]) -> bool:
    """Whether an entry of the result is a function of its own indices, not of the length."""
    if node.op in ("placeholder", "get_attr"):
        return True
    packet = overload_packet(node)
    if packet in RESHAPES:
        before = node.args[0]
        assert isinstance(before, fx.Node)
        return _between_lengths(shape_of(before), symbols) == _between_lengths(
            shape_of(node), symbols
        )
    if packet is aten.repeat:
        return _expands(node)
    if packet in PADS:
        return _pads_in_front(node)
    if packet in WRITES:
        return _writes_at_numbers(node)
    if packet is aten.cat:
        return _begins_at_numbers(node)
    known = (POINTWISE, _FACTORIES, SHAPES, _PREFIXES, _LOOKUPS)
    if not any(packet in group for group in known):
        return False
    given = arguments(node)
    if packet in (aten.slice, aten.select, aten.narrow) and counts_from_end(given):
        return False
    return not any(_varies(value) for name, value in given.items() if name not in _SHAPE_ARGUMENTS)


def _expands(repeat: fx.Node) -> bool:
    """Whether it is an expand: what is there several times had one entry."""
    after, before = shape_of(repeat), shape_of(repeat.args[0])  # type: ignore[arg-type]
    new = (1,) * (len(after) - len(before))
    return all(a in (1, b) for a, b in zip(new + before, after, strict=True))


def _pads_in_front(pad: fx.Node) -> bool:
    """Whether entries are moved by a number, and numbers put before them: none at their end."""
    given = arguments(pad)
    amounts = given["pad"]
    if given.get("mode", "constant") != "constant" or _varies([amounts, given.get("value")]):
        return False
    return min(amounts) >= 0 and not any(amounts[1::2])


def _writes_at_numbers(write: fx.Node) -> bool:
    """Whether what is written stands at places that are counted from the first entry."""
    given = arguments(write)
    places = [given[name] for name in ("start", "end", "index") if given.get(name) is not None]
    return given.get("step", 1) == 1 and all(isinstance(p, int) and p >= 0 for p in places)


def _begins_at_numbers(cat: fx.Node) -> bool:
    """Whether every part begins where the ones before say, which are as long at every length."""
    given = arguments(cat)
    return all(isinstance(shape_of(t)[given["dim"]], int) for t in given["tensors"][:-1])


def _between_lengths(shape: tuple[Any, ...], symbols: Sequence[sympy.Symbol]) -> list[Any]:
    """Dimensions of lengths as they are, and the product of what stands between them."""
    found: list[Any] = [sympy.Integer(1)]
    for size in shape:
        if not isinstance(size, int) and size.free_symbols & set(symbols):
            found += [size, sympy.Integer(1)]
        else:
            found[-1] = found[-1] * size
    return found


def _varies(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(_varies(v) for v in value)
    size = value.meta.get("val") if isinstance(value, fx.Node) else None
    fixed = isinstance(size, torch.SymInt) and size.node.expr.is_Integer  # ``T + 5 - T``
    return isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) and not fixed


def _table_lengths(nodes: list[fx.Node]) -> dict[fx.Node, tuple[sympy.Expr, int]]:
    """Where a part of a stored table is taken: the size of the part, and the table's length."""
    found: dict[fx.Node, tuple[sympy.Expr, int]] = {}
    for node in nodes:
        packet = overload_packet(node)
        if packet not in _LOOKUPS or packet is aten.select:
            continue
        given = arguments(node)
        table = next(iter(given.values()))
        before, after = shape_of(table), shape_of(node)
        if packet not in _GATHERS:
            along = given["dim"] % len(before)
            if isinstance(before[along], int) and not isinstance(after[along], int):
                found[node] = after[along], before[along]
            continue
        for size, length in _gathered(node, before):
            if node not in found or length < found[node][1]:
                found[node] = size, length
    return found


def _gathered(node: fx.Node, table: tuple[Any, ...]) -> list[tuple[sympy.Expr, int]]:
    """Positions that index a table as they are: their count, and the table's length there."""
    given = arguments(node)
    packet = overload_packet(node)
    if packet is aten.index:
        pairs = list(zip(given["indices"], table, strict=False))
    elif packet is aten.embedding:
        pairs = [(given["indices"], table[0])]
    else:
        pairs = [(given["index"], table[given["dim"] % len(table)])]
    found: list[tuple[sympy.Expr, int]] = []
    for index, length in pairs:
        if isinstance(index, fx.Node) and isinstance(length, int) and is_plain_position(index):
            sizes = [s for s in shape_of(index) if not isinstance(s, int)]
            found += [(size, length) for size in sizes if len(sizes) == 1]
    return found
