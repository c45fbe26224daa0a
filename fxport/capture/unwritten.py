"""Proves that forward nowhere writes to memory of which something was concluded.

    rows = x[order // K]        marked: their values are known beside the order, too
    rows[:1].mul_(2)            refused, with this line: what is known would be stale
    if self.ready == 0: ...     marked: the buffer's number was the answer
    self.ready.fill_(1)         refused

A mark is a node that `require_unwritten` reads off the whole graph, and removes: what is written
through a view, before the mark or after it, by whatever name, is found by its memory.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from fxport.capture.location import user_location
from fxport.capture.memory import Memory
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["mark_unwritten", "require_unwritten"]

aten = torch.ops.aten

_ITSELF = "fxport unwritten"
_ORIGIN = "fxport unwritten, nor what it is made of"
_ONCE = "fxport written by what made it alone"
# Made of nothing but the shape of what they are given.
_FACTORIES = (aten.zeros_like, aten.new_zeros)


def mark_unwritten(tensor: Tensor, *, origin: bool = False, once: bool = False) -> None:
    """Leaves a mark in the graph being traced.

    Args:
        origin: neither may anybody write to what it is computed from, back to the indices that a
            `topk` gave.
        once: it was just written to, as it had to be.
    """
    aten._assert_async.msg(tensor, _ORIGIN if origin else _ONCE if once else _ITSELF)


def require_unwritten(graph: fx.Graph) -> None:
    """Removes the marks of a graph.

    Raises:
        PortError: somebody writes to marked memory.
    """
    marks = [n for n in graph.nodes if _is_mark(n)]
    memory = Memory(graph) if marks else None
    for mark in marks:
        assert memory is not None
        marked = mark.args[0]
        origin = _origin(marked) if mark.args[1] == _ORIGIN else {marked}
        for node in origin:
            writers = memory.written_by(node)
            once = mark.args[1] == _ONCE
            others = writers[1:] if once else [w for w in writers if w not in origin]
            if others:
                raise PortError([_writes(others[0])])
    for mark in marks:
        graph.erase_node(mark)


def _is_mark(node: fx.Node) -> bool:
    return node.target is aten._assert_async.msg and node.args[1] in (_ITSELF, _ORIGIN, _ONCE)


def _origin(node: fx.Node) -> set[fx.Node]:
    """A node and what it is computed from, but for sizes: up to what has several results."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        at = pending.pop()
        if at in found:
            continue
        found.add(at)
        made = getattr(at.target, "overloadpacket", None) in _FACTORIES
        if at.target is not operator.getitem and not made:
            pending += [i for i in at.all_input_nodes if isinstance(i.meta.get("val"), Tensor)]
    return found


def _writes(writer: fx.Node) -> Reason:
    return Reason(
        ReasonCode.CAPTURE_FAILED,
        "forward writes into numbers that its path follows (a buffer that an `if` asks about), or "
        "into tokens sorted by their expert, their order, or what counts them",
        user_location(writer),
        "compute new tensors instead: rows = rows * weights; keep what changes out of forward",
    )
