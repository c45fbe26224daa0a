"""A number written where a mask says so, or outside a triangle, as the fill that it is.

    s[:, :, ~mask] = -inf        index_put(s, [None, None, mask], c)  ->  masked_fill(s, mask, c)
    m[rows > columns] = 0.0      index_put(m, [mask], c)              ->  masked_fill(m, mask, c)

    fill(empty_like(x), c)       fill(empty(n, n), c)       ->  full_like(x, c)

    e = tril(exp(s))             tril(e)                    ->  masked_fill(e, ~tril(ones), 0)

The values and the gradients are the same to the last bit.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.views import overload_packet
from fxport.passes.graph_facts import GraphFacts, Source, erase_if_unused

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

    for node in gm.graph.find_nodes(op="call_function", target=aten.fill.Scalar):
        before, value = node.args
        packet = overload_packet(before)
        if packet not in _UNWRITTEN:  # a fill passes gradients on, zeros
            continue
        like = packet is aten.empty_like
        of, how = (before.args[0], before.kwargs) if like else (before, {})
        emitter = Emitter(gm, node, [])
        node.replace_all_uses_with(emitter.call(aten.full_like.default, of, value, **how))
        erase_if_unused(gm, [node])

    _spell_out_triangles(gm)


def _spell_out_triangles(gm: fx.GraphModule) -> None:
    """Where a triangle of the data is cut out; one of constants is a mask itself."""
    facts: GraphFacts | None = None
    for node in [n for n in reversed(gm.graph.nodes) if overload_packet(n) in _TRIANGLES]:
        if not node.users:  # done with what was cut out of it
            continue
        facts = facts or GraphFacts(gm)
        if Source.DATA not in facts.source(node) or not node.meta["val"].is_floating_point():
            continue
        cuts = _cuts(node)
        whole = arguments(cuts[0])["self"]
        emitter = Emitter(gm, node, [whole])
        shape = emitter.sizes(shape_of(whole)[-2:])
        kept = emitter.call(aten.new_ones.default, whole, shape, dtype=torch.bool)
        for cut in cuts:
            kept = emitter.call(cut.target, kept, arguments(cut)["diagonal"])  # type: ignore[arg-type]
        gone = emitter.call(aten.logical_not.default, kept)
        node.replace_all_uses_with(emitter.call(aten.masked_fill.Scalar, whole, gone, 0.0))
        erase_if_unused(gm, [node])


def _cuts(last: fx.Node) -> list[fx.Node]:
    """One after the other, as for a band."""
    cuts = [last]
    while True:
        before = arguments(cuts[0])["self"]
        if overload_packet(before) not in _TRIANGLES:
            return cuts
        cuts.insert(0, before)


_TRIANGLES = {aten.tril, aten.triu}
_UNWRITTEN = {aten.empty, aten.empty_like, aten.new_empty}


def _only_mask(indices: list[fx.Node | None]) -> fx.Node | None:
    """The mask, if dimensions before it are taken whole."""
    *before, last = indices
    if last is None or any(index is not None for index in before):
        return None
    return last if last.meta["val"].dtype == torch.bool else None
