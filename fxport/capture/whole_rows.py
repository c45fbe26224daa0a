"""Rows that are taken and put back with their number written out for every column.

Before                                          After
    index = expand(unsqueeze(rows, 1), -1, C)
    gather(x, 0, index)                             index_select(x, 0, rows)
    scatter_add(y, 0, index, z)                     index_add(y, 0, rows, z)

Only where the index has all columns: otherwise a part of each row is meant.
"""

from __future__ import annotations

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of

__all__ = ["take_whole_rows"]

aten = torch.ops.aten

_WIDENS = (aten.expand.default, aten.expand_as.default, aten.repeat.default)
_COLUMNS = (aten.unsqueeze.default, aten.view.default, aten.reshape.default)


def take_whole_rows(gm: fx.GraphModule) -> None:
    """Rewrites the graph in place."""
    for node in list(gm.graph.nodes):
        if node.target not in (aten.gather.default, aten.scatter_add.default):
            continue
        given = arguments(node)
        added = [given["src"]] if "src" in given else []
        rows = _rows(given["index"])
        if rows is None or given["dim"] != 0 or not _is_whole(given["self"], given["index"], added):
            continue
        target = aten.index_add.default if added else aten.index_select.default
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(target, (given["self"], 0, rows, *added))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()  # the indices


def _is_whole(rows: fx.Node, index: fx.Node, added: list[fx.Node]) -> bool:
    columns = shape_of(index)[1:] == shape_of(rows)[1:]
    return columns and all(shape_of(x) == shape_of(index) for x in added)


def _rows(index: fx.Node) -> fx.Node | None:
    """The vector that every column of an index is."""
    column = index
    while column.target in _WIDENS:
        column = arguments(column)["self"]
    if column is index or column.target not in _COLUMNS:
        return None
    rows = arguments(column)["self"]
    vector = len(shape_of(rows)) == 1 and shape_of(column) == (*shape_of(rows), 1)
    repeated = vector and shape_of(index)[:1] == shape_of(rows)
    return rows if repeated and isinstance(rows, fx.Node) else None
