"""Token ids that are looked up in another way than with `embedding`.

Before                                          After
    x = index(W [V, C], [ids])                      x = embedding(W, ids)
    x = index_select(W, 0, ids)                     x = embedding(W, ids)
    h = to(one_hot(ids, V), float32)
    x = matmul(h, W [V, C])                         x = embedding(W, ids)
    y = linear(h, U [C, V], b)                      y = embedding(t(U), ids) + b

A row times one, and zeros: the same numbers. An id outside the table was an error and stays one.
"""

from __future__ import annotations

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.emit import Emitter
from fxport.passes.constants import is_symbolic
from fxport.passes.split import passes_on

__all__ = ["look_up_in_tables"]

aten = torch.ops.aten

_CASTS = {aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default}


def look_up_in_tables(gm: fx.GraphModule, tokens: fx.Node) -> int:
    """Rewrites the graph in place.

    Args:
        tokens: the placeholder of the token ids.

    Returns:
        How many look-ups were replaced.
    """
    ids, natural, replaced = {tokens}, {tokens}, 0
    hot: dict[fx.Node, fx.Node] = {}  # ids as one-hot rows -> the ids
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if node.target is aten.one_hot.default and arguments(node)["self"] in ids:
            hot[node] = arguments(node)["self"]
        elif node.target in _CASTS and node.all_input_nodes[0] in hot:
            hot[node] = hot[node.all_input_nodes[0]]
        elif _made_of(node, ids):
            ids.add(node)
            if passes_on(node, natural) or _remainder(node):
                natural.add(node)
        else:
            replaced += _replace(gm, node, natural, hot)
    return replaced


def _made_of(node: fx.Node, ids: set[fx.Node]) -> bool:
    """Whether the node holds integers, and nothing but ids and numbers goes into it."""
    value = node.meta["val"]
    values = [n for n in node.all_input_nodes if not is_symbolic(n)]
    whole = not value.is_floating_point() and not value.is_complex()
    return whole and value.dtype != torch.bool and bool(values) and all(n in ids for n in values)


def _remainder(node: fx.Node) -> bool:
    """``ids * 31 % 1000`` is not negative whatever the ids are."""
    if node.target is not aten.remainder.Scalar:
        return False
    divisor = arguments(node)["other"]
    return isinstance(divisor, int) and divisor > 0


def _replace(
    gm: fx.GraphModule, node: fx.Node, natural: set[fx.Node], hot: dict[fx.Node, fx.Node]
) -> int:
    found = _indexed(node, natural) or _multiplied(node, hot)
    if found is None or not isinstance(shape_of(found[0])[0], int):
        return 0
    table, looked_up, bias = found
    emitter = Emitter(gm, node, [node])
    if node.target is aten.linear.default:
        table = emitter.call(aten.t.default, table)
    new = emitter.call(aten.embedding.default, table, looked_up)
    if bias is not None:
        new = emitter.call(aten.add.Tensor, new, bias)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return 1


Found = tuple[fx.Node, fx.Node, fx.Node | None]


def _indexed(node: fx.Node, natural: set[fx.Node]) -> Found | None:
    """Rows of a matrix; a negative index would count from the end, where `embedding` fails."""
    if node.target is aten.index.Tensor:
        given = arguments(node)
        chosen = [i for i in given["indices"] if i is not None]
        first = len(chosen) == 1 and given["indices"][0] is chosen[0]
    elif node.target is aten.index_select.default:
        given = arguments(node)
        chosen, first = [given["index"]], given["dim"] in (0, -2)
    else:
        return None
    table = given["self"]
    if not first or chosen[0] not in natural or len(shape_of(table)) != 2:
        return None
    return table, chosen[0], None


def _multiplied(node: fx.Node, hot: dict[fx.Node, fx.Node]) -> Found | None:
    """One-hot rows times a matrix that has a row, or a column, for each id."""
    if node.target is aten.linear.default:
        given = arguments(node)
        row, table, bias, axis = given["input"], given["weight"], given["bias"], 1
    elif node.target in (aten.matmul.default, aten.mm.default):
        row, table = node.all_input_nodes[0], node.all_input_nodes[-1]
        bias, axis = None, 0
        if list(node.args) != [row, table]:
            return None
    else:
        return None
    if row not in hot or table in hot or len(shape_of(table)) != 2:
        return None
    same = row.meta["val"].dtype == table.meta["val"].dtype
    return (table, hot[row], bias) if same and shape_of(table)[axis] == shape_of(row)[-1] else None
