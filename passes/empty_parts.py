"""What holds nothing is no part of what is joined.

    past = zeros(B, H, 0, D)                        scores = q @ k.mT
    keys = cat([past, k], dim=2)
    scores = q @ keys.mT

That is how a model with a cache is called without one. `cat` also takes ``tensor([])`` for nothing
in any place. The empty part may widen the result's type; then a cast stays. What is laid out anew
by joining is copied.

    mask = hstack([zeros(T, 0), future])            mask = future
"""

from __future__ import annotations

from typing import Any

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
    for node in [n for n in gm.graph.nodes if n.target in _DIMENSIONS]:
        tensors, dim = arguments(node)["tensors"], _along(node)
        parts = [part for part in tensors if not _is_empty(part, node, dim)]
        gone = len(tensors) - len(parts)
        if not parts or not gone or any(memory.written_by(n) for n in (node, *parts)):
            continue
        if any(len(shape_of(part)) != len(shape_of(node)) for part in parts):
            continue  # rows that vstack makes matrices of
        with gm.graph.inserting_before(node):
            if len({part.meta["val"].dtype for part in (node, *parts)}) > 1:
                parts = [_as(gm, part, node) for part in parts]
        if len(parts) > 1:
            node.target, node.args, node.kwargs = aten.cat.default, (parts, dim), {}
        elif _strides(parts[0]) == _strides(node):
            node.replace_all_uses_with(parts[0])
        else:
            node.target, node.args = aten.clone.default, (parts[0],)
            node.kwargs = {"memory_format": torch.contiguous_format}
        dropped += gone
    if dropped:
        erase_dead(gm)
        gm.recompile()
    return dropped


# What each joins along; None: its argument says it.
_DIMENSIONS: dict[Any, int | None] = {
    aten.cat.default: None,
    aten.hstack.default: 1,
    aten.vstack.default: 0,
}


def _along(node: fx.Node) -> int:
    dim = _DIMENSIONS[node.target]
    if dim is None:
        return arguments(node)["dim"]  # type: ignore[no-any-return]
    first = arguments(node)["tensors"][0]
    return min(dim, len(shape_of(first)) - 1)


def _is_empty(part: fx.Node, joined: fx.Node, dim: int) -> bool:
    shape = shape_of(part)
    if shape == (0,):
        return True
    return len(shape) == len(shape_of(joined)) and shape[dim] == 0


def _strides(node: fx.Node) -> list[Any]:
    strides: tuple[int | torch.SymInt, ...] = node.meta["val"].stride()
    return [s if isinstance(s, int) else s.node.expr for s in strides]


def _as(gm: fx.GraphModule, part: fx.Node, joined: fx.Node) -> fx.Node:
    dtype = joined.meta["val"].dtype
    cast = gm.graph.call_function(aten.to.dtype, (part, dtype))
    cast.meta = {**joined.meta, "val": part.meta["val"].to(dtype)}
    return cast
