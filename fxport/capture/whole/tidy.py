"""What is one piece, or takes all, says so: other lengths have more pieces, or take a part.

split(x, 512, 1)[0]       x, where that is all        cat([x], 1)      x
slice(x, 1, 0, 512)       x, where that is all

``cat([x.mT, nothing])`` lays x.mT out row after row, and becomes a copy. ``cat([x.mT])`` does not:
it has to be like the joins of several pieces, which go without one (`fxport.capture.whole.lift`).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of, takes_all
from fxport.capture.memory import Memory
from fxport.capture.whole.along import SPLITS, rank_of

__all__ = ["NOTHING_ADDED", "tidy"]

aten = torch.ops.aten

# Notes a copy in place of padding by nothing; see `fxport.capture.rephrase`.
NOTHING_ADDED = "fxport_nothing_added"


def tidy(gm: fx.GraphModule) -> None:
    """Rewrites a graph of plain sizes in place; what is written to stays."""
    memory = Memory(gm.graph)
    changed = False
    for node in list(gm.graph.nodes):
        same = _same(node) if node.op == "call_function" else None
        if same is not None and not memory.written_by(node) and not memory.written_by(same):
            if _lays_out_anew(node, same):
                node.target, node.args = aten.clone.default, (same,)
                node.kwargs = {"memory_format": torch.contiguous_format}
            else:
                node.replace_all_uses_with(same)
            changed = True
    if changed:
        gm.graph.eliminate_dead_code()


def _same(node: fx.Node) -> fx.Node | None:
    """The other value that this is."""
    if node.target is operator.getitem:
        made: Any = node.args[0]
        one = getattr(made.target, "overloadpacket", None) in SPLITS and len(made.meta["val"]) == 1
        return arguments(made)["self"] if one else None
    packet = getattr(node.target, "overloadpacket", None)
    if packet is aten.cat:
        return _only_part(node)
    if packet is aten.slice and takes_all(node):
        return arguments(node)["self"]  # type: ignore[no-any-return]
    if packet is aten.alias:  # so torch writes an index that takes all
        return node.all_input_nodes[0]
    noted = node.meta.get("custom", {}).get(NOTHING_ADDED)
    return node.all_input_nodes[0] if packet is aten.clone and noted else None


def _only_part(node: fx.Node) -> fx.Node | None:
    """The one part that holds anything."""
    given = arguments(node)
    dim, parts = given["dim"] % rank_of(node), given["tensors"]
    held = [p for p in parts if rank_of(p) != rank_of(node) or shape_of(p)[dim] > 0]
    same = len(held) == 1 and held[0].meta["val"].dtype == node.meta["val"].dtype
    return held[0] if same and shape_of(held[0]) == shape_of(node) else None


def _lays_out_anew(node: fx.Node, same: fx.Node) -> bool:
    """Whether a part is joined to nothing, and its rows do not follow each other yet."""
    joins = node.target is aten.cat.default and len(arguments(node)["tensors"]) > 1
    return joins and node.meta["val"].stride() != same.meta["val"].stride()
