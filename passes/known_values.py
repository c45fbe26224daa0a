"""Replaces values that are one number wherever they are looked at, for every length and batch.

Before                                                     After
    p = arange(T).unsqueeze(0).expand(B, T)                    same = full([B, 1, T, T], True)
    first = p[:, :1] - 1                                       mask = causal & same
    jumps = (diff(p, prepend=first) != 1).cumsum(-1)
    same = jumps[b, i] == jumps[b, j]
    mask = causal & same

That is how a library asks for packed documents where there are none: what is left of the question
would look like a mask that may treat every entry of the batch differently. A value is followed as
``offset + sum_k slope_k * index_k``; the proof holds for every size, nothing is evaluated. What
shares memory with something that is written to in place is left as it is.

Positions that are counted become plain ones:

    p = (ones(B, T).cumsum(1) * ones(B, T) - 1).long()  p = arange(T)[None].expand(B, T)

Ids that are looked up in an embedding table are never negative: ``ids == -1`` holds nowhere.
Neither does ``i - j >= T`` (`size_bounds`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import shape_of
from fxport.capture.memory import Memory
from fxport.passes.affine import FACTORIES, Affine, affine_value, stored_value
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.site import Left
from fxport.passes.attention.views import overload_packet
from fxport.passes.graph_facts import erase_dead, reachable

__all__ = ["fold_known_values"]

aten = torch.ops.aten


def fold_known_values(gm: fx.GraphModule, *, stored: bool = False) -> int:
    """Rewrites the graph in place.

    Args:
        stored: buffers keep what they hold.

    Returns:
        How many values were replaced.
    """
    known: dict[fx.Node, Affine] = {}
    memory = Memory(gm.graph)
    for node in gm.graph.nodes:
        if memory.written_by(node):
            continue  # how it was made does not say what it holds
        if not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        found = None
        if node.op == "call_function":
            found = affine_value(node, known)
        elif stored and node.op == "placeholder":
            found = stored_value(node)
        if found is not None:
            known[node] = found
    folded = 0
    for node, value in known.items():
        if node.op == "placeholder" or overload_packet(node) in FACTORIES:
            continue
        if not _matters(node, known):
            continue
        if value.is_replaced:
            folded += _replace(gm, node, known)
    if folded:
        erase_dead(gm)
        gm.recompile()
    return folded


def _matters(node: fx.Node, known: dict[fx.Node, Affine]) -> bool:
    """Whether something that will not be replaced itself reads it."""
    return any(u not in known or not known[u].is_replaced for u in node.users)


def _replace(gm: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Affine]) -> bool:
    inputs = [
        n for n in reachable(node.all_input_nodes) if isinstance(n.meta.get("val"), torch.Tensor)
    ]
    # `node` goes away, with what it was counted from: sizes are read off what stays, if they can.
    inputs.sort(key=lambda n: n in known)
    emitter = Emitter(gm, node, inputs)
    value, found = node.meta["val"], known[node]
    try:
        shape = emitter.sizes(shape_of(node))
    except Left:
        emitter.undo()
        return False
    if found.number is None:
        new = _count(emitter, found, shape, value)
    else:
        fill = bool(found.number) if value.dtype == torch.bool else found.number
        new = emitter.call(aten.full.default, shape, fill, dtype=value.dtype, device=value.device)
    node.replace_all_uses_with(new)
    return True


def _count(emitter: Emitter, found: Affine, shape: Any, value: torch.Tensor) -> fx.Node:
    (dim,) = (k for k, slope in enumerate(found.slopes) if slope)
    new = emitter.call(aten.arange.default, shape[dim], device=value.device)
    if found.slopes[dim] != 1:
        new = emitter.call(aten.mul.Tensor, new, found.slopes[dim])
    if found.offset:
        new = emitter.call(aten.add.Tensor, new, found.offset)
    if value.dtype != torch.int64:
        new = emitter.call(aten.to.dtype, new, value.dtype)
    for _ in range(dim + 1, len(shape)):
        new = emitter.call(aten.unsqueeze.default, new, -1)
    return emitter.call(aten.expand.default, new, shape)
