"""Weights used in other ways than a projection each: by head, by expert, turned, by list."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.parallel.models import HEAD, HIDDEN, VOCAB, WIDTH, Block, Mlp, Separate, attend
from tests.parallel.wider import CHOSEN, EXPERTS, DenseExperts, weight


class OneLayer(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module, padding: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, padding_idx=padding)
        self.block, self.norm = Block(attention, mlp), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embed(ids))))


class Turned(nn.Module):
    """GPT-2's layer: the weight is stored the other way round."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.weight, self.bias = weight(size_in, size_out), weight(size_out)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.weight.shape[1])


def turned(module: nn.Module) -> nn.Module:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Turned(child.in_features, child.out_features))
    return module


class Head(nn.Module):
    """One head, as a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEAD) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-2, -1) * HEAD**-0.5
        after = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return scores.masked_fill(after, -torch.inf).softmax(-1) @ self.v(x)


class Heads(nn.Module):
    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head() for _ in range(heads))
        self.out = nn.Linear(heads * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([head(x) for head in self.heads], dim=-1))


class OtherHeads(Heads):
    """The first head is softer than the others: they are no one attention."""

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.heads
        return self.out(torch.cat([first(x * 0.5), *(head(x) for head in rest)], dim=-1))


class Latent(nn.Module):
    """Low-rank queries, keys and values; one rotary part of the keys for all heads."""

    def __init__(self, heads: int = 4, rank: int = 12, shared: int = 4) -> None:
        super().__init__()
        self.heads, self.rank, self.shared = heads, rank, shared
        self.q = nn.Linear(WIDTH, heads * (HEAD + shared))
        self.down, self.norm = nn.Linear(WIDTH, rank + shared), nn.RMSNorm(rank)
        self.up, self.out = nn.Linear(rank, heads * 2 * HEAD), nn.Linear(heads * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, -1).transpose(1, 2)
        latent, one = self.down(x).split([self.rank, self.shared], dim=-1)
        both = self.up(self.norm(latent)).view(b, t, self.heads, -1).transpose(1, 2)
        own, v = both.chunk(2, dim=-1)
        one = torch.tanh(one.view(b, t, 1, self.shared).transpose(1, 2))
        k = torch.cat([own, one.expand(-1, self.heads, -1, -1)], dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


class Falcon(nn.Module):
    """Queries, key and value of each group beside each other; taken by lists."""

    def __init__(self, heads: int = 8, kv_heads: int = 4) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.qkv = nn.Linear(WIDTH, (heads + 2 * kv_heads) * HEAD)
        self.out = nn.Linear(heads * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.qkv(x).view(b, t, self.kv_heads, -1, HEAD)
        q, k, v = y[..., :-2, :], y[..., [-2], :], y[..., [-1], :]
        k, v = torch.broadcast_to(k, q.shape), torch.broadcast_to(v, q.shape)
        return self.out(attend(*(z.flatten(2, 3) for z in (q, k, v))))


class Scaled(Separate):
    """Positive scales and a gain of each head, made of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.heat, self.gain = weight(self.heads), weight(self.heads)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, HEAD) for p in (self.q, self.k, self.v))
        y = attend(q * self.heat.exp().view(1, 1, -1, 1), k, v).view(b, t, -1, HEAD)
        return self.out((y * torch.sigmoid(self.gain)[:, None]).flatten(2))


class SelectedExperts(DenseExperts):
    """Weights of all experts in one tensor, gates cut off one by one."""

    def forward(self, x: Tensor) -> Tensor:
        gates, result = self.gates(x), 0
        for i in range(EXPERTS):
            result = result + gates[..., i : i + 1] * (F.silu(x @ self.up[i]) @ self.down[i])
        return result  # type: ignore[return-value]


