"""Models whose forward keeps, rebuilds or branches on something that depends on the length.

Each is a small decoder; what differs is how positions, masks and experts are written. All are
causal and mix over time by softmax attention alone, so all of them can be ported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, LAYERS, LIMIT = 61, 64, 2, 4, 96
HEAD = WIDTH // HEADS


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, H, T, D]``; rotate-half with tables ``[T, D]``."""
    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-two, one], dim=-1) * sin


def tables(length: int) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** (-torch.arange(0, HEAD, 2).float() / HEAD)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


class GrowingRotary(nn.Module):
    """Tables in plain attributes, rebuilt when a longer sequence comes."""

    def __init__(self) -> None:
        super().__init__()
        self.cached = 0
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        if length > self.cached:
            self.cached = length
            self.cos, self.sin = tables(length)
        assert self.cos is not None and self.sin is not None
        return rotate(x, self.cos[:length], self.sin[:length])


class ExtendingBuffers(nn.Module):
    """Tables in buffers for a first length, registered again when T grows beyond them."""

    def __init__(self) -> None:
        super().__init__()
        self._extend(16)

    def _extend(self, length: int) -> None:
        cos, sin = tables(length)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        if length > self.cos.shape[0]:
            self._extend(length)
        return rotate(x, self.cos[:length], self.sin[:length])


class KeyedRotary(nn.Module):
    """A dictionary from length to tables."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        if length not in self.known:
            self.known[length] = tables(length)
        return rotate(x, *self.known[length])


class HelperRotary(nn.Module):
    """The tables live in an object that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = SimpleNamespace(length=0, cos=None, sin=None)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        if self.cache.length < length:
            self.cache.length = length
            self.cache.cos, self.cache.sin = tables(length)
        return rotate(x, self.cache.cos[:length], self.cache.sin[:length])


class FixedRotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        cos, sin = tables(LIMIT)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        return rotate(x, self.cos[:length], self.sin[:length])


class CausalMask(nn.Module):
    """``[T, T]``, True where attention is allowed, made in forward."""

    def forward(self, length: int) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool).tril()


class LoopMask(nn.Module):
    """Rows written one by one; a sliding window."""

    window = 9

    def forward(self, length: int) -> Tensor:
        mask = torch.zeros(length, length, dtype=torch.bool)
        for row in range(length):
            mask[row, max(0, row - self.window + 1) : row + 1] = True
        return mask


class CachedMask(nn.Module):
    """Kept from the last call; sliced when it is large enough."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None

    def forward(self, length: int) -> Tensor:
        if self.mask is None or self.mask.shape[0] < length:
            self.mask = torch.ones(length, length, dtype=torch.bool).tril()
        return self.mask[:length, :length]


class ExactMask(nn.Module):
    """Kept from the last call; made again for every other length."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None

    def forward(self, length: int) -> Tensor:
        if self.mask is None or self.mask.shape[0] != length:
            self.mask = torch.ones(length, length, dtype=torch.bool).tril()
        return self.mask


class BranchingWindow(nn.Module):
    """Another path once the sequence is longer than the window."""

    window = 24

    def forward(self, length: int) -> Tensor:
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        if length <= self.window:
            return causal
        return causal & ~causal.tril(-self.window)


class Attention(nn.Module):
    def __init__(self, rotary: nn.Module | None, mask: nn.Module) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.rotary = rotary
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        scores = q @ k.transpose(-2, -1) / math.sqrt(HEAD)
        scores = scores.masked_fill(~self.mask(length), float("-inf"))
        y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, WIDTH))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Experts(nn.Module):
    """Top-2 of 5, one expert after the other on the tokens that chose it."""

    count, chosen = 5, 2

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, self.count, bias=False)
        self.experts = nn.ModuleList(Dense() for _ in range(self.count))
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.router(flat).softmax(-1).topk(self.chosen, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        result = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            mask = chosen == index
            if self.skip and not mask.any():
                continue
            token, slot = torch.where(mask)
            result.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return result.view_as(x)


class Block(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    def __init__(
        self,
        rotary: Callable[[], nn.Module] = FixedRotary,
        mask: Callable[[], nn.Module] = CausalMask,
        other_mask: Callable[[], nn.Module] | None = None,
        mlp: Callable[[], nn.Module] = Dense,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        masks = (mask, other_mask or mask)  # alternating, as in Gemma
        self.blocks = nn.ModuleList(
            Block(Attention(rotary(), masks[i % 2]()), mlp()) for i in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "growing rotary": lambda: Decoder(GrowingRotary),
    "extending buffers": lambda: Decoder(ExtendingBuffers),
    "tables keyed by length": lambda: Decoder(KeyedRotary),
    "tables in a helper object": lambda: Decoder(HelperRotary),
    "mask by rows": lambda: Decoder(mask=LoopMask, other_mask=CausalMask),
    "cached mask": lambda: Decoder(mask=CachedMask),
    "mask for the exact length": lambda: Decoder(mask=ExactMask),
    "window branch": lambda: Decoder(mask=BranchingWindow),
    "experts": lambda: Decoder(mlp=lambda: Experts(skip=False)),
    "experts with skip": lambda: Decoder(mlp=lambda: Experts(skip=True)),
}
