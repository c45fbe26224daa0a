"""Tensors that say how often each expert was chosen.

bincount(chosen)                               [E]
one_hot(chosen, E).sum(0)                      [E]
histc(chosen.float(), E, min=0, max=E)         [E]
zeros(N, E).scatter_(1, chosen, 1).sum(0)      [E]; a token chooses no expert twice; or cast first
any of these .cumsum(0)                        where the run of each expert ends
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.mask_facts import distinct_along, index_bound, values_of

__all__ = ["Counts", "counts_of", "holds"]

aten = torch.ops.aten

_ZEROS = (aten.zeros, aten.new_zeros, aten.zeros_like)
_CASTS = (aten.to, aten._to_copy, aten.detach, aten.clone, aten.contiguous, aten.alias)
_WHOLE = (torch.int64, torch.int32, torch.float32)  # hold every count exactly


@dataclass(frozen=True)
class Counts:
    """How often each number below `experts` is among `values`.

    Attributes:
        least: how many entries there are at least; up to the last expert that was chosen.
        ends: whether each entry is the sum of those up to it.
    """

    values: fx.Node
    experts: int
    least: int
    ends: bool = False


def counts_of(node: fx.Node) -> Counts | None:
    """What a tensor counts, one entry for each expert; None if that is not known."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    bound, packet = arguments(node), node.target.overloadpacket
    if node.meta["val"].dtype not in _WHOLE:
        return None
    if packet in _CASTS:
        return counts_of(bound["self"])
    if packet is aten.cumsum:
        found = counts_of(bound["self"])
        return None if found is None or found.ends else replace(found, ends=True)
    if packet is aten.bincount:
        return None if bound["weights"] is not None else _of(bound["self"], bound["minlength"])
    if packet is aten.histc:
        return _of_bins(bound)
    return _of_sum(bound) if node.target is aten.sum.dim_IntList else None


def _of(values: fx.Node, least: int | None = None) -> Counts | None:
    """A count that is longer than there are experts counts none."""
    source = values_of(values)
    experts = index_bound(source)
    if experts is None or (least or 0) > experts or not holds(values, source, experts):
        return None
    return Counts(source, experts, experts if least is None else least)


def holds(values: fx.Node, source: fx.Node, experts: int) -> bool:
    """Whether the types on the way hold every number of an expert."""
    node = values
    while node is not source:
        if torch.iinfo(node.meta["val"].dtype).max < experts - 1:
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
    if packets not in _ZEROS or type(value) is not int or value != 1:
        return None
    if distinct_along(index) != 1 or shape_of(index)[0] != shape_of(zeros)[0]:
        return None
    found = _of(index)
    return found if found is not None and shape_of(zeros)[-1] == found.experts else None
