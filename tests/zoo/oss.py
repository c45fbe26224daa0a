"""GPT-OSS style: attention sinks by concatenation, QK-norm, window on every other layer, MoE."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    def __init__(self, dim, heads, kv_heads, head_dim, window):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, head_dim, window
        self.q_proj = nn.Linear(dim, heads * head_dim)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim)
        self.o_proj = nn.Linear(heads * head_dim, dim)
        self.q_norm, self.k_norm = nn.RMSNorm(head_dim), nn.RMSNorm(head_dim)
        self.sinks = nn.Parameter(torch.zeros(heads))

    def forward(self, x, mask, rope):
        b, t, _ = x.shape
        cos, sin = rope
        q = self.q_norm(self.q_proj(x).view(b, t, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(b, t, self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)

        def rotate(x):  # interleaved pairs
            pairs = x.unflatten(-1, (-1, 2))
            even, odd = pairs[..., 0], pairs[..., 1]
            return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)

        q, k = rotate(q), rotate(k)
        k = torch.repeat_interleave(k, self.heads // self.kv_heads, dim=1)
        v = torch.repeat_interleave(v, self.heads // self.kv_heads, dim=1)
        scores = q @ k.mT * self.head_dim**-0.5
        scores = scores + mask[:t, :t]
        sinks = self.sinks.view(1, -1, 1, 1).expand(b, -1, t, 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """Every expert computes every token; the router's weights pick (the dense spelling)."""

    def __init__(self, dim, hidden, experts, chosen):
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(dim, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, dim, hidden) * dim**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, dim) * hidden**-0.5)

    def forward(self, x):
        probabilities = self.router(x).softmax(-1)
        weights, index = probabilities.topk(self.chosen, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        gates = (F.one_hot(index, self.router.out_features) * weights[..., None]).sum(-2)
        hidden = F.silu(torch.einsum("btd,edh->bteh", x, self.up))
        return torch.einsum("bteh,ehd,bte->btd", hidden, self.down, gates)


class Block(nn.Module):
    def __init__(self, dim, heads, kv_heads, head_dim, window):
        super().__init__()
        self.attn = Attention(dim, heads, kv_heads, head_dim, window)
        self.mlp = Experts(dim, 48, 5, 2)
        self.norm_1, self.norm_2 = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(self, x, masks, rope):
        mask = masks[0] if self.attn.window else masks[1]
        x = x + self.attn(self.norm_1(x), mask, rope)
        return x + self.mlp(self.norm_2(x))


class OSS(nn.Module):
    def __init__(
        self,
        vocab=109,
        dim=72,
        layers=4,
        heads=6,
        kv_heads=2,
        head_dim=32,
        window=20,
        max_len=140,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(
            [
                Block(dim, heads, kv_heads, head_dim, window if i % 2 == 0 else 0)
                for i in range(layers)
            ]
        )
        self.norm = nn.RMSNorm(dim)
        self.unembedding = nn.Linear(dim, vocab, bias=False)
        causal = torch.full((max_len, max_len), float("-inf")).triu(1)
        local = causal + torch.full((max_len, max_len), float("-inf")).tril(-window)
        self.register_buffer("causal", causal, persistent=False)
        self.register_buffer("local", local, persistent=False)
        freqs = torch.outer(
            torch.arange(max_len).float(), 1 / 5000 ** (torch.arange(0, head_dim, 2) / head_dim)
        )
        self.register_buffer("cos", freqs.cos(), persistent=False)
        self.register_buffer("sin", freqs.sin(), persistent=False)

    def forward(self, ids):
        t = ids.shape[1]
        rope = self.cos[:t], self.sin[:t]
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, (self.local, self.causal), rope)
        return self.unembedding(self.norm(x))
