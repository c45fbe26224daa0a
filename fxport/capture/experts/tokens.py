"""Whether a tensor holds the token of every slot: 0, 0, 1, 1, 2, .. for two slots of each.

arange(N).repeat_interleave(K)
arange(N)[:, None].expand(-1, K).reshape(-1)     unsqueeze, view; repeat, expand_as; flatten
arange(N * K) // K
arange(N)                                        one slot of each
"""

from __future__ import annotations

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.run_lengths import same

__all__ = ["numbers_experts", "slots_of_each_token"]

aten = torch.ops.aten

_EXACT = (torch.int64, torch.int32)
_SAME = (aten.to, aten._to_copy, aten.contiguous, aten.clone, aten.detach, aten.alias)
_SHAPES = (aten.view, aten.reshape, aten._unsafe_view, aten.flatten)
_COLUMNS = (*_SHAPES, aten.unsqueeze)
_WIDENS = (aten.expand, aten.expand_as, aten.repeat)
_FLOORS = (aten.floor_divide, aten.div)


def slots_of_each_token(node: fx.Node) -> int | None:
    """K, where entry i of a vector is ``i // K`` for all inputs; None if that is not known."""
    node = _without_copies(node)
    packet = getattr(node.target, "overloadpacket", None)
    if packet is aten.repeat_interleave:
        return _repeated(node)
    if packet in _FLOORS:
        return _divided(node)
    if _counts_up(node):
        return 1
    return _widened(node) if packet in _SHAPES and len(shape_of(node)) == 1 else None


def numbers_experts(node: fx.Node, experts: int) -> bool:
    """Whether a vector is ``arange(experts)``."""
    return _counts_up(node) and shape_of(_without_copies(node)) == (experts,)


def _without_copies(node: fx.Node) -> fx.Node:
    """As long as every number is held exactly."""
    while getattr(node.target, "overloadpacket", None) in _SAME and _exact(node):
        node = node.all_input_nodes[0]
    return node


def _exact(node: fx.Node) -> bool:
    return node.meta["val"].dtype in _EXACT


def _counts_up(node: fx.Node) -> bool:
    """``arange(N)``: entry i is i."""
    node = _without_copies(node)
    if getattr(node.target, "overloadpacket", None) is not aten.arange or not _exact(node):
        return False
    given = arguments(node)
    return same(given.get("start", 0), 0) and same(given.get("step", 1), 1)


def _repeated(node: fx.Node) -> int | None:
    given = arguments(node)
    times = given.get("repeats")
    vector = "self" in given and given.get("dim") in (None, 0, -1)
    return times if type(times) is int and vector and _counts_up(given["self"]) else None


def _divided(node: fx.Node) -> int | None:
    given = arguments(node)
    by, mode = given["other"], given.get("rounding_mode", "floor")
    whole = type(by) is int and by > 0 and _exact(node) and mode in ("floor", "trunc")
    return by if whole and _counts_up(given["self"]) else None


def _widened(node: fx.Node) -> int | None:
    """A column ``[N, 1]`` of all tokens beside itself, K times, read row by row."""
    wide = _without_copies(node.all_input_nodes[0])
    if getattr(wide.target, "overloadpacket", None) not in _WIDENS:
        return None
    column = _without_copies(wide.all_input_nodes[0])
    if getattr(column.target, "overloadpacket", None) not in _COLUMNS:
        return None
    counted, shape, times = column.all_input_nodes[0], shape_of(column), shape_of(wide)[-1]
    upright = len(shape) == 2 and shape[1] == 1 and len(shape_of(wide)) == 2
    rows = upright and shape_of(wide)[0] == shape[0] and len(shape_of(counted)) == 1
    return times if rows and type(times) is int and _counts_up(counted) else None
