"""Rewrites every value that counts tokens to one gathered by the positions that vLLM passes.

Before                                    After (positions: [N] int64, a placeholder)
    arange(0, T)                              positions
    arange(2, T + 2)                          positions + 2
    slice(table, 0, None, T)                  index_select(table, 0, positions)
    cumsum(ones(T), 0) - 1                    index_select(<constant of length max>, 0, positions)
"""

from __future__ import annotations

import torch
from torch import fx

from fxport.capture.inputs import add_input
from fxport.capture.location import module_of, user_location
from fxport.passes.tokens.locality import Locality, Rows
from fxport.report import Decision, Outcome

__all__ = ["gather_by_position"]

aten = torch.ops.aten


def gather_by_position(
    gm: fx.GraphModule, locality: Locality, tokens: fx.Node
) -> tuple[fx.Node, list[Decision]]:
    """Adds the placeholder `positions` and replaces every node of ``locality.rows``.

    Returns:
        The placeholder, and one decision per replaced node. Tables that were evaluated become
        buffers of the module, named ``constant_<n>``.
    """
    with gm.graph.inserting_after(tokens):
        positions = add_input(gm.graph, "positions")
    positions.meta["val"] = torch.empty(7, dtype=torch.int64, device="meta")
    decisions = []
    for node, rows in locality.rows.items():
        with gm.graph.inserting_before(node):
            gathered = _gather(gm, node, rows, positions)
        gathered.meta = dict(node.meta)
        node.replace_all_uses_with(gathered)
        gm.graph.erase_node(node)
        decisions.append(
            Decision(
                "positions",
                Outcome.REWRITTEN,
                _subject(rows),
                "gathered by vLLM's positions" + (f" + {rows.offset}" if rows.offset else ""),
                module_of(gathered),
                user_location(gathered),
            )
        )
    for node, value in locality.folded.items():
        with gm.graph.inserting_before(node):
            constant = _constant(gm, value)
        constant.meta = {**node.meta, "val": value}
        node.replace_all_uses_with(constant)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return positions, decisions


def _subject(rows: Rows) -> str:
    if rows.table is None:
        return "arange"
    if isinstance(rows.table, torch.Tensor):
        return f"table of {rows.table.shape[rows.dim]} rows"
    source = rows.table.meta.get("input")
    return f"rows of `{source.name}`" if source else "rows of a table"


def _gather(gm: fx.GraphModule, node: fx.Node, rows: Rows, positions: fx.Node) -> fx.Node:
    graph = gm.graph
    index = positions
    if rows.offset:
        index = graph.call_function(aten.add.Tensor, (positions, rows.offset))
    if rows.table is None:
        return graph.call_function(aten.to.dtype, (index, node.meta["val"].dtype))
    table = rows.table
    if isinstance(table, torch.Tensor):
        table = _constant(gm, table)
    return graph.call_function(aten.index_select.default, (table, rows.dim, index))


def _constant(gm: fx.GraphModule, value: torch.Tensor) -> fx.Node:
    name = f"constant_{sum(1 for n, _ in gm.named_buffers() if n.startswith('constant_'))}"
    gm.register_buffer(name, value, persistent=False)
    node = gm.graph.get_attr(name)
    node.meta["val"] = value
    return node