class StackedExperts(DenseExperts):
    """Transformers' experts: each works on its tokens; rows of one tensor are its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = weight(EXPERTS, 2 * HIDDEN, WIDTH), weight(EXPERTS, WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        gates, chosen = self.router(flat).softmax(-1).topk(CHOSEN, dim=-1)
        result, places = torch.zeros_like(flat), F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        for i in range(EXPERTS):
            place, token = torch.where(places[i])
            gate, up = F.linear(flat[token], self.up[i]).chunk(2, dim=-1)
            found = F.linear(F.silu(gate) * up, self.down[i]) * gates[token, place, None]
            result.index_add_(0, token, found)
        return result.view_as(x)


class MaskedExperts(DenseExperts):
    """All experts compute; the gate of each is made of a mask, of numbers or not."""

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).topk(CHOSEN, dim=-1)
        result, gates = torch.zeros_like(x), gates / gates.sum(-1, keepdim=True)
        for i in range(EXPERTS):
            mask = (chosen == i).to(x.dtype) if i else chosen == i
            own = gates * mask if i < 2 else torch.where(mask > 0, gates, torch.zeros_like(gates))
            gate = own.sum(-1, keepdim=True)
            result = result + gate * (F.silu(x @ self.up[i]) @ self.down[i])
        return result


class WeighedExperts(DenseExperts):
    """Weights looked up for each token; the results of one token are added up by a product."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, WIDTH)
        gates, chosen = self.router(flat).softmax(-1).topk(CHOSEN, dim=-1)
        hidden = F.silu(torch.einsum("td,tadh->tah", flat, self.up[chosen]))
        result = torch.einsum("tah,tahd->tad", hidden, self.down[chosen])
        return torch.einsum("tad,ta->td", result, gates).view_as(x)


class NarrowExperts(DenseExperts):
    """Each computes all rows with a few features; what is sent is their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (
            weight(EXPERTS, WIDTH, HIDDEN // 4),
            weight(EXPERTS, HIDDEN // 4, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        hidden = F.silu(torch.bmm(flat.expand(EXPERTS, -1, -1), self.up))
        gates = self.gates(x).reshape(-1, EXPERTS).t()
        return (torch.bmm(hidden, self.down) * gates[..., None]).sum(0).view_as(x)


class GivenExperts(DenseExperts):
    """A module for each expert; what it makes is added to the rows that chose it."""

    def __init__(self) -> None:
        super().__init__()
        del self.up, self.down
        self.experts = nn.ModuleList(Mlp() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        gates, chosen = self.router(flat).softmax(-1).topk(CHOSEN, dim=-1)
        result = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            result[token] += gates[token, place, None] * expert(flat[token])
        return result.view_as(x)


class ViewedExperts(StackedExperts):
    """Rows of all experts in one matrix, as DBRX has them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = weight(EXPERTS * HIDDEN, WIDTH), weight(EXPERTS * HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        gates, chosen = self.router(flat).softmax(-1).topk(CHOSEN, dim=-1)
        result, places = torch.zeros_like(flat), F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        for i in range(EXPERTS):
            place, token = torch.where(places[i])
            up, down = (w.view(EXPERTS, HIDDEN, WIDTH)[i] for w in (self.up, self.down))
            found = F.silu(flat[token] @ up.T) @ down * gates[token, place, None]
            result.index_add_(0, token, found)
        return result.view_as(x)


class OverOne(nn.Module):
    """A projection as a convolution over one token: ``[B, C, T]``."""

    def __init__(self, size_in: int, size_out: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(size_in, size_out, kernel)
        self.before = kernel - 1

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return self.conv(F.pad(x, (self.before, 0)) if self.before else x).transpose(1, 2)


def convolved(module: nn.Module, kernel: int = 1) -> nn.Module:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, OverOne(child.in_features, child.out_features, kernel))
    return module


def normed(module: nn.Module) -> nn.Module:
    """Rows of a length of their own: every rank makes all of a weight, and takes its part."""
    for child in list(module.children()):
        if isinstance(child, nn.Linear):
            weight_norm(child)
    return module


class NormedResult(Separate):
    """A norm over all heads of what the attention makes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.LayerNorm(4 * HEAD)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, HEAD)) for p in (self.q, self.k, self.v))
        return self.out(self.wide(attend(q, k, v)))


class HeadGates(Separate):
    """A gate for each of 8 heads, which are 4 groups."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.gate = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, HEAD)) for p in (self.q, self.k, self.v))
        k, v = (p.repeat_interleave(2, 2) for p in (k, v))
        y = attend(q, k, v).unflatten(-1, (8, HEAD)) * self.gate(x).sigmoid()[..., None]
        return self.out(y.flatten(2))


class ResultByHead(Separate):
    """What every head adds to the residual stream, looked at and then summed."""

    def __init__(self) -> None:
        super().__init__()
        self.out = weight(4, HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, HEAD)) for p in (self.q, self.k, self.v))
        z = attend(q, k, v).unflatten(-1, (4, HEAD))
        return torch.einsum("bqhd,hdm->bqhm", z, self.out).sum(2)


