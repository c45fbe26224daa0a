"""What holds nothing is no part of what is joined.

    past = zeros(B, H, 0, D)                        scores = q @ k.mT
    keys = cat([past, k], dim=2)
    scores = q @ keys.mT

That is how a model with a cache is called without one. `cat` also takes ``tensor([])`` for nothing
in any place. The empty part may widen the result's type; then a cast stays.
"""

from __future__ import annotations

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.memory import Memory
from fxport.passes.graph_facts import erase_dead

__all__ = ["drop_empty_parts"]

aten = torch.ops.aten


def drop_empty_parts(gm: fx.GraphModule) -> int:
    """Rewrites the graph in place; returns how many parts went. What is written to stays."""
    memory = Memory(gm.graph)
    dropped = 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.cat.default):
        given = arguments(node)
        parts = [part for part in given["tensors"] if not _is_empty(part, node, given["dim"])]
        gone = len(given["tensors"]) - len(parts)
        if not parts or not gone or any(memory.written_by(n) for n in (node, *parts)):
            continue
        with gm.graph.inserting_before(node):
            if len({part.meta["val"].dtype for part in (node, *parts)}) > 1:
                parts = [_as(gm, part, node) for part in parts]
        if len(parts) > 1:
            node.args = (parts, given["dim"])
        else:
            node.replace_all_uses_with(parts[0])
        dropped += gone
    if dropped:
        erase_dead(gm)
        gm.recompile()
    return dropped


def _is_empty(part: fx.Node, joined: fx.Node, dim: int) -> bool:
    shape = shape_of(part)
    if shape == (0,):
        return True
    return len(shape) == len(shape_of(joined)) and shape[dim] == 0


def _as(gm: fx.GraphModule, part: fx.Node, joined: fx.Node) -> fx.Node:
    dtype = joined.meta["val"].dtype
    cast = gm.graph.call_function(aten.to.dtype, (part, dtype))
    cast.meta = {**joined.meta, "val": part.meta["val"].to(dtype)}
    return cast
