"""Masks and tables that functions and globals of the file remember, beside the model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from tests.zoo.called import Tiny

__all__ = ["EXACT", "KNOWN", "OfItsClass", "Tables", "memo"]

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


class OfItsClass(nn.Module):
    """Shared by all layers."""

    known: ClassVar[OrderedDict[int, Tensor]] = OrderedDict()
    latest: Tensor | None = None

    @classmethod
    def mask(cls, length: int) -> Tensor:
        if length not in cls.known:
            cls.known[length] = torch.ones(length, length, dtype=torch.bool).tril()
        return cls.known[length]

    def forward(self, length: int) -> Tensor:
        type(self).latest = self.mask(length)
        return self.mask(length)


class Tables:
    """No module: what a file keeps for its layers."""

    known: ClassVar[dict[int, Tensor]] = {}


class OfAnotherClass(nn.Module):
    def forward(self, length: int) -> Tensor:
        if length not in Tables.known:
            Tables.known[length] = torch.ones(length, length, dtype=torch.bool).tril()
        return Tables.known[length]


EXACT: dict[str, Callable[[], nn.Module]] = {
    "a function with a memory": lambda: Tiny(mask=Memo),
    "a global dictionary": lambda: Tiny(mask=Global),
    "a dictionary of the class": lambda: Tiny(mask=OfItsClass),
    "a dictionary of another class": lambda: Tiny(mask=OfAnotherClass),
}
