"""GPT-NeoX / Phi / Falcon style: parallel block, partial RoPE, one KV head, learned offset."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class ParallelBlock(nn.Module):
    def __init__(self, dim, heads, head_dim, rotary_dim):
        super().__init__()
        self.heads, self.head_dim, self.rotary_dim = heads, head_dim, rotary_dim
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, heads * head_dim)
        self.key_value = nn.Linear(dim, 2 * head_dim)
        self.dense = nn.Linear(heads * head_dim, dim)
        self.fc_in, self.fc_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def rotate(self, x, cos, sin):
        turned, kept = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        half = self.rotary_dim // 2
        swapped = torch.cat((-turned[..., half:], turned[..., :half]), -1)
        return torch.cat((turned * cos + swapped * sin, kept), -1)

    def forward(self, x, cos, sin):
        b, t, _ = x.size()
        h = self.norm(x)
        q = self.query(h).reshape(b, t, self.heads, self.head_dim).permute(0, 2, 1, 3)
        k, v = self.key_value(h).unsqueeze(1).chunk(2, dim=-1)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        k = k.expand(b, self.heads, t, self.head_dim)
        v = v.expand(b, self.heads, t, self.head_dim)
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        a = self.dense(a.permute(0, 2, 1, 3).reshape(b, t, -1))
        return x + a + self.fc_out(F.gelu(self.fc_in(h)))


class ParallelGPT(nn.Module):
    def __init__(
        self,
        vocab=113,
        dim=84,
        layers=4,
        heads=5,
        head_dim=20,
        rotary_dim=8,
        max_len=130,
    ):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(max_len + 2, dim)  # OPT: the first two rows are unused
        self.blocks = nn.ModuleList(
            [ParallelBlock(dim, heads, head_dim, rotary_dim) for _ in range(layers)]
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab)
        angles = torch.outer(
            torch.arange(max_len).float(),
            1.0 / 10000 ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim),
        )
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cos_cached", angles.cos()[None, None], persistent=False)
        self.register_buffer("sin_cached", angles.sin()[None, None], persistent=False)

    def forward(self, input_ids, attention_mask=None):
        b, t = input_ids.shape
        position_ids = torch.arange(t, device=input_ids.device).unsqueeze(0).expand(b, t) + 2
        x = self.embed(input_ids) + self.positions(position_ids)
        cos, sin = self.cos_cached[:, :, :t], self.sin_cached[:, :, :t]
        for block in self.blocks:
            x = block(x, cos, sin)
        return {"logits": self.head(self.norm(x)) * 0.7}
