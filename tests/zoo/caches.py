"""Decoders with a key/value cache of their own, used from its first position on.

`Reference` is the shape of the first public Llama code: tensors in attributes, moved to the
device in forward, written for this call's positions and read back from the front.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.zoo.awkward import HEAD, HEADS, LAYERS, LIMIT, VOCAB, WIDTH, Block, Dense, rotate, tables

ROWS = 4


class Attention(nn.Module):
    """`ahead` reads that many positions more than were written; `late` writes after reading."""

    def __init__(self, *, buffers: bool, ahead: int = 0, late: bool = False) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.ahead, self.late = ahead, late
        for name in ("cache_k", "cache_v"):
            cache = torch.zeros(ROWS, LIMIT + ahead, HEADS, HEAD)
            if buffers:
                self.register_buffer(name, cache, persistent=False)
            else:
                setattr(self, name, cache)

    def write(self, start: int, k: Tensor, v: Tensor) -> None:
        batch, length = k.shape[:2]
        self.cache_k[:batch, start : start + length] = k
        self.cache_v[:batch, start : start + length] = v

    def forward(self, x: Tensor, start: int, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (w(x).view(batch, length, HEADS, HEAD) for w in (self.wq, self.wk, self.wv))
        cos, sin = (t[start : start + length, None] for t in tables(LIMIT))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        self.cache_k, self.cache_v = self.cache_k.to(q), self.cache_v.to(q)
        if not self.late:
            self.write(start, k, v)
        keys = self.cache_k[:batch, : start + length + self.ahead]
        values = self.cache_v[:batch, : start + length + self.ahead]
        scores = torch.einsum("bthd,bshd->bhts", q, keys) / math.sqrt(HEAD)
        y = torch.einsum("bhts,bshd->bthd", (scores + mask).softmax(-1), values)
        if self.late:
            self.write(start, k, v)
        return self.wo(y.reshape(batch, length, WIDTH))


class CachedBlock(Block):
    def forward(self, x: Tensor, start: int, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), start, mask)
        return x + self.mlp(self.norm2(x))


class Reference(nn.Module):
    def __init__(self, attention: Callable[[], Attention]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(CachedBlock(attention(), Dense()) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    @torch.inference_mode()
    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        length, x = ids.shape[1], self.embed(ids)
        more = self.blocks[0].attention.ahead
        mask = torch.full((length, length + more), float("-inf"), device=ids.device).triu(1 + more)
        mask = torch.hstack([torch.zeros(length, start, device=ids.device), mask]).type_as(x)
        for block in self.blocks:
            x = block(x, start, mask)
        return self.head(self.norm(x)).float()


EXACT: dict[str, Callable[[], nn.Module]] = {
    "cache in attributes": lambda: Reference(lambda: Attention(buffers=False)),
    "cache in buffers": lambda: Reference(lambda: Attention(buffers=True)),
}
# They really use what an earlier call has left.
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "reads more than it wrote": lambda: Reference(lambda: Attention(buffers=True, ahead=1)),
    "reads before it writes": lambda: Reference(lambda: Attention(buffers=False, late=True)),
}
