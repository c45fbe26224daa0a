"""Attention whose mask is a rule on positions, for tests of masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attention_graphs import Site
from spellings_base import finish, heads_first
from torch import Tensor

__all__ = ["Rule", "example", "site"]

# Rows ``[T, 1]`` and columns ``[1, T]`` -> which pairs are seen, bool ``[T, T]``.
Rule = Callable[[Tensor, Tensor], Tensor]


def site(rule: Rule) -> Site:
    def masked(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        t = torch.arange(q.size(2))
        s = (q @ k.mT).masked_fill(~rule(t[:, None], t[None, :]), float("-inf"))
        return finish(s.softmax(-1), v)

    return Site(masked)


def example(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(3, batch, length, 4, 6, generator=generator, dtype=torch.float64)
