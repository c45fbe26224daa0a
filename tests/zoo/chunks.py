"""Attention within chunks of positions, as in Llama 4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 97


class ByChunks(nn.Module):
    """Layers with chunks of other sizes and a full one; heads of 64 have no room left."""

    SIZES = (7, 33, 0)

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(VOCAB, 128), nn.Embedding(256, 128)
        self.mix = nn.ModuleList([nn.Linear(128, 384) for _ in self.SIZES])
        self.out = nn.ModuleList([nn.Linear(128, 128) for _ in self.SIZES])
        self.head = nn.Linear(128, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        t = torch.arange(length)
        x = self.table(ids) + self.places(t)
        for chunk, mix, out in zip(self.SIZES, self.mix, self.out, strict=True):
            q, k, v = mix(x).view(batch, length, 3, 2, 64).permute(2, 0, 3, 1, 4)
            allowed = t[None, :] <= t[:, None]
            if chunk:
                allowed = allowed & (t[None, :] // chunk == t[:, None] // chunk)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
            x = x + out(y.transpose(1, 2).reshape(batch, length, 128))
        return self.head(x)
