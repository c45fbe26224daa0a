"""Tensors that say how often each expert was chosen.

bincount(chosen)                               [E]; also of what was sorted
one_hot(chosen, E).sum(0)                      [E]
histc(chosen.float(), E, min=0, max=E)         [E]
zeros(N, E).scatter_(1, chosen, 1).sum(0)      [E]; a token chooses no expert twice; or cast first
any of these .cumsum(0)                        where the run of each expert ends
ends - counts, cat([zeros(1), ends[:-1]])      where it begins; pad(ends, (1, 0)): and ends
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.mask_facts import ZEROS, distinct_along, index_bound, values_of

__all__ = ["Counts", "counts_of", "holds"]

aten = torch.ops.aten

_CASTS = (aten.to, aten._to_copy, aten.detach, aten.clone, aten.contiguous, aten.alias)
_WHOLE = (torch.int64, torch.int32, torch.float32)  # hold every count exactly
_ORDERS = (aten.argsort, aten.sort)

Sum = frozenset[int]


@dataclass(frozen=True)
class Counts:
    """How often some of the numbers below `experts` are among `values`.

    Attributes:
        sums: for each entry the experts that it counts together.
        least: how many entries there are at least; there may be none after the last expert that
            was chosen.
    """

    values: fx.Node
    experts: int
    sums: tuple[Sum, ...]
    least: int

    @property
    def of_each(self) -> bool:
        """Whether there is an entry for each expert, in order, and no other."""
        return self.whole and self.sums == _each(self.experts)

    @property
    def ends(self) -> bool:
        """Whether there is an entry for each expert, with those before it."""
        return self.whole and self.sums == tuple(_joined(_each(self.experts)))

    @property
    def whole(self) -> bool:
        """Whether every entry is there for all tokens."""
        return self.least == len(self.sums)


def _each(experts: int) -> tuple[Sum, ...]:
    return tuple(frozenset([expert]) for expert in range(experts))


def _joined(sums: tuple[Sum, ...]) -> list[Sum]:
    return list(itertools.accumulate(sums, operator.or_))


def counts_of(node: fx.Node) -> Counts | None:
    """What a tensor counts, entry by entry; None if that is not known."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    bound, packet = arguments(node), node.target.overloadpacket
    if node.meta["val"].dtype not in _WHOLE:
        return None
    if packet in _CASTS:
        return counts_of(bound["self"])
    if packet is aten.bincount:
        return None if bound["weights"] is not None else _of(bound["self"], bound["minlength"])
    if packet is aten.histc:
        return _of_bins(bound)
    if node.target is aten.sum.dim_IntList:
        return _of_sum(bound)
    return _made_of(node, bound, packet)


# --- sums of counts ------------------------------------------------------------------------------


def _made_of(node: fx.Node, bound: dict[str, Any], packet: Any) -> Counts | None:
    """Entries added up, taken off each other, left out, or joined with zeros."""
    if packet is aten.cumsum:
        found = counts_of(bound["self"])
        apart = found is not None and sum(map(len, found.sums)) == len(set().union(*found.sums))
        return replace(found, sums=tuple(_joined(found.sums))) if found and apart else None
    if packet is aten.sub:
        return _difference(bound)
    if packet is aten.slice:
        return _part(bound)
    if packet in (aten.pad, aten.constant_pad_nd):
        return _padded(bound)
    return _concatenated(bound) if packet is aten.cat else None


def _difference(bound: dict[str, Any]) -> Counts | None:
    one, other = bound["self"], bound["other"]
    if not isinstance(other, fx.Node) or bound.get("alpha", 1) != 1:
        return None
    a, b = counts_of(one), counts_of(other)
    if a is None or b is None or a.values is not b.values or not (a.whole and b.whole):
        return None
    if len(a.sums) != len(b.sums) or not all(y <= x for x, y in zip(a.sums, b.sums, strict=True)):
        return None
    return replace(a, sums=tuple(x - y for x, y in zip(a.sums, b.sums, strict=True)))


def _part(bound: dict[str, Any]) -> Counts | None:
    found, start, end = counts_of(bound["self"]), bound["start"] or 0, bound["end"]
    if found is None or not found.whole or bound["step"] != 1:
        return None
    if type(start) is not int or not (end is None or type(end) is int):
        return None
    sums = found.sums[start:end]
    return replace(found, sums=sums, least=len(sums))


def _padded(bound: dict[str, Any]) -> Counts | None:
    found, pad, value = counts_of(bound["self"]), bound["pad"], bound.get("value")
    if found is None or not found.whole or bound.get("mode", "constant") != "constant":
        return None
    if value not in (None, 0) or len(pad) != 2 or not all(type(n) is int for n in pad):
        return None
    if min(pad) < 0:
        return None
    nothing: Sum = frozenset()
    sums = ((nothing,) * pad[0]) + found.sums + ((nothing,) * pad[1])
    return replace(found, sums=sums, least=len(sums))


