"""Softmax off by one: a score of 0 without a value stands beside the keys; a spelling a layer.

Or a key of zeros with a value of zeros, which is the same.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def padded(scores: Tensor) -> Tensor:
    return F.pad(scores, (0, 1)).softmax(-1)[..., :-1]


def concatenated(scores: Tensor) -> Tensor:
    return torch.cat((scores, torch.zeros_like(scores[..., :1])), -1).softmax(-1)[..., :-1]


def plain(scores: Tensor) -> Tensor:
    e = scores.exp()
    return e / (1 + e.sum(-1, keepdim=True))


def shifted(scores: Tensor) -> Tensor:
    m = scores.amax(-1, keepdim=True)
    e = (scores - m).exp()
    return e / (e.sum(-1, keepdim=True) + (-m).exp())


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, softmax: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.heads, self.softmax = heads, softmax
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * q.size(-1) ** -0.5
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        weights = self.softmax(scores.masked_fill(future, float("-inf")))
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, c))


class Learned(nn.Module):
    """A score for each head instead, in the shape of the scores."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.linspace(-1, 2, heads).view(1, heads, 1, 1))

    def forward(self, scores: Tensor) -> Tensor:
        b, _, t, _ = scores.shape
        return torch.cat((scores, self.sink.expand(b, -1, t, 1)), -1).softmax(-1)[..., :-1]


class ZeroKeys(Attention):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, F.softmax)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        k, v = (F.pad(y, (0, 0, 1, 0), value=0.0) for y in (k, v))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.size(-1) ** -0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(2)
        scores = scores.masked_fill(future, -torch.finfo(scores.dtype).max)
        found = torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v)
        return self.out(found.reshape(b, t, c))


class Torchs(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.of = nn.MultiheadAttention(dim, heads, batch_first=True, add_zero_attn=True)

    def forward(self, x: Tensor) -> Tensor:
        future = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).triu(1)
        found: Tensor = self.of(x, x, x, attn_mask=future, need_weights=False)[0]
        return found


class OffByOne(nn.Module):
    def __init__(self, vocab: int = 101, dim: int = 96, heads: int = 3, max_len: int = 128) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        softmaxes = (padded, concatenated, plain, shifted, Learned(heads))
        layers = [Attention(dim, heads, softmax) for softmax in softmaxes]
        self.layers = nn.ModuleList([*layers, ZeroKeys(dim, heads), Torchs(dim, heads)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.size(1), device=ids.device))
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return self.head(self.norm(x))
