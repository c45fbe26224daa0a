"""One spelling for what is then divided.

Before                                        After
    y = addmm(b, x, w)                            y = mm(x, w) + b
    k = y[..., [-1], :]                           k = slice(y, -2, 3, 4)

Both are common: GPT-2's weights are stored the other way round, Falcon's keys are taken by a list.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input

__all__ = ["one_spelling"]

aten = torch.ops.aten
_PRODUCTS: dict[Any, Any] = {
    aten.addmm.default: aten.mm.default,
    aten.baddbmm.default: aten.bmm.default,
}


def one_spelling(gm: fx.GraphModule) -> None:
    """Rewrites the graph in place."""
    for node in list(gm.graph.nodes):
        if node.target in _PRODUCTS:
            _split_sum(gm.graph, node)
        elif node.target is aten.index.Tensor:
            _slice(gm.graph, node)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _split_sum(graph: fx.Graph, node: fx.Node) -> None:
    found = arguments(node)
    if found["alpha"] != 1 or found["beta"] != 1:
        return
    one, other = (v for k, v in found.items() if k in ("mat1", "mat2", "batch1", "batch2"))
    with graph.inserting_before(node):
        product = graph.call_function(_PRODUCTS[node.target], (one, other))
    product.meta = dict(node.meta)
    node.target, node.args, node.kwargs = aten.add.Tensor, (product, found["self"]), {}


def _slice(graph: fx.Graph, node: fx.Node) -> None:
    """One dimension is indexed, by a list that counts up evenly."""
    found = arguments(node)
    value, indices = found["self"], found["indices"]
    given = [d for d, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        return
    dim, size = given[0], shape_of(value)[given[0]]
    places = _constant(indices[dim])
    if places is None or not isinstance(size, int):
        return
    places = [p % size for p in places]
    step = places[1] - places[0] if len(places) > 1 else 1
    if step < 1 or places != list(range(places[0], places[-1] + 1, step)):
        return
    node.target = aten.slice.Tensor
    node.args, node.kwargs = (value, dim, places[0], places[-1] + 1, step), {}


def _constant(index: Any) -> list[int] | None:
    while index.target in (aten.lift_fresh_copy.default, aten.lift_fresh.default):
        index = index.args[0]
    if index.op != "placeholder" or graph_input(index).kind is not InputKind.BUFFER:
        return None
    value = graph_input(index).value
    if value is None or value.dtype is not torch.int64 or value.dim() != 1 or not value.numel():
        return None
    return [int(v) for v in value]
