"""For which lengths a mask must be looked at to know it for all lengths.

The entry at row i, column j of a mask that is made from ``arange``, constants and slices of
buffers by pointwise operations does not depend on the length T, which only says how many entries
there are: the mask of a shorter length is a corner of the mask of a longer one. So one length
decides all shorter ones. It decides the longer ones too, once it exceeds what the constants can
tell apart: entries change along lines such as ``i - j = 5`` or ``j = 7``, all corners of which lie
within the sum of the constants that enter comparisons (times those that multiply), so that no new
pattern begins beyond that sum. A stored table is looked at whole.

Where T itself enters as a number (``i - j + T``), or an operation is none of these, all lengths
that can occur are looked at if they are few; otherwise nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention_views import overload_packet
from fxport.passes.constants import is_symbolic
from fxport.passes.graph_facts import value_inputs
from fxport.passes.mask_values import constant_value

__all__ = ["Scope", "scope_of", "upper_bound"]

aten = torch.ops.aten

MARGIN = 32
FEW = 300  # lengths that are cheap to try one by one

_COMPARISONS = {aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge}
_PRODUCTS = {aten.mul, aten.div, aten.floor_divide, aten.remainder, aten.fmod, aten.true_divide}
_POINTWISE = _COMPARISONS | _PRODUCTS | {
    aten.add, aten.sub, aten.rsub, aten.neg, aten.abs, aten.logical_and, aten.logical_or,
    aten.logical_not, aten.logical_xor, aten.bitwise_and, aten.bitwise_or, aten.bitwise_not,
    aten.bitwise_xor, aten.where, aten.masked_fill, aten.to, aten._to_copy, aten.clone,
    aten.contiguous, aten.alias, aten.detach, aten.lift_fresh, aten.lift_fresh_copy,
    aten.type_as, aten.minimum, aten.maximum, aten.clamp, aten.clamp_min, aten.clamp_max,
    aten.__and__, aten.__or__, aten.detach_, aten.exp, aten.log, aten.sqrt, aten.pow, aten.sign,
}  # fmt: skip
_FACTORIES = {
    aten.arange, aten.ones, aten.zeros, aten.full, aten.ones_like, aten.zeros_like,
    aten.full_like, aten.new_ones, aten.new_zeros, aten.new_full, aten.scalar_tensor,
}  # fmt: skip
_SHAPES = {
    aten.expand, aten.unsqueeze, aten.squeeze, aten.transpose, aten.permute, aten.t,
    aten.expand_as, aten.broadcast_to, aten.mT,
}  # fmt: skip
_RESHAPES = {aten.view, aten.reshape, aten.flatten, aten.view_as, aten.reshape_as}
_PREFIXES = {aten.tril, aten.triu, aten.cumsum}
_LOOKUPS = {aten.slice, aten.index, aten.select, aten.embedding, aten.index_select, aten.narrow}
_BENDS = {aten.clamp, aten.clamp_min, aten.clamp_max, aten.minimum, aten.maximum, aten.abs}
# Sizes may stand here without becoming numbers that the mask is computed from.
_SHAPE_ARGUMENTS = {"size", "shape", "end", "sizes", "length"}


@dataclass(frozen=True)
class Scope:
    """What to look at.

    Attributes:
        length: one length that decides all, or None.
        every: all lengths have to be tried, from 1 up to this one; None: not needed.
        why: when both are None: why nothing can be claimed.
    """

    length: int | None = None
    every: int | None = None
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


def scope_of(tensors: Iterable[fx.Node], bound: int | None) -> Scope:
    """The scope of the masks that `tensors` are, whose length is symbolic.

    Args:
        bound: the largest length that can occur, if known.
    """
    nodes = _ancestors(tensors)
    strange = next((n for n in nodes if not _is_local(n)), None)
    table = _table_length(nodes)
    if table is not None:
        bound = table if bound is None else min(bound, table)
    if strange is not None:
        if bound is not None and bound <= FEW:
            return Scope(every=bound)
        return Scope(why=f"`{_name(strange)}` may treat every length differently")
    reach = _reach(nodes) + MARGIN
    if table is not None:
        return Scope(length=bound)
    return Scope(length=reach if bound is None else min(bound, reach))


def _ancestors(tensors: Iterable[fx.Node]) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    pending = list(tensors)
    while pending:
        node = pending.pop()
        if node not in found and not is_symbolic(node):
            found[node] = None
            pending.extend(value_inputs(node))
    return list(found)


def _name(node: fx.Node) -> str:
    return str(overload_packet(node) or node.target)


def _is_local(node: fx.Node) -> bool:
    """Whether an entry of the result is a function of its own indices, not of the length."""
    if node.op in ("placeholder", "get_attr"):
        return True
    packet = overload_packet(node)
    if packet in _RESHAPES:
        before = node.args[0]
        assert isinstance(before, fx.Node)
        return _without_ones(shape_of(before)) == _without_ones(shape_of(node))
    known = (_POINTWISE, _FACTORIES, _SHAPES, _PREFIXES, _LOOKUPS)
    if not any(packet in group for group in known):
        return False
    given = arguments(node)
    return not any(_varies(value) for name, value in given.items() if name not in _SHAPE_ARGUMENTS)


def _without_ones(shape: tuple[Any, ...]) -> list[Any]:
    return [s for s in shape if s != 1]


def _varies(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(_varies(v) for v in value)
    return isinstance(value, fx.Node) and isinstance(
        value.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool
    )


def _table_length(nodes: list[fx.Node]) -> int | None:
    """Length of the shortest stored table of which a part is taken; None without tables."""
    lengths: list[int] = []
    stored = _depends_on_storage(nodes)
    for node in nodes:
        if overload_packet(node) not in _LOOKUPS:
            continue
        source = next((n for n in node.all_input_nodes if n in stored), None)
        if source is None:
            continue
        before = shape_of(source)
        after = shape_of(node)
        if any(not isinstance(s, int) for s in after):
            lengths += [s for s in before if isinstance(s, int) and s > 1]
    return min(lengths, default=None)


def _depends_on_storage(nodes: list[fx.Node]) -> set[fx.Node]:
    inside = set(nodes)
    stored: set[fx.Node] = set()
    for node in sorted(inside):
        if node.op in ("placeholder", "get_attr") or any(i in stored for i in node.all_input_nodes):
            stored.add(node)
    return stored


def _reach(nodes: list[fx.Node]) -> int:
    """A bound on the offsets of the lines between the pieces of a mask."""
    indices = _index_valued(nodes)
    total, factor = 1.0, 1.0
    for node in _compared(nodes, indices):
        constants = [abs(c) for c in _constants(node)]
        if overload_packet(node) in _PRODUCTS:
            factor *= math.prod(max(c, 1 / c if c else 1.0, 1.0) for c in constants)
        else:
            total += sum(constants)
    return math.ceil(min(total * factor, 1e9))


def _index_valued(nodes: list[fx.Node]) -> set[fx.Node]:
    """Values that grow with the position: made from arange or cumsum, not yet compared."""
    found: set[fx.Node] = set()
    for node in sorted(nodes):
        value = node.meta["val"]
        if value.dtype == torch.bool:
            continue
        grows = overload_packet(node) in (aten.arange, aten.cumsum)
        if grows or any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _compared(nodes: list[fx.Node], indices: set[fx.Node]) -> set[fx.Node]:
    """Operations on positions that decide an entry, and the constants that enter them."""
    found: set[fx.Node] = set()
    pending = [n for n in nodes if _decides(n, indices)]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        values = node.all_input_nodes
        if overload_packet(node) in _PREFIXES:  # it moves values and compares positions
            values = [n for n in values if n in indices]
        pending.extend(n for n in values if not is_symbolic(n) and not _is_decided(n))
    return found


def _decides(node: fx.Node, indices: set[fx.Node]) -> bool:
    packet = overload_packet(node)
    if packet in (aten.tril, aten.triu):
        return True
    bent = packet in _COMPARISONS or packet in _BENDS or node.meta["val"].dtype == torch.bool
    return bent and any(i in indices for i in node.all_input_nodes)


def _is_decided(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype == torch.bool) and overload_packet(node) not in _PREFIXES


def _constants(node: fx.Node) -> list[float]:
    """Numbers in a call, or in a stored tensor; infinities are values, not positions."""
    if node.op in ("placeholder", "get_attr"):
        stored = constant_value(node, {})
        if stored.numel() == 0 or stored.numel() > 4096 or stored.dtype == torch.bool:
            return []
        return [c for c in [float(stored.abs().max())] if math.isfinite(c)]
    found: list[float] = []
    given = arguments(node)
    if overload_packet(node) in _LOOKUPS:
        given = {"start": given.get("start")}
    for name, value in given.items():
        if name == "dim" or isinstance(value, bool):
            continue
        numbers = value if isinstance(value, list | tuple) and name != "size" else [value]
        found += [float(n) for n in numbers if isinstance(n, int | float)]
    return [c for c in found if math.isfinite(c)]