def _concatenated(bound: dict[str, Any]) -> Counts | None:
    parts = bound["tensors"]
    counted = [c for p in parts if (c := counts_of(p)) is not None]
    if not counted or any(c.values is not counted[0].values or not c.whole for c in counted):
        return None
    sums: tuple[Sum, ...] = ()
    for part in parts:
        found, size = counts_of(part), _zeros(part)
        if found is None and size is None:
            return None
        sums += found.sums if found is not None else (frozenset(),) * (size or 0)
    return replace(counted[0], sums=sums, least=len(sums))


def _zeros(node: fx.Node) -> int | None:
    """How many zeros a vector is."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in ZEROS or len(shape_of(node)) != 1:
        return None
    size = shape_of(node)[0]
    return size if isinstance(size, int) else None


# --- counts --------------------------------------------------------------------------------------


def _of(values: fx.Node, least: int | None = None) -> Counts | None:
    """A count that is longer than there are experts counts none."""
    source = _in_any_order(values)
    experts = index_bound(source)
    if experts is None or (least or 0) > experts or not holds(values, source, experts):
        return None
    return Counts(source, experts, _each(experts), experts if least is None else least)


def _in_any_order(values: fx.Node) -> fx.Node:
    """Through `values_of`, and sorts: ``sort(x)[0]``, ``x[x.argsort()]``."""
    source = values_of(values)
    while (unsorted := _unsorted(source)) is not None:
        source = values_of(unsorted)
    return source


def _unsorted(node: fx.Node) -> fx.Node | None:
    """A vector of which this is all entries, in another order."""
    if node.target is operator.getitem and node.args[1] == 0:
        made: Any = node.args[0]
        sorts = getattr(made.target, "overloadpacket", None) is aten.sort
        return arguments(made)["self"] if sorts and _is_vector(node) else None
    if node.target is not aten.index.Tensor or not _is_vector(node):
        return None
    source, indices = arguments(node)["self"], list(arguments(node)["indices"])
    if len(indices) != 1 or not _is_vector(source):
        return None
    order = indices[0]
    if order.target is operator.getitem and order.args[1] == 1:
        order = order.args[0]
    if getattr(order.target, "overloadpacket", None) not in _ORDERS:
        return None
    every = shape_of(arguments(order)["self"]) == shape_of(source)
    return source if every else None


def _is_vector(node: fx.Node) -> bool:
    return len(shape_of(node)) == 1


def holds(values: fx.Node, source: fx.Node, experts: int) -> bool:
    """Whether the types on the way hold every number of an expert."""
    node = values
    while node is not source:
        value = node.meta["val"]
        if isinstance(value, torch.Tensor) and torch.iinfo(value.dtype).max < experts - 1:
            return False
        node = node.all_input_nodes[0]
    return True


def _of_bins(bound: dict[str, Any]) -> Counts | None:
    source = bound["self"]
    if source.target is not aten.to.dtype or source.meta["val"].dtype is not torch.float32:
        return None
    found = _of(arguments(source)["self"])
    fits = found is not None and bound["bins"] == bound["max"] == found.experts
    return found if fits and bound["min"] == 0 else None


def _of_sum(bound: dict[str, Any]) -> Counts | None:
    source, keeps = bound["self"], bound["keepdim"]
    while getattr(source.target, "overloadpacket", None) in _CASTS:  # ones and zeros stay so
        source = arguments(source)["self"]
    rank = len(shape_of(source))
    others = sorted(d % rank for d in bound["dim"] or range(rank))
    made = isinstance(source.target, torch._ops.OpOverload)
    if keeps or others != list(range(rank - 1)) or not made:
        return None
    given, packet = arguments(source), source.target.overloadpacket
    if packet is aten.one_hot:
        found = _of(given["self"])
        return found if found is not None and shape_of(source)[-1] == found.experts else None
    scatters = source.target in (aten.scatter_.value, aten.scatter.value)
    if not scatters or rank != 2 or given["dim"] % 2 != 1:
        return None
    zeros, index, value = given["self"], given["index"], given["value"]
    packets = getattr(zeros.target, "overloadpacket", None)
    if packets not in ZEROS or type(value) is not int or value != 1:
        return None
    if distinct_along(index) != 1 or shape_of(index)[0] != shape_of(zeros)[0]:
        return None
    found = _of(index)
    return found if found is not None and shape_of(zeros)[-1] == found.experts else None
