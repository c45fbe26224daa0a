"""Two small models as people write them: nanoGPT's way and Llama's way."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Sizes:
    vocab: int = 61
    limit: int = 32
    layers: int = 4
    heads: int = 3
    width: int = 24
    dropout: float = 0.0


class Doubled(torch.autograd.Function):
    """The identity, whose backward is not: losing it changes every gradient below."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return 2 * grad


class GPTAttention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.c_attn = nn.Linear(sizes.width, 3 * sizes.width)
        self.c_proj = nn.Linear(sizes.width, sizes.width)
        self.attn_dropout = nn.Dropout(sizes.dropout)
        mask = torch.tril(torch.ones(sizes.limit, sizes.limit))
        self.register_buffer("bias", mask.view(1, 1, sizes.limit, sizes.limit))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(B, T, C))


class GPTBlock(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(sizes.width)
        self.attn = GPTAttention(sizes)
        self.ln_2 = nn.LayerNorm(sizes.width)
        self.fc = nn.Linear(sizes.width, 4 * sizes.width)
        self.proj = nn.Linear(4 * sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        h = self.proj(F.gelu(self.fc(self.ln_2(x))))
        h += x  # in place
        return h


class GPT(nn.Module):
    """nanoGPT's way: fused qkv, a mask buffer sliced to T, a tied head, (logits, loss)."""

    def __init__(self, sizes: Sizes, *, checkpointed: bool = False, custom: bool = False) -> None:
        super().__init__()
        self.sizes = sizes
        self.checkpointed, self.custom = checkpointed, custom
        self.wte = nn.Embedding(sizes.vocab, sizes.width)
        self.wpe = nn.Embedding(sizes.limit, sizes.width)
        self.h = nn.ModuleList(GPTBlock(sizes) for _ in range(sizes.layers))
        self.ln_f = nn.LayerNorm(sizes.width)
        self.lm_head = nn.Linear(sizes.width, sizes.vocab, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        T = idx.size(1)
        assert T <= self.sizes.limit  # noqa: SIM300
        x = self.wte(idx) + self.wpe(torch.arange(T, device=idx.device))
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
            if self.custom:
                x = Doubled.apply(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


class LlamaAttention(nn.Module):
    def __init__(self, sizes: Sizes, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = sizes.heads, kv_heads
        self.size = sizes.width // sizes.heads
        self.wq = nn.Linear(sizes.width, sizes.heads * self.size, bias=False)
        self.wk = nn.Linear(sizes.width, kv_heads * self.size, bias=False)
        self.wv = nn.Linear(sizes.width, kv_heads * self.size, bias=False)
        self.wo = nn.Linear(sizes.heads * self.size, sizes.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.heads, self.size).transpose(1, 2)
        k = self.wk(x).view(B, T, self.kv_heads, self.size).transpose(1, 2)
        v = self.wv(x).view(B, T, self.kv_heads, self.size).transpose(1, 2)
        q, k = q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class LlamaBlock(nn.Module):
    def __init__(self, sizes: Sizes, kv_heads: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(sizes.width)
        self.attention = LlamaAttention(sizes, kv_heads)
        self.ffn_norm = RMSNorm(sizes.width)
        self.w1 = nn.Linear(sizes.width, 2 * sizes.width, bias=False)
        self.w2 = nn.Linear(2 * sizes.width, sizes.width, bias=False)
        self.w3 = nn.Linear(sizes.width, 2 * sizes.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Llama(nn.Module):
    """Llama's way: RMSNorm written out, RoPE from a table, GQA, SwiGLU, SDPA, untied head."""

    def __init__(self, sizes: Sizes, *, kv_heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocab, sizes.width)
        self.layers = nn.ModuleList(LlamaBlock(sizes, kv_heads) for _ in range(sizes.layers))
        self.norm = RMSNorm(sizes.width)
        self.output = nn.Linear(sizes.width, sizes.vocab, bias=False)
        size = sizes.width // sizes.heads
        frequencies = 1.0 / 10000 ** (torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(sizes.limit), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        cos, sin = self.cos[: tokens.size(1)], self.sin[: tokens.size(1)]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.output(self.norm(x))
