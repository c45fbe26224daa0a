"""What only some lengths keep must make no difference to the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxport
from fxport.errors import PortError, ReasonCode

HEAD, MANY, LIMIT = 32, 64, 96


class Rotary(nn.Module):
    """Angles ``[T, HEAD / 2]``; subclasses keep something of long calls."""

    def __init__(self) -> None:
        super().__init__()
        self.slower, self.table = False, torch.zeros(0)

    def angles(self, length: int, slower: bool = False) -> Tensor:
        base = 20000.0 if slower else 10000.0
        frequencies = base ** (-torch.arange(0, HEAD, 2).float() / HEAD)
        return torch.outer(torch.arange(length).float(), frequencies)


class AfterLong(Rotary):
    """A long call is itself as it was; every later one is not."""

    def forward(self, length: int) -> Tensor:
        found = self.angles(length, self.slower)
        if length > MANY:
            self.slower = True
        return found


class ShortAfterLong(Rotary):
    """Of the later ones only very short ones differ."""

    def forward(self, length: int) -> Tensor:
        found = self.angles(length, self.slower and length < 5)
        if length > MANY:
            self.slower = True
        return found


class Harmless(Rotary):
    """A longer table is made once, of the same numbers."""

    def forward(self, length: int) -> Tensor:
        if length <= MANY:
            return self.angles(length)
        if len(self.table) < length:
            self.table = self.angles(LIMIT)
        return self.table[:length]


class Decoder(nn.Module):
    def __init__(self, rotary: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.rotary = nn.Embedding(61, 64), rotary()
        self.qkv = nn.ModuleList(nn.Linear(64, 192) for _ in range(4))
        self.out = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        rows, length = ids.shape
        assert length <= LIMIT
        angles, x = self.rotary(length), self.embed(ids)
        cos, sin = angles.cos(), angles.sin()

        def turned(x: Tensor) -> Tensor:
            one, two = x.chunk(2, -1)
            return torch.cat([one * cos - two * sin, one * sin + two * cos], -1)

        for qkv, out in zip(self.qkv, self.out, strict=True):
            heads = (p.view(rows, length, 2, HEAD).transpose(1, 2) for p in qkv(x).chunk(3, -1))
            q, k, v = heads
            y = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
            x = x + out(y.transpose(1, 2).reshape(rows, length, 64))
        return x @ self.embed.weight.T


@pytest.mark.parametrize("kind", [AfterLong, ShortAfterLong])
def test_what_long_calls_keep_may_not_reach_short_ones(kind: type[Rotary]) -> None:
    with pytest.raises(PortError) as refused:
        fxport.port(Decoder(kind).eval())
    reasons = refused.value.reasons
    assert {r.code for r in reasons} == {ReasonCode.MUTATED_STATE}
    assert next(r.location.source for r in reasons if r.location) == "self.slower = True"


def test_a_longer_table_of_the_same_numbers_is_served() -> None:
    model = Decoder(Harmless).eval()
    port = fxport.port(model)
    for length in (3, MANY + 7):
        ids = torch.randint(0, 61, (2, length))
        torch.testing.assert_close(port.module(ids), model(ids))
