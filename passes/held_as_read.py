"""Holds a weight in the dtype in which it is read.

Before                                       After
    w [4C, C] float32                            w [4C, C] bfloat16
    linear(x, to(w, bfloat16))                   linear(x, w)

Loading rounds as the cast does; so the weight takes half the memory, nothing is cast for every
token, and the linear layer is vLLM's own. Only where nothing reads the weight otherwise: a table
that is looked up in float32 and projected on in bfloat16 stays in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import fx

from fxport.serving import Part, ServingGraph

__all__ = ["hold_as_read"]

aten = torch.ops.aten


def hold_as_read(serving: ServingGraph) -> ServingGraph:
    """The same port with such casts dropped; the graphs are changed, the record is new."""
    parts = (serving.embed, serving.body, serving.head)
    dtypes = dict(serving.dtypes)
    for name in serving.parameters:
        casts = [user for part in parts for user in _readers(part, name)]
        found = {_cast_to(node) for node in casts}
        dtype = found.pop() if len(found) == 1 else None
        if dtype is None or not serving.dtype_of(name).is_floating_point:
            continue
        for cast in casts:
            cast.replace_all_uses_with(cast.all_input_nodes[0])
            cast.graph.erase_node(cast)
        dtypes[name] = dtype
    return dataclasses.replace(serving, dtypes=dtypes)


def _readers(part: Part, name: str) -> Iterator[fx.Node]:
    for node in part.graph.find_nodes(op="placeholder"):
        if part.weights.get(node.name) == name:
            yield from node.users


def _cast_to(node: fx.Node) -> torch.dtype | None:
    """The floating dtype that a node casts to, where it does nothing else."""
    dtype = node.args[1] if node.target is aten.to.dtype and len(node.args) > 1 else None
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None
