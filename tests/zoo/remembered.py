"""Masks and tables that functions and globals of the file remember, beside the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from tests.zoo.called import Tiny

__all__ = ["EXACT", "KNOWN", "memo"]

KNOWN: dict[int, Tensor] = {}


@lru_cache(maxsize=8)
def memo(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


class Memo(nn.Module):
    def forward(self, length: int) -> Tensor:
        return memo(length)


class Global(nn.Module):
    def forward(self, length: int) -> Tensor:
        if length not in KNOWN:
            KNOWN[length] = torch.ones(length, length, dtype=torch.bool).tril()
        return KNOWN[length]


EXACT: dict[str, Callable[[], nn.Module]] = {
    "a function with a memory": lambda: Tiny(mask=Memo),
    "a global dictionary": lambda: Tiny(mask=Global),
}
