"""Cosines of all pairs of queries and keys, as the product of normalised ones that they are.

Before                                         After
    s = cosine_similarity(q[:, :, :, None],        n = vector_norm(q, 2, [-1], True)
                          k[:, :, None], -1)       q = q / (n + detach(clamp_min(n, eps) - n))
                                                   s = sum(q[:, :, :, None] * .., [-1])

As torch computes them: a norm below `eps` is replaced without a word to autograd.
"""

from __future__ import annotations

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.views import overload_packet
from fxport.passes.graph_facts import erase_if_unused

__all__ = ["write_out_cosines"]

aten = torch.ops.aten


def write_out_cosines(gm: fx.GraphModule) -> None:
    """Changes the graph in place; other cosines than those of pairs stay one call."""
    for node in list(gm.graph.nodes):
        if overload_packet(node) is not aten.cosine_similarity:
            continue
        given = arguments(node)
        sides = (given["x1"], given["x2"])
        shapes = [shape_of(side) for side in sides]
        dtypes = {side.meta["val"].dtype for side in sides}
        if shapes[0] == shapes[1] or len({len(s) for s in shapes}) != 1 or len(dtypes) != 1:
            continue
        dim = given["dim"] % len(shapes[0])
        if shapes[0][dim] != shapes[1][dim]:
            continue
        emitter = Emitter(gm, node, [])
        first, second = (_normalised(emitter, side, dim, given["eps"]) for side in sides)
        products = emitter.call(aten.mul.Tensor, first, second)
        node.replace_all_uses_with(emitter.call(aten.sum.dim_IntList, products, [dim]))
        erase_if_unused(gm, [node])


def _normalised(emitter: Emitter, x: fx.Node, dim: int, eps: float) -> fx.Node:
    norm = emitter.call(aten.linalg_vector_norm.default, x, 2, [dim], True)
    short = emitter.call(aten.sub.Tensor, emitter.call(aten.clamp_min.default, norm, eps), norm)
    norm = emitter.call(aten.add.Tensor, norm, emitter.call(aten.detach.default, short))
    return emitter.call(aten.div.Tensor, x, norm)
