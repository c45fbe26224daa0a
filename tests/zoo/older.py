"""What older public code does: masks looked at by torch, `.data`, tables registered in forward."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.awkward import HEAD, HEADS, LAYERS, LIMIT, VOCAB, WIDTH, Dense


class Sinusoids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        table = torch.zeros(LIMIT, WIDTH)
        position = torch.arange(LIMIT).unsqueeze(1)
        divisor = torch.exp(torch.arange(0, WIDTH, 2) * -(math.log(10000.0) / WIDTH))
        table[:, 0::2], table[:, 1::2] = (
            torch.sin(position * divisor),
            torch.cos(position * divisor),
        )
        self.register_buffer("table", table.unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[:, : x.size(1)].requires_grad_(False)


class TutorialLM(nn.Module):
    """`nn.TransformerEncoder` with a mask and no hint: torch compares it with a causal one."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 3 * WIDTH, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.embed, self.places = nn.Embedding(VOCAB, WIDTH), Sinusoids()
        self.decoder = nn.Linear(WIDTH, VOCAB)
        self.causal = causal

    def forward(self, ids: Tensor) -> Tensor:
        seen = torch.ones(ids.size(1), ids.size(1))
        mask = torch.log(torch.tril(seen) if self.causal else seen)
        x = self.places(self.embed(ids) * math.sqrt(WIDTH))
        return F.log_softmax(self.decoder(self.encoder(x, mask=mask)), dim=-1)


