"""A number written at places that are listed, as the fill that it is.

    above = triu_indices(T, T, 1)                      above = triu_indices(T, T, 1)
                                                       mask = index_put(zeros([T, T], bool),
                                                           [above[0], above[1]], True)
    index_put_(s, [None, above[0], above[1]], c)  ->   masked_fill_(s, mask, c)

How many places there are is no multiple of the length, so their list is no value that could be
followed from one length to another. The mask is. The values and the gradients are the same to the
last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.frames import Builder

__all__ = ["fill_listed_places"]

aten = torch.ops.aten

_FILLS = {
    aten.index_put.default: aten.masked_fill.Tensor,
    aten.index_put_.default: aten.masked_fill_.Tensor,
}


def fill_listed_places(gm: fx.GraphModule) -> None:
    """Replaces the writes whose places depend on sizes alone, in place."""
    build = Builder(gm.graph)
    for node in list(gm.graph.nodes):
        if node.target not in _FILLS or not isinstance(node.meta.get("val"), FakeTensor):
            continue
        given = arguments(node)
        changed, value, listed = given["self"], given["values"], _listed(given["indices"])
        if not listed or given["accumulate"] or value.meta["val"].dim():
            continue
        build.at = node
        first = len(given["indices"]) - len(listed)
        axes = range(first, len(given["indices"]))
        mask = build.call(
            aten.zeros.default,
            [build.size(changed, axis) for axis in axes],
            dtype=torch.bool,
            device=changed.meta["val"].device,
        )
        true = build.call(aten.ones.default, [], dtype=torch.bool, device=value.meta["val"].device)
        mask = build.call(aten.index_put.default, mask, listed, true)
        mask = build.before(mask, len(shape_of(changed)) - len(given["indices"]))
        filled = build.call(_FILLS[node.target], changed, mask, value)
        node.replace_all_uses_with(filled)
        gm.graph.erase_node(node)


def _listed(indices: list[fx.Node | None]) -> list[fx.Node]:
    """The lists of numbers, one for each of several axes, if the axes before are taken whole."""
    listed = [index for index in indices if index is not None]
    first = len(indices) - len(listed)
    numbers = all(n.meta["val"].dtype in (torch.int64, torch.int32) for n in listed)
    if len(listed) < 2 or any(index is not None for index in indices[:first]) or not numbers:
        return []
    return listed if all(_of_sizes_alone(n) for n in listed) else []


def _of_sizes_alone(node: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    waiting: list[Any] = [node]
    while waiting:
        found = waiting.pop()
        if found in seen or isinstance(found.meta.get("val"), torch.SymInt):
            continue
        if found.op != "call_function":
            return False
        seen.add(found)
        waiting.extend(found.all_input_nodes)
    return True
