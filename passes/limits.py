"""The longest sequence that learned position tables allow.

    embedding(wpe.weight [64, C], arange(2, T + 2).expand_as(ids))     T <= 62

torch.export sees shapes only: an index beyond the table is an error at run time, not at capture.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.constants import Sizes, evaluate, is_symbolic
from fxport.passes.graph_facts import reachable, value_inputs

__all__ = ["longest_sequence"]

aten = torch.ops.aten

# Index tensors are evaluated up to this length; a longer table does not bound the model here.
_HORIZON = 2**17
_MASKS = (torch.bool, torch.uint8)


def longest_sequence(gm: fx.GraphModule, length: sympy.Symbol, limit: int | None) -> int | None:
    """The smaller of `limit` and what every look-up at constant positions allows."""
    varying = _varying(gm)
    horizon = min(limit or _HORIZON, _HORIZON)
    batch = _others(gm, length)
    for index, rows in (found for node in gm.graph.nodes for found in _lookups(node)):
        if index in varying or shape_of(index).count(length) != 1:
            continue
        dim = shape_of(index).index(length)
        try:
            sizes = {**batch, length: horizon}
            values = evaluate(index, sizes, _of_these_shapes(index, sizes))
        except ValueError:  # depends on something that has no value
            continue
        others = [i for i in range(values.dim()) if i != dim]
        lowest, highest = (values.amin(others), values.amax(others)) if others else (values,) * 2
        outside = ((lowest < -rows) | (highest >= rows)).nonzero()
        if len(outside):
            limit = min(limit or horizon, int(outside[0]))
            horizon = max(limit, 1)
    return limit


def _varying(gm: fx.GraphModule) -> set[fx.Node]:
    """What depends on the values of tokens or parameters; a shape that is lent does not count."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            learned = graph_input(node).kind in (InputKind.DATA, InputKind.PARAMETER)
            found |= {node} if learned else set()
        elif not is_symbolic(node) and any(i in found for i in value_inputs(node)):
            found.add(node)
    return found


def _of_these_shapes(index: fx.Node, sizes: Sizes) -> dict[fx.Node, Any]:
    """Stand-ins for what only lends its shape: ``arange(T).expand_as(ids)``."""
    nodes = reachable([index], lambda node: [] if is_symbolic(node) else value_inputs(node))
    lenders = {n for node in nodes for n in set(node.all_input_nodes) - set(value_inputs(node))}
    return {
        n: torch.zeros((), dtype=n.meta["val"].dtype).expand(
            [int(sympy.sympify(s).subs(sizes)) for s in shape_of(n)]
        )
        for n in lenders - set(nodes)
    }


def _others(gm: fx.GraphModule, length: sympy.Symbol) -> dict[sympy.Symbol, int]:
    """The batch size: whatever it is, the positions are the same for every sequence."""
    given = [
        size
        for node in gm.graph.find_nodes(op="placeholder")
        if graph_input(node).kind is InputKind.DATA
        for size in shape_of(node)
    ]
    return {size: 1 for size in given if isinstance(size, sympy.Symbol) and size != length}


def _lookups(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """(index tensor, rows of the table) of each look-up in a table of fixed size."""
    if node.target is aten.embedding.default:
        bound = arguments(node)
        found = [(bound["indices"], shape_of(bound["weight"])[0])]
    elif node.target in (aten.index_select.default, aten.gather.default):
        bound = arguments(node)
        found = [(bound["index"], shape_of(bound["self"])[bound["dim"]])]
    elif node.target is aten.index.Tensor:
        bound = arguments(node)
        pairs = zip(bound["indices"], shape_of(bound["self"]), strict=False)
        found = [(index, rows) for index, rows in pairs if index is not None]
        if any(index.meta["val"].dtype in _MASKS for index, _ in found):
            return []  # they pick entries, and may stand for several dimensions
    else:
        return []
    return [(index, rows) for index, rows in found if isinstance(rows, int)]
