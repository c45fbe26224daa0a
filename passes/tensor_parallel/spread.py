"""One vector of every token that all heads want: the rotary part of latent attention's keys, say.

    k [B, 1, T, 4] -> expand -> [B, 8, T, 4] -> cat with what each head has of its own -> attention

Its copies get labels of their own, so that they go with the heads and do not tie them together;
the vector itself is on every rank.

Before                                  After, rank 0 of 2
    y = expand(k, [-1, 8, -1, -1])          y = expand(copy_to(k), [-1, 4, -1, -1])
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

import fxport.ops.attention  # noqa: F401  (registers the op)
from fxport.passes.tensor_parallel.ops import KINDS, Kind

__all__ = ["REPEATING", "spreads"]

aten = torch.ops.aten
REPEATING = (
    aten.expand.default, aten.expand_as.default, aten.repeat.default,
    aten.repeat_interleave.self_int,
)  # fmt: skip
_ATTENTION = torch.ops.fxport.attention.default


def spreads(node: fx.Node, source: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the op copies a whole vector for several heads of an attention.

    Args:
        source: labels of the operand.
        shape: of the result, batch and time 1.
    """
    if source.numel() != source.shape[-1]:
        return False
    before = tuple(source.shape)
    if len(before) != len(shape) or before[-1] != shape[-1] or before == shape:
        return False
    return _reaches_attention(node)


def _reaches_attention(node: fx.Node) -> bool:
    """Without a projection between them."""
    waiting, seen = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if user.target is _ATTENTION:
                return True
            passing = KINDS.get(user.target) in (Kind.STRUCTURE, Kind.POINTWISE)
            if (passing or user.target is operator.getitem) and user not in seen:
                seen.add(user)
                waiting.append(user)
    return False
