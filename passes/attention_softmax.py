"""Where attentions may be: every softmax of a graph, written as one call or out in full.

softmax(x)     log_softmax(x).exp()     e = exp(x - amax(x)); e / sum(e)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fxport.capture.arguments import arguments
from fxport.passes.attention_views import overload_packet

__all__ = ["Softmax", "softmaxes", "subtracted_maximum"]

aten = torch.ops.aten

_CALLS = {aten.softmax, aten._softmax, aten.special_softmax, aten._safe_softmax}
_LOGS = {aten.log_softmax, aten._log_softmax, aten.special_log_softmax}
_QUOTIENTS = {aten.div, aten.true_divide}


@dataclass(frozen=True)
class Softmax:
    """One softmax.

    Attributes:
        start: the node it is reported by.
        scores: what it is taken of.
        weights: its result.
        dim: the axis, maybe negative.
        nodes: the nodes it consists of.
        zero_rows: gives zeros where everything is -inf, instead of NaN.
    """

    start: fx.Node
    scores: fx.Node
    weights: fx.Node
    dim: int
    nodes: tuple[fx.Node, ...]
    zero_rows: bool = False


def softmaxes(graph: fx.Graph) -> Iterator[Softmax]:
    """Every softmax, in graph order. The graph must not change in between."""
    for node in graph.nodes:
        packet = overload_packet(node)
        found: Softmax | None = None
        if packet in _CALLS:
            given = arguments(node)
            zero_rows = packet is aten._safe_softmax
            found = Softmax(node, given["self"], node, given["dim"], (node,), zero_rows)
        elif packet is aten.exp:
            found = _exponential_of_log(node)
        elif packet in _QUOTIENTS:
            found = _quotient(node)
        if found is not None:
            yield found


def _exponential_of_log(node: fx.Node) -> Softmax | None:
    log = node.args[0]
    if not isinstance(log, fx.Node) or overload_packet(log) not in _LOGS or len(log.users) != 1:
        return None
    given = arguments(log)
    return Softmax(log, given["self"], node, given["dim"], (log, node))


def _quotient(node: fx.Node) -> Softmax | None:
    """``e / e.sum(dim, keepdim=True)`` with ``e = exp(x)``."""
    top, bottom = node.args[0], node.args[1]
    if not isinstance(top, fx.Node) or not isinstance(bottom, fx.Node):
        return None
    if overload_packet(top) is not aten.exp or overload_packet(bottom) is not aten.sum:
        return None
    given = arguments(bottom)
    dims = given.get("dim")
    if given["self"] is not top or not given.get("keepdim") or dims is None or len(dims) != 1:
        return None
    if given.get("dtype") is not None or arguments(node).get("rounding_mode") is not None:
        return None
    scores = top.args[0]
    assert isinstance(scores, fx.Node)
    return Softmax(node, scores, node, dims[0], (top, bottom, node))


def subtracted_maximum(scores: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes of the maximum in ``x - amax(x)``, which changes no softmax; () otherwise."""
    if overload_packet(scores) is not aten.sub or not isinstance(scores.args[1], fx.Node):
        return ()
    known = (aten.amax, aten.max, aten.detach)
    found: list[fx.Node] = []
    node: object = scores.args[1]
    while isinstance(node, fx.Node) and node is not scores.args[0]:
        first = node.target is operator.getitem and node.args[1] == 0
        if not first and overload_packet(node) not in known:
            return ()
        found.append(node)
        node = node.args[0]
    reductions = [n for n in found if overload_packet(n) is not aten.detach]
    kept = [n for n in reductions if n.target is operator.getitem or arguments(n).get("keepdim")]
    return tuple(found) if kept else ()
