"""One small decoder in the spellings that tensor parallelism has to see through."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HEAD, HIDDEN, LAYERS = 41, 24, 8, 44, 4


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``[B, T, H, D]`` each, kv heads repeated here; returns ``[B, T, H * D]``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


class Fused(nn.Module):
    """One projection for q, k and v, read in one of four layouts; biases."""

    def __init__(self, layout: str, heads: int = 4) -> None:
        super().__init__()
        self.layout, self.heads = layout, heads
        self.qkv = nn.Linear(WIDTH, 3 * heads * HEAD)
        self.out = nn.Linear(heads * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y, h = self.qkv(x), self.heads
        if self.layout == "chunk":
            q, k, v = (part.view(b, t, h, HEAD) for part in y.chunk(3, dim=-1))
        elif self.layout == "split":
            q, k, v = (p.view(b, t, h, HEAD) for p in y.split([h * HEAD] * 3, dim=-1))
        elif self.layout == "unbind":
            q, k, v = y.view(b, t, 3, h, HEAD).unbind(2)
        else:  # interleaved by head
            q, k, v = y.view(b, t, h, 3 * HEAD).split(HEAD, dim=-1)
        return self.out(attend(q, k, v))


class Separate(nn.Module):
    """Separate projections; kv heads, QK-norm and a learned scale by choice."""

    def __init__(
        self, heads: int = 4, kv_heads: int = 4, norm: str = "", scale: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.norm = heads, kv_heads, norm
        self.q = nn.Linear(WIDTH, heads * HEAD, bias=False)
        self.k = nn.Linear(WIDTH, kv_heads * HEAD)
        self.v = nn.Linear(WIDTH, kv_heads * HEAD)
        self.out = nn.Linear(heads * HEAD, WIDTH)
        if norm:
            full = norm == "full"
            self.q_norm = nn.RMSNorm(heads * HEAD if full else HEAD, eps=1e-5)
            self.k_norm = nn.LayerNorm(kv_heads * HEAD if full else HEAD)
        self.scale = nn.Parameter(torch.rand(heads, 1) + 0.5) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(b, t, self.heads, HEAD)
        k, v = k.view(b, t, self.kv_heads, HEAD), v.view(b, t, self.kv_heads, HEAD)
        if self.norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.scale is not None:
            q = q * self.scale
        return self.out(attend(q, k, v))


class PackedGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(WIDTH, 2 * HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    def __init__(
        self,
        attention: Callable[[], nn.Module],
        mlp: Callable[[], nn.Module] = Mlp,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block(attention(), mlp()) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "separate": lambda: Decoder(Separate),
    "chunk": lambda: Decoder(lambda: Fused("chunk")),
    "split, tied": lambda: Decoder(lambda: Fused("split"), tied=True),
    "unbind, packed GLU": lambda: Decoder(lambda: Fused("unbind"), PackedGlu),
    "interleaved": lambda: Decoder(lambda: Fused("interleaved")),
    "grouped": lambda: Decoder(lambda: Separate(8, 4)),
    "grouped, few kv heads": lambda: Decoder(lambda: Separate(6, 2)),
    "multi-query": lambda: Decoder(lambda: Separate(5, 1)),
    "norm by head": lambda: Decoder(lambda: Separate(4, 2, norm="head")),
    "norm over all heads": lambda: Decoder(lambda: Separate(4, 4, norm="full")),
    "norm over all heads, few": lambda: Decoder(lambda: Separate(6, 2, norm="full")),
    "learned scale": lambda: Decoder(lambda: Separate(scale=True)),
}
