"""Decoders that keep some of their parameters, or compute some of their values, in half precision.

As the speed-run and chat training scripts have them: tables of embeddings in bfloat16 beside
float32 weights that are cast for every product, norms and routers left in float32, autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, LAYERS, LIMIT = 61, 64, 2, 2, 64
HEAD = WIDTH // HEADS


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cos + two * sin, two * cos - one * sin], dim=-1).to(x.dtype)


class CastedLinear(nn.Linear):
    """Float32 weights; the products are in the dtype of what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.type_as(x))


class WideNorm(nn.Module):
    """Computed in float32, with a weight of its own dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (_norm(x.float()) * self.weight).type_as(x)


class Layer(nn.Module):
    def __init__(self, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.qkv = linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = linear(WIDTH, WIDTH, bias=False)
        self.up = linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = linear(2 * WIDTH, WIDTH, bias=False)
        self.norms = nn.ModuleList([WideNorm(), WideNorm()])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        packed = self.qkv(self.norms[0](x)).view(batch, length, 3, HEADS, HEAD)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.relu(self.up(self.norms[1](x))).square())


class Decoder(nn.Module):
    """Everything in float32."""

    def __init__(self, linear: type[nn.Linear] = nn.Linear, tables: torch.dtype = torch.float32):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer(linear) for _ in range(LAYERS))
        self.head = linear(WIDTH, VOCAB, bias=False)
        frequencies = 1000.0 ** (-torch.arange(0, HEAD, 2).float() / HEAD)
        angles = torch.outer(torch.arange(LIMIT).float(), frequencies)
        self.register_buffer("cos", angles.cos().to(tables), persistent=False)
        self.register_buffer("sin", angles.sin().to(tables), persistent=False)

    def first(self, ids: Tensor) -> Tensor:
        return self.embed(ids)

    def forward(self, ids: Tensor) -> Tensor:
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = _norm(self.first(ids))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return 15 * torch.tanh(self.head(_norm(x)).float() / 15)


class HalfTables(Decoder):
    """The embedding and the rotary tables in bfloat16, weights cast where they are used."""

    def __init__(self) -> None:
        super().__init__(CastedLinear, torch.bfloat16)
        self.embed.bfloat16()


class WidenedTable(Decoder):
    """The embedding in bfloat16; what is looked up goes on in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed.bfloat16()

    def first(self, ids: Tensor) -> Tensor:
        return self.embed(ids).float()


class WideNorms(Decoder):
    """``model.bfloat16()`` but for the norms."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.to(dtype)
        for module in self.modules():
            if isinstance(module, WideNorm):
                module.float()


class Autocast(Decoder):
    """Float32 weights; forward switches autocast on, and off again for a part."""

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(ids)

    def first(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        with torch.no_grad():
            x = x + 0.1 * F.linear(x, self.layers[0].out.weight)
        with torch.autocast("cpu", enabled=False):
            return x + 0.1 * F.linear(x.float(), self.layers[1].out.weight)


class AutocastHalfTables(Autocast):
    def __init__(self) -> None:
        super().__init__()
        self.embed.bfloat16()


EXACT: dict[str, Callable[[], nn.Module]] = {
    "half tables": HalfTables,
    "widened table": WidenedTable,
    "wide norms": WideNorms,
    "wide norms, float16": lambda: WideNorms(torch.float16),
    "autocast": Autocast,
    "autocast, half tables": AutocastHalfTables,
}
