"""The longest sequence that learned position tables allow.

    embedding(wpe.weight [64, C], arange(2, T + 2))     T <= 62

torch.export sees shapes only: an index beyond the table is an error at run time, not at capture.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.constants import depends_on, evaluate

__all__ = ["longest_sequence"]

aten = torch.ops.aten

# Index tensors are evaluated up to this length; a longer table does not bound the model here.
_HORIZON = 2**17


def longest_sequence(gm: fx.GraphModule, length: sympy.Symbol, limit: int | None) -> int | None:
    """The smaller of `limit` and what every look-up at constant positions allows."""
    varying = depends_on(gm, InputKind.DATA, InputKind.PARAMETER)
    horizon = min(limit or _HORIZON, _HORIZON)
    batch = _others(gm, length)
    for node in gm.graph.nodes:
        found = _lookup(node)
        if found is None or found[0] in varying:
            continue
        index, rows = found
        if shape_of(index).count(length) != 1:
            continue
        dim = shape_of(index).index(length)
        try:
            values = evaluate(index, {**batch, length: horizon})
        except ValueError:  # depends on something that has no value
            continue
        flat = values.movedim(dim, 0).reshape(horizon, -1)
        outside = ((flat < -rows) | (flat >= rows)).any(dim=1).nonzero()
        if len(outside):
            limit = min(limit or horizon, int(outside[0]))
            horizon = max(limit, 1)
    return limit


def _others(gm: fx.GraphModule, length: sympy.Symbol) -> dict[sympy.Symbol, int]:
    """The batch size: whatever it is, the positions are the same for every sequence."""
    given = [
        size
        for node in gm.graph.find_nodes(op="placeholder")
        if graph_input(node).kind is InputKind.DATA
        for size in shape_of(node)
    ]
    return {size: 1 for size in given if isinstance(size, sympy.Symbol) and size != length}


def _lookup(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(index tensor, rows of the table) of a look-up in a table of fixed size."""
    if node.target is aten.embedding.default:
        bound = arguments(node)
        index, rows = bound["indices"], shape_of(bound["weight"])[0]
    elif node.target is aten.index_select.default:
        bound = arguments(node)
        index, rows = bound["index"], shape_of(bound["self"])[bound["dim"]]
    elif node.target is aten.index.Tensor:
        bound = arguments(node)
        used = [(i, n) for i, n in enumerate(bound["indices"]) if n is not None]
        if len(used) != 1:
            return None
        index, rows = used[0][1], shape_of(bound["self"])[used[0][0]]
    else:
        return None
    return (index, rows) if isinstance(rows, int) else None