class Grouped(Separate):
    """Grouped heads by einsum: a rank with heads of two groups, and not all, has no rectangle."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.kv_heads, -1, HEAD)
        k, v = (p(x).view(b, t, self.kv_heads, HEAD) for p in (self.k, self.v))
        scores = torch.einsum("btgrd,bsgd->bgrts", q, k) * HEAD**-0.5
        after = torch.ones(t, t, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(after, -torch.inf).softmax(-1)
        return self.out(torch.einsum("bgrts,bsgd->btgrd", weights, v).reshape(b, t, -1))


class GatedHeads(nn.Module):
    """A gate from each head's query; biases of queries and values only; dimensions by name."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        size = heads * HEAD
        self.heads, self.qkv = heads, weight(3 * size, WIDTH)
        self.of_q, self.of_v, self.gate = weight(size), weight(size), weight(heads, HEAD)
        self.turn, self.out = weight(heads, HEAD, HEAD), nn.Linear(size, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.of_q, torch.zeros_like(self.of_v), self.of_v])
        q, k, v = F.linear(x, self.qkv, bias).tensor_split(3, dim=-1)
        q, k, v = (torch.einsum("bthd->bhtd", p.unflatten(-1, (self.heads, HEAD)))
                   for p in (q, k, v))  # fmt: skip
        gate = torch.einsum("bhtd,hd->bht", q, self.gate).sigmoid()
        q = torch.einsum("bhtd,hde->bhte", q, self.turn)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True) * gate[..., None]
        return self.out(y.transpose(1, 2).flatten(2))


class Narrow(Mlp):
    """Beside the MLP a few features that look at its result: sending costs more than they do."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.less, self.more = nn.Linear(WIDTH, features), nn.Linear(features, WIDTH)
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.rate * self.more(F.gelu(self.less(y)))


class TiedByProduct(OneLayer):
    """The head is a product with the token embedding's rows."""

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__(attention, mlp)
        del self.head
        self.bias = weight(VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.block(self.embed(ids))) @ self.embed.weight.T + self.bias


class Parts(nn.Module):
    """q, k and v by parts of one weight ``[3N, C]``, or by the three of ``[3, N, C]``."""

    def __init__(self, stacked: bool, heads: int = 4) -> None:
        super().__init__()
        self.heads, rows = heads, (3, heads * HEAD) if stacked else (3 * heads * HEAD,)
        self.qkv, self.bias, self.out = (
            weight(*rows, WIDTH),
            weight(*rows),
            weight(heads, HEAD, WIDTH),
        )
        self.stacked = stacked

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = (p if self.stacked else p.chunk(3) for p in (self.qkv, self.bias))
        q, k, v = (F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
        y = attend(*(p.unflatten(-1, (self.heads, HEAD)) for p in (q, k, v)))
        return y @ self.out.flatten(0, 1)


FURTHER: dict[str, Callable[[], nn.Module]] = {
    "turned weights": lambda: OneLayer(turned(Separate()), turned(Mlp())),
    "head modules": lambda: OneLayer(Heads(), Mlp()),
    "latent": lambda: OneLayer(Latent(), Mlp()),
    "falcon": lambda: OneLayer(Falcon(), Mlp(), padding=5),
    "scaled": lambda: OneLayer(Scaled(), Mlp()),
    "grouped": lambda: OneLayer(Grouped(6, 2), Mlp()),
    "convolutions over one": lambda: OneLayer(convolved(Separate(4, 2)), convolved(Mlp())),
    "normed weights": lambda: OneLayer(Separate(), normed(Mlp())),
    "result by head": lambda: OneLayer(ResultByHead(), Mlp()),
    "tied by a product": lambda: TiedByProduct(Separate(), Mlp()),
    "gated heads": lambda: OneLayer(GatedHeads(), Mlp()),
    "gates by masks": lambda: OneLayer(Separate(), MaskedExperts()),
    "experts that add to their rows": lambda: OneLayer(Separate(), GivenExperts()),
    "selected experts": lambda: OneLayer(Separate(), SelectedExperts()),
    "stacked experts": lambda: OneLayer(Separate(), StackedExperts()),
    "parts of one weight": lambda: OneLayer(Parts(stacked=False), Mlp()),
    "stacked weights": lambda: OneLayer(Parts(stacked=True), Mlp()),
    "experts in one matrix": lambda: OneLayer(Separate(), ViewedExperts()),
    "head gates": lambda: OneLayer(HeadGates(), Mlp()),
    "weighed experts": lambda: OneLayer(Separate(), WeighedExperts()),
    "narrow experts": lambda: OneLayer(NormedResult(), NarrowExperts()),
}
