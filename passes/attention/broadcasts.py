"""Values that were spread out by hand, as what they were before.

    g = repeat(g, [1, 1, T])    [B, T, T]
    w = mul(w, g)                              w = mul(w, g)    g: [B, T, 1]

    i = getitem(meshgrid([a, b]), 0)           i = expand(unsqueeze(a, -1), [n, m])

What is the same for every key is then seen to be, and may go onto the output.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.layout import is_one
from fxport.passes.attention.views import SCALES, overload_packet
from fxport.passes.graph_facts import erase_if_unused

__all__ = ["spell_out_meshgrids", "spread_by_the_operation"]

aten = torch.ops.aten

_SPREADS = {aten.expand, aten.expand_as, aten.broadcast_to, aten.repeat, aten.tile}


def spread_by_the_operation(gm: fx.GraphModule) -> None:
    """Lets products and quotients do what a copy along dimensions of size 1 did before them."""
    for node in gm.graph.nodes:
        if overload_packet(node) not in SCALES or not _is_tensor(node):
            continue
        for index, spread in enumerate(node.args[:2]):
            other = node.args[1 - index]
            narrow = _narrow(spread) if isinstance(spread, fx.Node) else None
            if narrow is None or not _is_tensor(other) or shape_of(other) != shape_of(node):  # type: ignore[arg-type]
                continue
            assert isinstance(spread, fx.Node)
            node.update_arg(index, narrow)
            erase_if_unused(gm, [spread])


def spell_out_meshgrids(gm: fx.GraphModule) -> None:
    """Replaces the grids of a meshgrid by rows and columns that are expanded."""
    for grids in [n for n in gm.graph.nodes if overload_packet(n) is aten.meshgrid]:
        given = arguments(grids)
        lines = list(given["tensors"])
        if any(len(shape_of(line)) != 1 for line in lines):
            continue
        for grid in [u for u in grids.users if u.target is operator.getitem]:
            emitter, index = Emitter(gm, grid, lines), grid.args[1]
            assert isinstance(index, int)
            value = lines[index]
            for other in range(len(lines)):
                if other != index:
                    value = emitter.call(aten.unsqueeze.default, value, 0 if other < index else -1)
            sizes = emitter.sizes([shape_of(line)[0] for line in lines])
            value = emitter.call(aten.expand.default, value, sizes)
            if given.get("indexing") == "xy" and len(lines) > 1:
                value = emitter.call(aten.transpose.int, value, 0, 1)
            grid.replace_all_uses_with(value)
            erase_if_unused(gm, [grid])


def _is_tensor(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def _narrow(spread: fx.Node) -> fx.Node | None:
    """What a value consists of copies of, along dimensions of size 1 alone."""
    packet = overload_packet(spread)
    if packet not in _SPREADS:
        return None
    source = arguments(spread)["self"]
    before, after = shape_of(source), shape_of(spread)
    pairs = zip(before, after[len(after) - len(before) :], strict=True)
    copied = all(is_one(b) or b == a for b, a in pairs)
    return source if copied and len(before) > 0 else None
