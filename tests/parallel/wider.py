"""Spellings besides `models`: products without nn.Linear, experts, adapters, torch's attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.models import (
    HEAD,
    HIDDEN,
    VOCAB,
    WIDTH,
    Decoder,
    Mlp,
    PackedGlu,
    Separate,
    attend,
)

EXPERTS, CHOSEN = 3, 2


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.2)


class EinsumAttention(nn.Module):
    """One weight for q, k and v; heads and channels are dimensions of the weights."""

    def __init__(self, heads: int = 5) -> None:
        super().__init__()
        self.qkv, self.out = weight(3, WIDTH, heads, HEAD), weight(heads, HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("btd,sdhk->sbthk", x, self.qkv)
        scores = torch.einsum("bthk,bshk->bhts", q * HEAD**-0.5, k)
        after = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(after, -torch.inf).softmax(-1)
        y = torch.einsum("bhts,bshk->bthk", weights, v)
        return torch.einsum("...hk,hkd->...d", y, self.out)


class MatmulMlp(nn.Module):
    """Plain products with parameters that are stored the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = weight(WIDTH, HIDDEN), weight(HIDDEN, WIDTH)
        self.bias = weight(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x @ self.up + self.bias) @ self.down


class Inferred(Separate):
    """``view(b, t, -1, d)``, and dtypes taken from values of other widths."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k = self.q(x).view(b, t, -1, HEAD), self.k(x).view(b, t, -1, HEAD)
        v = self.v(x).view(b, t, -1, HEAD).type_as(x)
        turned = q.double().type_as(x).to(k.dtype)
        return self.out(attend(turned, k.type_as(self.q.weight), v))


class DenseExperts(nn.Module):
    """Every expert computes every token; a softmax router's weights pick."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up, self.down = weight(EXPERTS, WIDTH, HIDDEN), weight(EXPERTS, HIDDEN, WIDTH)

    def gates(self, x: Tensor) -> Tensor:
        """``[B, T, E]``, 0 for experts not chosen."""
        values, index = self.router(x).softmax(-1).topk(CHOSEN, dim=-1)
        chosen = F.one_hot(index, EXPERTS).to(x.dtype)
        return (chosen * (values / values.sum(-1, keepdim=True))[..., None]).sum(-2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("btd,edh->bteh", x, self.up))
        return torch.einsum("bteh,ehd,bte->btd", hidden, self.down, self.gates(x))


class OssExperts(DenseExperts):
    """GPT-OSS's tensors: gate and up interleaved, biases per expert, batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = weight(EXPERTS, WIDTH, 2 * HIDDEN), weight(EXPERTS, HIDDEN, WIDTH)
        self.up_bias, self.down_bias = weight(EXPERTS, 2 * HIDDEN), weight(EXPERTS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        every = flat.repeat(EXPERTS, 1).view(EXPERTS, -1, WIDTH)
        both = torch.bmm(every, self.up) + self.up_bias[:, None, :]
        gate, up = both[..., ::2], both[..., 1::2]
        hidden = (up.clamp(min=-7.0, max=7.0) + 1) * gate * torch.sigmoid(gate * 1.702)
        result = torch.bmm(hidden, self.down) + self.down_bias[:, None, :]
        gates = self.gates(x).reshape(-1, EXPERTS)
        return (result * gates.t()[..., None]).sum(dim=0).view_as(x)


class LoopedExperts(DenseExperts):
    """A module for each expert, added up with the router's weights."""

    def __init__(self) -> None:
        super().__init__()
        del self.up, self.down
        self.experts = nn.ModuleList(PackedGlu() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x)
        result = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            result = result + gates[..., i, None] * expert(x)
        return result


