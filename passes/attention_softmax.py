"""Where attentions may be: every softmax of a graph, written as one call or out in full.

softmax(x)     log_softmax(x).exp()     e = exp(x - amax(x)); e / sum(e)
(e @ v) / sum(e)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fxport.capture.arguments import arguments
from fxport.passes.attention_products import as_product
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
        quotient: the division by the sum, when it comes after the product with the values;
            `weights` are then not divided yet.
    """

    start: fx.Node
    scores: fx.Node
    weights: fx.Node
    dim: int
    nodes: tuple[fx.Node, ...]
    zero_rows: bool = False
    quotient: fx.Node | None = None


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
    """``e / e.sum(dim, keepdim=True)`` with ``e = exp(x)``, or ``(e @ v) / e.sum(..)``."""
    top, bottom = node.args[0], node.args[1]
    if not isinstance(top, fx.Node) or not isinstance(bottom, fx.Node):
        return None
    found = _kept_sum(bottom)
    if found is None or arguments(node).get("rounding_mode") is not None:
        return None
    exponential, dim, nodes = found
    if overload_packet(exponential) is not aten.exp:
        return None
    scores = exponential.args[0]
    assert isinstance(scores, fx.Node)
    if exponential is top:
        return Softmax(node, scores, node, dim, (top, *nodes, node))
    if not _divides_rows(top, exponential, dim):
        return None
    return Softmax(node, scores, exponential, dim, (exponential, *nodes), quotient=node)


def _kept_sum(node: fx.Node) -> tuple[fx.Node, int, tuple[fx.Node, ...]] | None:
    """(what is summed, over which dimension, the nodes) of a sum that keeps its dimension."""
    total = node
    if overload_packet(node) is aten.unsqueeze:
        total = arguments(node)["self"]
    if overload_packet(total) is not aten.sum:
        return None
    given = arguments(total)
    dims = given.get("dim")
    if dims is None or len(dims) != 1 or given.get("dtype") is not None:
        return None
    rank = given["self"].meta["val"].dim()
    dim = dims[0] % rank
    if total is node:
        return (given["self"], dim, (node,)) if given.get("keepdim") else None
    if given.get("keepdim") or arguments(node)["dim"] % rank != dim:
        return None
    return given["self"], dim, (total, node)


def _divides_rows(top: fx.Node, exponential: fx.Node, dim: int) -> bool:
    """Whether `top` is a product of the exponentials in whose rows the sum stands as it is."""
    product = as_product(top)
    if product is None or exponential not in (product.left, product.right):
        return False
    own = product.labels[0 if product.left is exponential else 1]
    result = product.labels[2]
    return (
        dim == len(own) - 1
        and len(result) == len(own)
        and result[:-1] == own[:-1]
        and own[-1] not in result
    )


def subtracted_maximum(scores: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes of the maximum in ``x - amax(x)``, which changes no softmax; () otherwise."""
    if overload_packet(scores) is not aten.sub or not isinstance(scores.args[1], fx.Node):
        return ()
    known = (aten.amax, aten.max, aten.detach, aten.unsqueeze)
    found: list[fx.Node] = []
    node: object = scores.args[1]
    while isinstance(node, fx.Node) and node is not scores.args[0]:
        first = node.target is operator.getitem and node.args[1] == 0
        if not first and overload_packet(node) not in known:
            return ()
        found.append(node)
        node = node.args[0]
    kept = [n for n in found if _keeps_dimension(n)]
    return tuple(found) if kept else ()


def _keeps_dimension(node: fx.Node) -> bool:
    packet = overload_packet(node)
    if node.target is operator.getitem or packet is aten.unsqueeze:
        return True
    return packet is not aten.detach and bool(arguments(node).get("keepdim"))
