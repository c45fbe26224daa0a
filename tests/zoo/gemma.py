"""Gemma 2 style: alternating sliding windows, softcaps, (1 + w) norms, scaled embeddings."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class GemmaNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        out = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (out * (1.0 + self.weight.float())).type_as(x)


class Attention(nn.Module):
    def __init__(self, dim, heads, kv_heads, head_dim, window):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, head_dim, window
        self.qkv_proj = nn.Linear(dim, (heads + 2 * kv_heads) * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        qkv = self.qkv_proj(x).view(b, t, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

        def rotate(x):
            x1, x2 = x.chunk(2, dim=-1)
            return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)

        q, k = rotate(q) * self.head_dim**-0.5, rotate(k)
        groups = self.heads // self.kv_heads
        k = k[:, :, None].expand(b, self.kv_heads, groups, t, self.head_dim)
        v = v[:, :, None].expand(b, self.kv_heads, groups, t, self.head_dim)
        k = k.reshape(b, self.heads, t, self.head_dim)
        v = v.reshape(b, self.heads, t, self.head_dim)
        scores = torch.matmul(q, k.transpose(2, 3))
        scores = 20.0 * torch.tanh(scores / 20.0)
        i = torch.arange(t, device=x.device)[:, None]
        j = torch.arange(t, device=x.device)[None, :]
        allowed = j <= i
        if self.window is not None:
            allowed = allowed & (i - j < self.window)
        scores = torch.where(allowed, scores, torch.finfo(scores.dtype).min)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        out = torch.matmul(weights, v).transpose(1, 2).reshape(b, t, -1)
        return self.o_proj(out)


class Block(nn.Module):
    def __init__(self, dim, heads, kv_heads, head_dim, hidden, window):
        super().__init__()
        self.attn = Attention(dim, heads, kv_heads, head_dim, window)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.pre_attn, self.post_attn = GemmaNorm(dim), GemmaNorm(dim)
        self.pre_mlp, self.post_mlp = GemmaNorm(dim), GemmaNorm(dim)

    def forward(self, x, cos, sin):
        x = x + self.post_attn(self.attn(self.pre_attn(x), cos, sin))
        gate, up = self.gate_up(self.pre_mlp(x)).chunk(2, dim=-1)
        return x + self.post_mlp(self.down(F.gelu(gate, approximate="tanh") * up))


class Gemma(nn.Module):
    def __init__(
        self,
        vocab=103,
        dim=80,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=32,
        hidden=176,
        window=24,
    ):
        super().__init__()
        self.dim = dim
        self.embedder = nn.Parameter(torch.randn(vocab, dim))
        self.layers = nn.ModuleList(
            [
                Block(dim, heads, kv_heads, head_dim, hidden, window if i % 2 == 0 else None)
                for i in range(layers)
            ]
        )
        self.norm = GemmaNorm(dim)
        inv_freq = 1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, tokens):
        x = F.embedding(tokens, self.embedder) * self.dim**0.5
        angles = torch.arange(tokens.shape[1], device=x.device)[:, None] * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.norm(x), self.embedder)
        return 30.0 * torch.tanh(logits / 30.0)
