"""One spelling for what is then divided.

Before                                        After
    y = addmm(b, x, w)                            y = mm(x, w) + b
    y = x @ E.T                                   y = linear(x, E)
    y = einsum("btc,vc->btv", x, E)               y = linear(x, E)
    k = y[..., [-1], :]                           k = slice(y, -2, 3, 4)

All are common: GPT-2's weights are stored the other way round, a head is the token embedding,
Falcon's keys are taken by a list.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.constants import depends_on
from fxport.passes.tensor_parallel.contraction import contraction

__all__ = ["one_spelling"]

aten = torch.ops.aten
_PRODUCTS: dict[Any, Any] = {
    aten.addmm.default: aten.mm.default,
    aten.baddbmm.default: aten.bmm.default,
}
_TURNED = ([1, 0], [-1, 0], [1, -2], [-1, -2])


def one_spelling(gm: fx.GraphModule) -> None:
    """Rewrites the graph in place."""
    data = depends_on(gm, InputKind.DATA)
    for node in list(gm.graph.nodes):
        if node.target in _PRODUCTS:
            _split_sum(gm.graph, node)
        elif node.target in (aten.matmul.default, aten.mm.default, aten.einsum.default):
            _projection(node, data)
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


def _projection(node: fx.Node, data: set[fx.Node]) -> None:
    """A product with the rows of a matrix."""
    found = contraction(node, data)
    if found is None or found.of_data != found.rows + found.summed or len(found.summed) != 1:
        return
    if found.of_result != found.rows + found.new or len(found.new) != 1:
        return
    rows = found.weight
    if found.of_weight != found.new + found.summed:
        if not _turns(rows):
            return
        rows = rows.all_input_nodes[0]
    node.target, node.args, node.kwargs = aten.linear.default, (found.data, rows, None), {}


def _turns(node: fx.Node) -> bool:
    """Whether a matrix is another one turned over."""
    if node.target in (aten.t.default, aten.mT.default, aten.numpy_T.default):
        return True
    if node.target is aten.transpose.int:
        found = arguments(node)
        return {found["dim0"] % 2, found["dim1"] % 2} == {0, 1}
    return node.target is aten.permute.default and list(arguments(node)["dims"]) in _TURNED


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