class RoutedAndShared(DenseExperts):
    """Rows of chosen experts, gate and up in one tensor, beside an expert for all tokens.

    Gates are kept in a wider dtype than a float32 model has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = weight(EXPERTS, 2 * HIDDEN, WIDTH), weight(EXPERTS, WIDTH, HIDDEN)
        self.shared = PackedGlu()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, WIDTH)
        logits = self.router(flat)
        gates, chosen = logits.softmax(-1, dtype=torch.float64).topk(CHOSEN, dim=-1)
        rows, experts = flat.repeat_interleave(CHOSEN, dim=0), chosen.reshape(-1)
        both = torch.bmm(self.up[experts], rows.unsqueeze(-1)).squeeze(-1)
        gate, up = both.chunk(2, dim=-1)
        found = torch.bmm(self.down[experts], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        found = (found * gates.reshape(-1, 1)).view(-1, CHOSEN, WIDTH).sum(1).to(x.dtype)
        return found.view_as(x) + self.shared(x)


class Adapted(nn.Module):
    """A frozen projection and a trained one of low rank beside it."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.base = nn.Linear(size_in, size_out)
        self.base.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(size_in, 3, bias=False), nn.Linear(3, size_out, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_b(self.lora_a(x)) * 2.0


def adapted(module: nn.Module) -> nn.Module:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Adapted(child.in_features, child.out_features))
    return module


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention`: batch and heads share a dimension on the way."""

    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        result: Tensor = self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return result


class ParallelBlock(nn.Module):
    """Attention and MLP read the same value; both are added at once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Separate(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y) + self.mlp(y)


class LearnedBias(Separate):
    """A slope for each head is learned, and reaches the scores as ``[H, T, T]``."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = weight(self.heads)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, HEAD).transpose(1, 2) for p in (self.q, self.k, self.v))
        places = torch.arange(t)
        bias = (places[None, :] - places[:, None]) * self.slopes[:, None, None]
        after = torch.ones(t, t, dtype=torch.bool).triu(1)
        scores = (q @ k.mT * HEAD**-0.5 + bias).masked_fill(after, -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))


class UnitLength(Separate):
    """Queries and keys of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, HEAD) for p in (self.q, self.k, self.v))
        return self.out(attend(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v))


class SummedSquares(Separate):
    """The same by a sum of squares for each head."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, HEAD) for p in (self.q, self.k, self.v))
        q, k = (p * (p.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for p in (q, k))
        return self.out(attend(q, k, v))


class TorchGlu(PackedGlu):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.glu(self.gate_up(x), dim=-1))


class ValueTable(Separate):
    """Values come from the tokens themselves too."""

    def forward(self, x: Tensor, values: Tensor | None = None) -> Tensor:
        assert values is not None
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, HEAD) for p in (self.q, self.k, self.v))
        return self.out(attend(q, k, v + values.view(b, t, -1, HEAD)))


class ValueTables(Decoder):
    def __init__(self) -> None:
        super().__init__(ValueTable)
        self.tables = nn.ModuleList(nn.Embedding(VOCAB, 4 * HEAD) for _ in self.blocks)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1]))
        for block, table in zip(self.blocks, self.tables, strict=True):
            x = x + block.attention(block.norm1(x), table(ids))
            x = x + block.mlp(block.norm2(x))
        return self.head(self.norm(x))


def parallel() -> nn.Module:
    model = Decoder(Separate)
    model.blocks = nn.ModuleList(ParallelBlock() for _ in model.blocks)
    return model


WIDER: dict[str, Callable[[], nn.Module]] = {
    "einsum": lambda: Decoder(EinsumAttention, MatmulMlp),
    "inferred sizes, type_as": lambda: Decoder(lambda: Inferred(6, 2)),
    "dense experts": lambda: Decoder(Separate, DenseExperts),
    "oss experts": lambda: Decoder(Separate, OssExperts),
    "looped experts": lambda: Decoder(Separate, LoopedExperts),
    "routed experts and a shared one": lambda: Decoder(Separate, RoutedAndShared),
    "adapters": lambda: Decoder(lambda: adapted(Separate()), lambda: adapted(Mlp())),
    "torch's attention": lambda: Decoder(TorchAttention),
    "parallel": parallel,
    "learned bias": lambda: Decoder(LearnedBias),
    "unit length, torch's GLU": lambda: Decoder(UnitLength, TorchGlu),
    "value tables": ValueTables,
    "squares summed for each head": lambda: Decoder(SummedSquares),
}
