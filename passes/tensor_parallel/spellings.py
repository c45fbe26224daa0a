"""One spelling for what is then divided.

Before                                        After
    y = addmm(b, x, w)                            y = mm(x, w) + b
    y = x @ E.T                                   y = linear(x, E)
    y = einsum("btc,vc->btv", x, E)               y = linear(x, E)
    y = einsum("bthd,hdc->bthc", z, W).sum(2)     y = einsum("bthd,hdc->btc", z, W)
    y = conv1d(x, W [N, K, 1], b)                 y = linear(x.mT, W[:, :, 0], b).mT
    k = y[..., [-1], :]                           k = slice(y, -2, 3, 4)
    g, u = tensor_split(y [.., 90], 2, -1)        g, u = split(y, [45, 45], -1)
    y = einsum("bhtd->bthd", x)                   y = permute(x, [0, 2, 1, 3])
    y = where(m, x + v, x)                        y = x + where(m, v, 0)
    y = where(m, x, zeros_like(x))                y = where(m, x, 0)

All are common: GPT-2's weights are stored the other way round, a head is the token embedding,
Falcon's keys are taken by a list, the results of heads are added up, a convolution over one token
is a projection, ``y[rows] += expert(x[rows])`` gives each expert's result to its rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of, shape_of_tensor
from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.constants import depends_on
from fxport.passes.tensor_parallel.contraction import contraction
from fxport.passes.tensor_parallel.writing import write

__all__ = ["one_spelling"]

aten = torch.ops.aten
_PRODUCTS: dict[Any, Any] = {
    aten.addmm.default: aten.mm.default,
    aten.baddbmm.default: aten.bmm.default,
}
_SPLITS = (aten.tensor_split.sections, aten.tensor_split.indices)
_TURNED = ([1, 0], [-1, 0], [1, -2], [-1, -2])


def one_spelling(gm: fx.GraphModule) -> None:
    """Rewrites the graph in place."""
    data = depends_on(gm, InputKind.DATA)
    for node in list(gm.graph.nodes):
        if node.target in _PRODUCTS:
            _split_sum(gm.graph, node)
        elif node.target is aten.conv1d.default:
            _convolution(gm.graph, node)
        elif node.target is aten.sum.dim_IntList:
            _sum_of_products(node, data)
        elif node.target in (aten.matmul.default, aten.mm.default, aten.einsum.default):
            _projection(node, data)
        elif node.target is aten.index.Tensor:
            _slice(gm.graph, node)
        elif node.target in _SPLITS:
            _split(node)
        elif node.target is aten.broadcast_to.default:
            node.target = aten.expand.default
        elif node.target is aten.where.self:
            _selected_sum(gm.graph, node)
            _selected_or_zero(node)
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


def _convolution(graph: fx.Graph, node: fx.Node) -> None:
    """Over one token at a time."""
    found = arguments(node)
    x, weight = found["input"], found["weight"]
    plain = found["groups"] == 1 and set(found["stride"]) == {1} and set(found["padding"]) == {0}
    if not plain or shape_of(weight)[2] != 1 or len(shape_of(x)) != 3:
        return
    with graph.inserting_before(node):
        turned = write(graph, node, aten.transpose.int, x, 1, 2)
        rows = write(graph, node, aten.select.int, weight, 2, 0)
        y = write(graph, node, aten.linear.default, turned, rows, found["bias"])
    node.target, node.args, node.kwargs = aten.transpose.int, (y, 1, 2), {}


def _sum_of_products(node: fx.Node, data: set[fx.Node]) -> None:
    """A sum over a dimension that both operands of a product have is part of the product."""
    found = arguments(node)
    product, dims = found["self"], found["dim"]
    if product.target is not aten.einsum.default or len(product.users) > 1:
        return
    if not dims or found["keepdim"] or found["dtype"] is not None:
        return
    of = contraction(product, data)
    if of is None:
        return
    summed = {of.of_result[d] for d in dims}
    if not summed <= set(of.shared):
        return
    result = "".join(c for c in of.of_result if c not in summed)
    equation = f"{of.of_data},{of.of_weight}->{result}"
    node.target, node.args, node.kwargs = aten.einsum.default, (equation, [of.data, of.weight]), {}


def _projection(node: fx.Node, data: set[fx.Node]) -> None:
    """A product with the rows of a matrix."""
    if _permuted(node):
        return
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


def _permuted(node: fx.Node) -> bool:
    """An einsum of one operand that sums nothing only names its dimensions in another order."""
    found = arguments(node)
    if node.target is not aten.einsum.default or len(found["tensors"]) != 1:
        return False
    before, arrow, after = found["equation"].replace(" ", "").partition("->")
    if not arrow or not before.isalpha() or len(set(before)) < len(before):
        return False
    if sorted(before) != sorted(after):
        return False
    node.target, node.kwargs = aten.permute.default, {}
    node.args = (found["tensors"][0], [before.index(letter) for letter in after])
    return True


def _split(node: fx.Node) -> None:
    """Parts of sizes that do not depend on the tokens."""
    found = arguments(node)
    value, dim = found["self"], found["dim"]
    size = shape_of(value)[dim]
    parts = [shape_of_tensor(part)[dim] for part in node.meta["val"]]
    if isinstance(size, int) and all(isinstance(n, int) for n in parts) and sum(parts) == size:
        node.target = aten.split_with_sizes.default
        node.args, node.kwargs = (value, parts, dim), {}


def _selected_sum(graph: fx.Graph, node: fx.Node) -> None:
    """Where something is added, or nothing: so it can be added up before it is chosen."""
    found = arguments(node)
    total, base = found["self"], found["other"]
    if total.target is not aten.add.Tensor or len(total.users) > 1:
        return
    given = arguments(total)
    operands = [given["self"], given["other"]]
    if given["alpha"] != 1 or operands.count(base) != 1:
        return
    added = operands[1 - operands.index(base)]
    if not isinstance(added, fx.Node) or shape_of(added) != shape_of(node):
        return
    with graph.inserting_before(node):
        chosen = write(graph, node, aten.where.ScalarOther, found["condition"], added, 0)
    node.target, node.args, node.kwargs = aten.add.Tensor, (base, chosen), {}


def _selected_or_zero(node: fx.Node) -> None:
    found = arguments(node)
    chosen, zeros = found.get("self"), found.get("other")
    if node.target is not aten.where.self or zeros.target is not aten.zeros_like.default:  # type: ignore[union-attr]
        return
    dtypes = {v.meta["val"].dtype for v in (chosen, zeros)}  # type: ignore[union-attr]
    if len(dtypes) == 1 and shape_of(chosen) == shape_of(node):  # type: ignore[arg-type]
        node.target, node.args = aten.where.ScalarOther, (found["condition"], chosen, 0)
        node.kwargs = {}


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
