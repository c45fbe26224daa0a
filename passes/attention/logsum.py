"""The logarithm of a sum of exponentials, in whatever way it is written, and what cancels in it.

logsumexp(x)     log(sum(exp(x)))     m + log(sum(exp(x - m)))     logaddexp(logsumexp(x), sink)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.layout import LayoutError, is_one
from fxport.passes.attention.made import power_of
from fxport.passes.attention.quotient import Denominator, argument_of, denominator_of, reduction_of
from fxport.passes.attention.views import overload_packet, unviewed, viewed

__all__ = ["given_back", "log_sum_of"]

aten = torch.ops.aten

_MAX_DEPTH = 8


def log_sum_of(total: fx.Node, scores: fx.Node) -> Denominator | None:
    """The sum that `total` is the logarithm of, if it meets its own scores as they are."""
    base, views = unviewed(total)
    found = _log_sum(base, scores)
    if found is None:
        return None
    try:
        found = replace(found, dims=viewed(views, found.dims), nodes=(*found.nodes, *views))
    except LayoutError:
        return None
    return found if found.in_place else None


def _log_sum(node: fx.Node, scores: fx.Node) -> Denominator | None:
    packet = overload_packet(node)
    if packet is aten.logsumexp:
        found = reduction_of(node, aten.logsumexp)
        return found if found is not None and found.summed is scores else None
    if packet is aten.log:
        return _log(node, scores, None)
    orders = (node.args[:2], node.args[1::-1])
    if packet is aten.add and arguments(node).get("alpha", 1) == 1:
        for maximum, log in orders:
            if isinstance(maximum, fx.Node) and isinstance(log, fx.Node):
                found = _log(log, scores, maximum)
                if found is not None and shape_of(node) == shape_of(log):
                    return replace(found, nodes=(*found.nodes, node))
    if packet is aten.logaddexp:
        for total, sink in orders:
            if isinstance(total, fx.Node) and isinstance(sink, fx.Node):
                found = _log_sum(total, scores)
                if found is not None and found.sink is None and shape_of(node) == shape_of(total):
                    return replace(found, nodes=(*found.nodes, node), sink=(sink, found.dims))
    return None


def _log(node: fx.Node, scores: fx.Node, maximum: fx.Node | None) -> Denominator | None:
    """``log(sum(exp(scores - maximum)))``, without that if it is None."""
    below = argument_of(node, aten.log)
    under = denominator_of(below) if below is not None else None
    power = power_of(under.summed) if under is not None else None
    if under is None or power is None or power[1] != 1 or under.bound:
        return None
    nodes = (under.summed, *under.nodes, node)
    if maximum is None:
        plain = power[0] is scores and under.maximum is None
        return replace(under, summed=scores, nodes=nodes) if plain else None
    subtracted = _subtracted(power[0])
    if subtracted is None or not _is_same(subtracted, maximum, under):
        return None
    if under.sink is not None and under.maximum is not subtracted:
        return None
    found = given_back(power[0], subtracted, under.dim)
    if found is None or found[0] is not scores:
        return None
    return replace(under, summed=scores, nodes=(*found[1], *nodes), maximum=None)


def _subtracted(shifted: fx.Node) -> fx.Node | None:
    found = shifted.args[1] if overload_packet(shifted) is aten.sub else None
    return found if isinstance(found, fx.Node) else None


def _is_same(subtracted: fx.Node, added: fx.Node, under: Denominator) -> bool:
    """Whether what the sum's logarithm is added to is what was subtracted, each in its place."""
    (base, views), (other, more) = unviewed(subtracted), unviewed(added)
    if base is not other or more or shape_of(added) != _shape_of_sum(under):
        return False
    try:
        return replace(under, dims=viewed(views, under.dims)).in_place
    except LayoutError:
        return False


def _shape_of_sum(under: Denominator) -> tuple[object, ...]:
    return shape_of(under.nodes[-1])


def given_back(
    shifted: fx.Node, maximum: fx.Node, dim: int
) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """(x, the nodes) of ``x - m``, where m is the same all along `dim` and cancels."""
    if overload_packet(shifted) is not aten.sub or shifted.args[1] is not maximum:
        return None
    shape, scores = shape_of(maximum), shifted.args[0]
    if len(shape) != len(shape_of(shifted)) or not is_one(shape[dim]):
        return None
    if arguments(shifted).get("alpha", 1) != 1 or not isinstance(scores, fx.Node):
        return None
    return scores, (*_between(scores, maximum), shifted)


def _between(start: fx.Node, end: fx.Node, depth: int = _MAX_DEPTH) -> tuple[fx.Node, ...]:
    """The nodes that lead from `start` to `end`, and `end`."""
    if end is start or not depth:
        return ()
    inner = [n for given in end.all_input_nodes for n in _between(start, given, depth - 1)]
    return (*inner, end) if inner or start in end.all_input_nodes else ()
