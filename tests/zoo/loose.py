"""Models in looser styles: one module per head, torch's own layers, einsum, the speed runs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, LAYERS, LIMIT = 97, 96, 4, 128


class OneHead(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, size, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(LIMIT, LIMIT)))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        k, q, v = self.key(x), self.query(x), self.value(x)
        weights = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        weights = weights.masked_fill(self.tril[:length, :length] == 0, float("-inf"))
        return F.softmax(weights, dim=-1) @ v


class PerHeadBlock(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(OneHead(WIDTH // heads) for _ in range(heads))
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        x = x + self.proj(torch.cat([head(y) for head in self.heads], dim=-1))
        return x + self.ff(self.ln2(x))


class PerHeadGPT(nn.Module):
    """Logits and loss; heads one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LIMIT, WIDTH)
        self.blocks = nn.Sequential(*[PerHeadBlock(3) for _ in range(LAYERS)])
        self.ln = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        logits = self.head(self.ln(self.blocks(x)))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class SinusoidalLM(nn.Module):
    """`nn.TransformerEncoder` with a causal mask and sinusoidal positions: torch's tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 3, 200, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        self.decoder = nn.Linear(WIDTH, VOCAB)
        position = torch.arange(LIMIT).unsqueeze(1)
        rate = torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(10000.0) / WIDTH))
        table = torch.zeros(1, LIMIT, WIDTH)
        table[0, :, 0::2] = torch.sin(position * rate)
        table[0, :, 1::2] = torch.cos(position * rate)
        self.register_buffer("pe", table)

    def forward(self, src: Tensor) -> Tensor:
        x = self.embedding(src) * math.sqrt(WIDTH)
        x = x + self.pe[:, : x.size(1)]
        mask = nn.Transformer.generate_square_subsequent_mask(src.size(1), device=src.device)
        return self.decoder(self.encoder(x, mask=mask, is_causal=True))


class MultiheadBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 3, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 250), nn.GELU(), nn.Linear(250, WIDTH))
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        length = x.size(1)
        mask = torch.full((length, length), float("-inf"), device=x.device).triu(1)
        y = self.ln1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln2(x))


class MultiheadGPT(nn.Module):
    """A GPT (OpenAI's CLIP text tower) on `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCAB, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(LIMIT, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(MultiheadBlock() for _ in range(LAYERS))
        self.ln = nn.LayerNorm(WIDTH)

    def forward(self, text: Tensor) -> Tensor:
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.ln(x), self.token_embedding.weight)


class EinsumBlock(nn.Module):
    """Nothing but einsum, in the letters of the JAX world."""

    heads, size = 3, 32

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, WIDTH, self.heads, self.size) * WIDTH**-0.5)
        self.out = nn.Parameter(torch.randn(self.heads, self.size, WIDTH) * WIDTH**-0.5)
        self.wi = nn.Parameter(torch.randn(WIDTH, 200) * WIDTH**-0.5)
        self.wo = nn.Parameter(torch.randn(200, WIDTH) * 200**-0.5)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, (WIDTH,), self.scale1)
        q, k, v = torch.einsum("btd,sdhk->sbthk", y, self.qkv)
        logits = torch.einsum("bthk,bshk->bhts", q * self.size**-0.5, k)
        t = torch.arange(x.shape[1], device=x.device)
        allowed = t[:, None] >= t[None, :]
        logits = torch.where(allowed, logits, torch.finfo(logits.dtype).min)
        y = torch.einsum("bhts,bshk->bthk", logits.softmax(-1), v)
        x = x + torch.einsum("bthk,hkd->btd", y, self.out)
        y = F.rms_norm(x, (WIDTH,), self.scale2)
        return x + torch.einsum(
            "btf,fd->btd", F.gelu(torch.einsum("btd,df->btf", y, self.wi)), self.wo
        )


class EinsumLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.1)
        self.where = nn.Parameter(torch.randn(LIMIT, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(EinsumBlock() for _ in range(LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.table) + self.where[None, : ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return torch.einsum("btd,vd->btv", F.rms_norm(x, (WIDTH,)), self.table)


class SpeedBlock(nn.Module):
    heads, size = 3, 32

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 384, bias=False), nn.Linear(384, WIDTH, bias=False)
        self.mix = nn.Parameter(torch.tensor(0.6))
        self.lambdas = nn.Parameter(torch.tensor([0.9, 0.1]))
        rate = (1 / 1024) ** torch.linspace(0, 1, self.size // 4)
        rate = torch.cat([rate, rate.new_zeros(self.size // 4)])
        self.register_buffer("rate", rate, persistent=False)

    def rotary(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.size(1), device=x.device).float(), self.rate)
        cos, sin = angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]
        one, two = x.float().chunk(2, dim=-1)
        return torch.cat([one * cos + two * sin, two * cos - one * sin], 3).type_as(x)

    def forward(self, x: Tensor, v1: Tensor | None, x0: Tensor) -> tuple[Tensor, Tensor]:
        x = self.lambdas[0] * x + self.lambdas[1] * x0
        y = F.rms_norm(x, (x.size(-1),))
        batch, length = x.shape[:2]
        shape = (batch, length, self.heads, self.size)
        q, k, v = (project(y).view(shape) for project in (self.q, self.k, self.v))
        v1 = v if v1 is None else v1
        v = (1 - self.mix) * v + self.mix * v1.view_as(v)
        q, k = F.rms_norm(q, (self.size,)), F.rms_norm(k, (self.size,))
        q, k = self.rotary(q), self.rotary(k)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=0.12
        )
        x = x + self.proj(y.transpose(1, 2).contiguous().view_as(x))
        y = F.rms_norm(x, (x.size(-1),))
        return x + self.down(F.relu(self.up(y)).square()), v1


class SpeedRun(nn.Module):
    """Value residuals, skips from the first half to the second, squared ReLU, softcapped logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(SpeedBlock() for _ in range(2 * LAYERS))
        self.skips = nn.Parameter(torch.ones(LAYERS) * 0.7)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, idx: Tensor, target: Tensor | None = None) -> Tensor:
        x = F.rms_norm(self.embed(idx), (WIDTH,))
        x0, v1, kept = x, None, []
        for i, block in enumerate(self.blocks):
            if i >= LAYERS:
                x = x + self.skips[i - LAYERS] * kept.pop()
            x, v1 = block(x, v1, x0)
            if i < LAYERS:
                kept.append(x)
        logits = 15 * torch.tanh(self.head(F.rms_norm(x, (WIDTH,))) / 15)
        return logits.float()
