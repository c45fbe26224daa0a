"""A mask that is written out twice is one mask.

Before                                             After
    one = eq(chosen, 3); rows = where(one)             one = eq(chosen, 3); rows = where(one)
    z = expert(x[rows])                                z = expert(x[rows])
    two = eq(chosen, 3); back = where(two)             back = where(one)
    y = index_put(y, back, z)                          y = index_put(y, back, z)

So that rows that are put back are seen to be those that were taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxport.capture.memory import Memory, is_mutation

__all__ = ["merge_repeated", "selects_rows"]


def selects_rows(gm: fx.GraphModule) -> bool:
    """Whether rows are looked for: ``where(mask)``, a boolean index."""
    return any(n.target is torch.ops.aten.where.default for n in gm.graph.nodes)


def merge_repeated(gm: fx.GraphModule) -> None:
    """Equal calls on equal values that give truth values or whole numbers become one.

    Nothing may be written to the memory of what they read or return.
    """
    memory = Memory(gm.graph)
    first: dict[Any, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if not _is_repeatable(node) or any(map(memory.written_by, [node, *node.all_input_nodes])):
            continue
        same = first.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            gm.graph.erase_node(node)
    gm.recompile()


def _is_repeatable(node: fx.Node) -> bool:
    """An operation on tensors whose result is a mask or numbers, and the same each time."""
    target, value = node.target, node.meta.get("val")
    return (
        isinstance(target, torch._ops.OpOverload)
        and isinstance(value, torch.Tensor)
        and not (value.is_floating_point() or value.is_complex())
        and not is_mutation(node)
        and torch.Tag.nondeterministic_seeded not in target.tags
        and torch.Tag.dynamic_output_shape not in target.tags
        and bool(node.all_input_nodes)
    )
