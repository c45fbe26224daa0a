"""MPT / BLOOM style: ALiBi, no positions in the embedding, one einsum after another."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.wqkv = nn.Linear(dim, 3 * dim)
        self.wo = nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)

    def forward(self, x, bias):
        b, t, d = x.shape
        qkv = self.wqkv(self.norm_1(x)).view(b, t, 3, self.heads, self.head_dim)
        q, k, v = qkv.unbind(2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / self.head_dim**0.5
        scores = scores + bias[:, :, :t, :t]
        weights = scores.softmax(-1)
        out = torch.einsum("bhts,bshd->bthd", weights, v).reshape(b, t, d)
        x = x + self.wo(out)
        return x + self.down(F.relu(self.up(self.norm_2(x))).square())


class MPT(nn.Module):
    def __init__(self, vocab=107, dim=96, layers=4, heads=3, max_len=150):
        super().__init__()
        self.wte = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
        distance = torch.arange(max_len)[None, :] - torch.arange(max_len)[:, None]
        bias = slopes[:, None, None] * distance
        bias = bias.masked_fill(distance > 0, float("-inf"))
        self.register_buffer("bias", bias[None], persistent=False)

    def forward(self, ids):
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x, self.bias)
        return F.linear(self.norm(x), self.wte.weight)