class Annotated(nn.Module):
    """Reads `.data`, keeps its attention weights, hides with -1e9 what a uint8 mask says."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCAB, WIDTH), Sinusoids()
        self.layers = nn.ModuleList(_AnnotatedLayer() for _ in range(LAYERS))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        size = ids.size(-1)
        ahead = torch.triu(torch.ones(1, size, size), diagonal=1).type(torch.uint8)
        mask = (ahead == 0).type_as(ids.data).unsqueeze(1)
        x = self.places(self.embed(ids) * math.sqrt(WIDTH))
        for layer in self.layers:
            x = layer(x, mask)
        return self.out(self.norm(x))


class _AnnotatedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.mlp, self.attn = Dense(), None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y, batch = self.norms[0](x), x.size(0)
        q, k, v = (
            linear(y).view(batch, -1, HEADS, HEAD).transpose(1, 2)
            for linear, y in zip(self.linears, (y, y, y), strict=False)
        )
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(HEAD)
        self.attn = scores.masked_fill(mask == 0, -1e9).softmax(dim=-1)
        y = torch.matmul(self.attn, v).transpose(1, 2).contiguous().view(batch, -1, WIDTH)
        x = x + self.linears[-1](y)
        return x + self.mlp(self.norms[1](x))


class RegisteredMask(nn.Module):
    """ALiBi and the causal mask in one buffer, registered by the first call and when it grows."""

    def __init__(self, first: int = 16) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.packs = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.first_run, self.longest = True, first

    def bias(self, length: int) -> Tensor:
        if self.first_run or length > self.longest:
            self.first_run, self.longest = False, max(length, self.longest)
            self.register_buffer("future", _alibi(self.longest), persistent=False)
        return self.future[:, :length, :length]

    def forward(self, ids: Tensor) -> Tensor:
        assert ids.shape[1] <= LIMIT
        batch, length = ids.shape
        x, bias = self.embed(ids), self.bias(length)
        for norm, pack, projection in zip(self.norms, self.packs, self.projections, strict=True):
            qkv = pack(norm(x)).unflatten(-1, (3, WIDTH)).unsqueeze(0).transpose(0, -2).squeeze(-2)
            q, k, v = (t.view(batch, length, HEADS, HEAD).transpose(1, 2) for t in qkv)
            scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(HEAD) + bias
            scores = torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min))
            y = torch.matmul(scores.softmax(-1), v)
            x = x + projection(y.transpose(1, 2).reshape(batch, length, WIDTH))
        return self.out(x)


def _alibi(length: int) -> Tensor:
    slopes = torch.tensor([2.0 ** (-4 * (h + 1)) for h in range(HEADS)])
    distances = slopes[:, None, None] * torch.arange(length).expand(HEADS, 1, -1)
    return torch.full((length, length), float("-inf")).triu(1) + distances


def sequential() -> nn.Module:
    """No class of its own: parameters are called ``0.weight``; a mask grows in attributes."""
    from tests.zoo.awkward import Attention, CachedMask, GrowingRotary

    class Residual(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(WIDTH), inner

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(self.norm(x))

    net = nn.Sequential(
        nn.Embedding(VOCAB, WIDTH),
        *(Residual(Attention(GrowingRotary(), CachedMask())) for _ in range(LAYERS)),
        nn.Linear(WIDTH, VOCAB, bias=False),
    )
    net[-1].weight = net[0].weight
    return net


class Regions(nn.Module):
    """Rotary positions under autocast switched off and without gradients, as decorators have it."""

    def __init__(self, enabled: bool = False) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.packs = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.enabled = enabled

    @torch.no_grad()
    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):
            dtype = self.out.weight.dtype
            frequencies = 10000.0 ** (-torch.arange(0, HEAD, 2).to(dtype) / HEAD)
            angles = torch.einsum("i,j->ij", torch.arange(length, dtype=dtype), frequencies)
            return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            one, two = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-two, one], dim=-1) * sin

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        x, places = self.embed(ids), self.angles(length)
        for pack in self.packs:
            q, k, v = pack(x).view(batch, length, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
            q, k = self.turn(q, *places), self.turn(k, *places)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + y.transpose(1, 2).reshape(batch, length, WIDTH)
        return self.out(x)


class SharedTables(Regions):
    """One dictionary for all layers; its tables are kept in the dtype of the last call's queries.

    `from_tokens` keeps something of their values too.
    """

    def __init__(self, from_tokens: bool = False) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}
        self.from_tokens = from_tokens

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        length = x.shape[-2]
        if "cos" not in self.cache or self.cache["cos"].shape[0] < length:
            self.cache["cos"], self.cache["sin"] = self.angles(length)
        for name, table in self.cache.items():
            self.cache[name] = table.type_as(x) + (x.sum() * 0 if self.from_tokens else 0)
        return self.cache["cos"][:length], self.cache["sin"][:length]

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return super().turn(x, *self.tables(x))


class OtherNames(Regions):
    """Operations under their second names, and a padding that adds nothing."""

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        x, (cos, sin) = self.embed(ids), self.angles(length)
        places = torch.arange(length)
        hidden = torch.greater(places, places[:, None])
        for pack in self.packs:
            qkv = torch.moveaxis(pack(x).view(batch, length, 3, HEADS, HEAD), 2, 0)
            q, k, v = (torch.swapaxes(t, 1, axis1=2) for t in qkv)
            q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
            scores = torch.divide(q @ torch.swapdims(k, -1, -2), math.sqrt(HEAD))
            scores = F.pad(scores, (0, 0)).masked_fill(hidden, float("-inf"))
            y = torch.special.softmax(scores, -1) @ v
            x = torch.subtract(x, torch.negative(y.transpose(1, 2).reshape(batch, length, WIDTH)))
        return self.out(x)


class _OwnWeight(nn.Module):
    """A weight of its own beside a child, which is called first; wide enough to be divided."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * WIDTH, 2 * WIDTH) / math.sqrt(2 * WIDTH))
        self.linear = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.linear(x), self.weight)


class WeightsBesideModules(Regions):
    def __init__(self) -> None:
        super().__init__()
        self.packs = nn.ModuleList(_OwnWeight() for _ in range(LAYERS))


EXACT: dict[str, Callable[[], nn.Module]] = {
    "nn.TransformerEncoder, mask": TutorialLM,
    "annotated": Annotated,
    "mask registered in forward": RegisteredMask,
    "nn.Sequential": sequential,
    "autocast switched off": Regions,
    "autocast switched on": lambda: Regions(enabled=True),
    "other names": OtherNames,
    "weights beside modules": WeightsBesideModules,
    "tables kept in the dtype of a value": SharedTables,
}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "nn.TransformerEncoder, no mask": lambda: TutorialLM(causal=False),
    "tables made of values": lambda: SharedTables(from_tokens=True),
}
