"""For the checker: along which dimensions is what is made of a divided parameter divided?

    W [E, H, C], rows of H           divided along 1
    select(W, 0, e)                  along 0
    t(select(W, 0, e))               along 1
    stack([W0, W1]), rows of [H, C]  along 1

What is not listed is not known; the checker then refuses a sum over it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments
from fxport.parallel.plan import ParameterShard

__all__ = ["WHOLE", "Parts", "made_of", "parts_of", "viewed"]

aten = torch.ops.aten
Parts = tuple[bool, ...]  # by dimension
WHOLE = "whole"  # of a view of a part: the shape of the view of all


def parts_of(shard: ParameterShard) -> Parts:
    return tuple(any(box[d] is not None for box in shard.indices) for d in range(len(shard.shape)))


def made_of(node: fx.Node, known: Mapping[fx.Node, Parts]) -> Parts | None:
    """None: not known, or nothing divided."""
    given = [known[i] for i in node.all_input_nodes if i in known]
    if not given or len(given) != len(node.all_input_nodes):
        return None
    before, args = given[0], arguments(node)
    rank = len(before)
    if node.target is aten.select.int:
        dim = args["dim"] % rank
        return None if before[dim] else before[:dim] + before[dim + 1 :]
    if node.target is aten.slice.Tensor:
        return None if before[args["dim"]] else before
    if node.target is aten.unsqueeze.default:
        dim = args["dim"] % (rank + 1)
        return (*before[:dim], False, *before[dim:])
    if node.target is aten.permute.default:
        return tuple(before[d] for d in args["dims"])
    if node.target in (aten.t.default, aten.mT.default, aten.numpy_T.default):
        return (*before[:-2], *reversed(before[-2:])) if rank > 1 else before
    if node.target is aten.transpose.int:
        return _swapped(before, args["dim0"], args["dim1"])
    if node.target is aten.cat.default:
        return _joined(given, args["dim"] % rank)
    if node.target is aten.stack.default:
        dim = args["dim"] % (rank + 1)
        return (*before[:dim], False, *before[dim:]) if set(given) == {before} else None
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return before if pointwise and len(given) == 1 else None


def viewed(node: fx.Node, shard: ParameterShard, rank: int) -> Parts | None:
    """A view that takes the one divided dimension of a parameter apart: rows ``[E * H, C]``, of
    which a rank has some of each expert's H, as ``[E, H, C]``. None: not known.

    The shape of the whole view is said by who wrote it; the rank's rows must be what it says.
    """
    full = node.meta.get(WHOLE)
    divided = [d for d, part in enumerate(parts_of(shard)) if part]
    if full is None or node.target is not aten.reshape.default or len(divided) != 1:
        return None
    sizes = arguments(node)["shape"]
    apart = [d for d, (here, n) in enumerate(zip(sizes, full, strict=True)) if here != n]
    if len(apart) != 1 or math.prod(full) != math.prod(shard.shape):
        return None
    numbers = torch.arange(math.prod(full))
    index = torch.tensor(shard.indices[rank][divided[0]] or (), dtype=torch.int64)
    mine = numbers.reshape(shard.shape).index_select(divided[0], index)
    mine, whole = mine.reshape(sizes), numbers.reshape(full)
    held = torch.isin(whole, mine).movedim(apart[0], 0)
    places = held.reshape(full[apart[0]], -1).any(1).nonzero().flatten()
    if not torch.equal(whole.index_select(apart[0], places), mine):
        return None
    return tuple(d in apart for d in range(len(full)))


def _swapped(before: Parts, one: int, other: int) -> Parts:
    places: list[Any] = list(before)
    places[one], places[other] = places[other], places[one]
    return tuple(places)


def _joined(given: list[Parts], dim: int) -> Parts | None:
    rest = {(*p[:dim], *p[dim + 1 :]) for p in given}
    if len(rest) != 1:
        return None
    return (*given[0][:dim], any(p[dim] for p in given), *given[0][dim + 1 :])
