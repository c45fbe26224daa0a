"""A number written where a mask says so, as the fill that it is.

    s[:, :, ~mask] = -inf        index_put(s, [None, None, mask], c)  ->  masked_fill(s, mask, c)
    m[rows > columns] = 0.0      index_put(m, [mask], c)              ->  masked_fill(m, mask, c)

The values and the gradients are the same to the last bit.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from fxport.capture.arguments import arguments
from fxport.passes.attention.emit import Emitter
from fxport.passes.graph_facts import erase_if_unused

__all__ = ["spell_out_fills"]

aten = torch.ops.aten


def spell_out_fills(gm: fx.GraphModule) -> None:
    """Replaces what is certainly a fill with one number."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.index_put.default):
        given = arguments(node)
        changed, value = given["self"], given["values"]
        mask = _only_mask(given["indices"])
        fake = isinstance(node.meta.get("val"), FakeTensor)
        if mask is None or not fake or given["accumulate"] or value.meta["val"].dim():
            continue
        emitter = Emitter(gm, node, [])
        behind = changed.meta["val"].dim() - len(given["indices"]) + 1 - mask.meta["val"].dim()
        for _ in range(behind):
            mask = emitter.call(aten.unsqueeze.default, mask, -1)
        filled = emitter.call(aten.masked_fill.Tensor, changed, mask, value)
        node.replace_all_uses_with(filled)
        erase_if_unused(gm, [node])


def _only_mask(indices: list[fx.Node | None]) -> fx.Node | None:
    """The mask, if dimensions before it are taken whole."""
    *before, last = indices
    if last is None or any(index is not None for index in before):
        return None
    return last if last.meta["val"].dtype == torch.bool else None
