"""One decoder with the options that published models differ in, in the style of litgpt.

A configuration says which norm, which rotary part, how many KV heads, which layers have a window
or no positions at all, how the residual is arranged, and how the logits are made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    vocab_size: int = 97
    n_layer: int = 4
    n_embd: int = 96
    n_head: int = 6
    n_kv: int = 2
    head_dim: int = 32
    block_size: int = 128
    rotary: float = 1.0  # part of each head that is rotated
    base: float = 10000.0
    interleaved: bool = False
    norm: str = "rms"
    residual: str = "pre"  # "pre", "post" (OLMo 2), "parallel" (Phi, Cohere), "sandwich" (Gemma 2)
    qk_norm: str = ""  # "", "head" (Qwen 3), "full" (OLMo 2)
    bias: bool = False
    qkv_bias: bool = False
    mlp: str = "swiglu"
    windows: tuple[int, ...] = (0,)  # per layer, repeated; 0 is full attention
    no_rotary: tuple[int, ...] = ()  # layers without positions (SmolLM 3)
    logit_scale: float = 1.0
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    softcap: float = 0.0
    tied: bool = True


CONFIGS = {
    "mistral": Config(windows=(24,), tied=False),
    "qwen2": Config(qkv_bias=True, n_kv=3),
    "qwen3": Config(qk_norm="head", base=1e6),
    "phi": Config(residual="parallel", norm="layer", rotary=0.5, bias=True, qkv_bias=True, n_kv=6,
                  mlp="gelu", tied=False),
    "falcon": Config(residual="parallel", norm="layer", n_kv=1, mlp="gelu"),
    "stablelm": Config(norm="layer", rotary=0.25, n_kv=6, tied=False),
    "olmo2": Config(residual="post", qk_norm="full", tied=False),
    "cohere": Config(residual="parallel", norm="layer", interleaved=True, logit_scale=0.25),
    "gemma3": Config(residual="sandwich", qk_norm="head", windows=(16, 16, 0), embed_scale=9.8,
                     mlp="geglu"),
    "granite": Config(residual_scale=0.22, embed_scale=12.0, logit_scale=0.125),
    "smollm3": Config(no_rotary=(1, 3), n_kv=3),
    "starcoder2": Config(norm="layer", bias=True, qkv_bias=True, windows=(32,), mlp="gelu"),
    "grok": Config(softcap=30.0, logit_scale=0.5, residual="sandwich"),
}  # fmt: skip


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return y.to(x.dtype) * self.weight


def norm(c: Config, size: int) -> nn.Module:
    return RMSNorm(size) if c.norm == "rms" else nn.LayerNorm(size, bias=c.bias)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """``x [B, H, T, R]``, tables ``[T, R / 2]``."""
    if interleaved:
        one, two = x[..., ::2], x[..., 1::2]
        return torch.stack([one * cos - two * sin, two * cos + one * sin], -1).flatten(-2)
    one, two = x.split(x.size(-1) // 2, -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        self.c = c
        self.window = c.windows[layer % len(c.windows)]
        self.rotary = 0 if layer in c.no_rotary else int(c.rotary * c.head_dim)
        self.wqkv = nn.Linear(c.n_embd, (c.n_head + 2 * c.n_kv) * c.head_dim, bias=c.qkv_bias)
        self.wo = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)
        if c.qk_norm == "head":
            self.q_norm, self.k_norm = RMSNorm(c.head_dim), RMSNorm(c.head_dim)
        elif c.qk_norm == "full":
            self.q_norm = RMSNorm(c.n_head * c.head_dim)
            self.k_norm = RMSNorm(c.n_kv * c.head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, (batch, length, _) = self.c, x.shape
        sizes = [n * c.head_dim for n in (c.n_head, c.n_kv, c.n_kv)]
        q, k, v = self.wqkv(x).split(sizes, dim=-1)
        if c.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(batch, length, -1, c.head_dim).transpose(1, 2) for t in (q, k, v))
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = (
                torch.cat(
                    [
                        rotate(t[..., : self.rotary], cos, sin, c.interleaved),
                        t[..., self.rotary :],
                    ],
                    dim=-1,
                )
                for t in (q, k)
            )
        if self.window:
            at = torch.arange(length, device=x.device)
            distance = at[:, None] - at[None, :]
            mask = (distance >= 0) & (distance < self.window)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.kind = c.mlp
        inner = 3 * c.n_embd
        self.gated = c.mlp in ("swiglu", "geglu")
        self.up = nn.Linear(c.n_embd, inner * (2 if self.gated else 1), bias=c.bias)
        self.down = nn.Linear(inner, c.n_embd, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down((F.silu(gate) if self.kind == "swiglu" else F.gelu(gate)) * up)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        self.c = c
        self.attn, self.mlp = Attention(c, layer), MLP(c)
        self.norm1 = norm(c, c.n_embd)
        if c.residual != "parallel":
            self.norm2 = norm(c, c.n_embd)
        if c.residual == "sandwich":
            self.norm3, self.norm4 = norm(c, c.n_embd), norm(c, c.n_embd)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s = self.c.residual_scale
        if self.c.residual == "parallel":
            y = self.norm1(x)
            return x + s * (self.attn(y, cos, sin) + self.mlp(y))
        if self.c.residual == "post":
            x = x + s * self.norm1(self.attn(x, cos, sin))
            return x + s * self.norm2(self.mlp(x))
        if self.c.residual == "sandwich":
            x = x + s * self.norm3(self.attn(self.norm1(x), cos, sin))
            return x + s * self.norm4(self.mlp(self.norm2(x)))
        x = x + s * self.attn(self.norm1(x), cos, sin)
        return x + s * self.mlp(self.norm2(x))


class Modern(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.n_layer))
        self.norm = norm(c, c.n_embd)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.wte.weight
        width = int(c.rotary * c.head_dim)
        inverse = c.base ** (-torch.arange(0, width, 2).float() / width)
        angles = torch.outer(torch.arange(c.block_size).float(), inverse)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, idx: Tensor) -> Tensor:
        length = idx.size(1)
        assert length <= self.config.block_size
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.wte(idx) * self.config.embed_scale
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x)) * self.config.logit_scale
        if self.config.softcap:
            logits = self.config.softcap * torch.tanh(logits / self.config.softcap)
        return logits
