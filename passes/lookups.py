"""Looks the token ids up before they are turned, for models that work on ``[T, B]``.

Before                                    After
    turned = t(ids)         [T, B]            found = embedding(W, ids)        [B, T, C]
    x = embedding(W, turned) [T, B, C]        x = transpose(found, 0, 1)       [T, B, C]

vLLM looks tokens up itself, in the order in which it has them.
"""

from __future__ import annotations

import torch
from torch import fx

from fxport.capture.arguments import arguments
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.views import overload_packet

__all__ = ["look_up_first"]

aten = torch.ops.aten

_SAME = {aten.contiguous, aten.clone, aten.alias, aten.detach}
_TURNS = {aten.t, aten.transpose, aten.permute, aten.numpy_T, aten.mT}


def look_up_first(gm: fx.GraphModule, tokens: fx.Node) -> int:
    """Rewrites the graph in place.

    Args:
        tokens: the placeholder of the token ids ``[B, T]``.

    Returns:
        How many look-ups were replaced.
    """
    turned = {tokens: False}
    replaced = 0
    for node in list(gm.graph.nodes):
        if node.target is aten.embedding.default:
            ids = arguments(node)["indices"]
            if ids in turned and ids is not tokens:
                _look_up(gm, node, ids, tokens, swapped=turned[ids])
                replaced += 1
            continue
        source = next(iter(node.all_input_nodes), None)
        if source in turned and len(node.all_input_nodes) == 1:
            packet = overload_packet(node)
            if packet in _TURNS:
                turned[node] = turned[source] != _swaps(node)
            elif packet in _SAME:
                turned[node] = turned[source]
    return replaced


def _swaps(node: fx.Node) -> bool:
    """Whether a turn of two axes exchanges them: it may name the same axis twice."""
    dims = [v for name, v in arguments(node).items() if name != "self"]
    if overload_packet(node) is aten.permute:
        return [d % 2 for d in dims[0]] == [1, 0]
    return not dims or dims[0] % 2 != dims[1] % 2


def _look_up(
    gm: fx.GraphModule, node: fx.Node, ids: fx.Node, tokens: fx.Node, *, swapped: bool
) -> None:
    emitter = Emitter(gm, node, [node])
    args, kwargs = fx.node.map_arg(
        (node.args, dict(node.kwargs)), lambda n: tokens if n is ids else n
    )
    new = emitter.call(aten.embedding.default, *args, **kwargs)
    if swapped:
        new = emitter.call(aten.transpose.int, new, 0, 1)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
