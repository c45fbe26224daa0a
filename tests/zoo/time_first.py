"""Decoders that take ``[T, B]`` and give ``[T, B, V]``, as sequence-to-sequence code has it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.awkward import HEAD, HEADS, LAYERS, LIMIT, VOCAB, WIDTH


class WordLanguageModel(nn.Module):
    """The well-known example: a table of sines ``[T, 1, C]``, and torch's own encoder layers."""

    def __init__(self, masked: bool = True) -> None:
        super().__init__()
        self.encode, self.decode = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        places = torch.arange(LIMIT).unsqueeze(1)
        rates = torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(10000.0) / WIDTH))
        table = torch.zeros(LIMIT, 1, WIDTH)
        table[:, 0, 0::2], table[:, 0, 1::2] = torch.sin(places * rates), torch.cos(places * rates)
        self.register_buffer("table", table)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 80, dropout=0.1)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.masked = masked

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encode(ids) * math.sqrt(WIDTH)
        x = x + self.table[: x.size(0)]
        mask = nn.Transformer.generate_square_subsequent_mask(len(ids)) if self.masked else None
        return self.decode(self.layers(x, mask))


class Folded(nn.Module):
    """Batch and heads folded into one axis, scores by `bmm`; learned positions; norms after."""

    def __init__(self, between: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LIMIT, WIDTH)
        self.packs = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.between = between()

    def hidden(self, ids: Tensor) -> Tensor:
        length, batch = ids.shape
        x = self.embed(ids) + self.places(torch.arange(length)).unsqueeze(1)
        future = torch.full((length, length), float("-inf")).triu(1).to(x)
        for pack, projection, norm in zip(self.packs, self.projections, self.norms, strict=True):
            q, k, v = (
                t.contiguous().view(length, batch * HEADS, HEAD).transpose(0, 1)
                for t in pack(x).chunk(3, dim=-1)
            )
            weights = (torch.bmm(q * HEAD**-0.5, k.transpose(1, 2)) + future).softmax(-1)
            y = torch.bmm(weights, v).transpose(0, 1).reshape(length, batch, WIDTH)
            x = self.between(norm(x + projection(y)))
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.hidden(ids), self.embed.weight)


class Inside(Folded):
    """``[B, T]`` for the caller, ``[T, B, C]`` up to the logits."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.t()).transpose(0, 1)


class GivenTimeFirst(Inside):
    """``[B, T]`` for the caller, ``[T, B, V]`` out."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).transpose(0, 1)


class TakenTimeFirst(Folded):
    """``[T, B]`` for the caller, ``[B, T, V]`` out."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).transpose(0, 1)


class FlatHead(Folded):
    """``[B, T]``; the logits of all tokens in one product of matrices."""

    def forward(self, ids: Tensor) -> Tensor:
        flat = self.hidden(ids.t()).transpose(0, 1).reshape(-1, WIDTH)
        return torch.mm(flat, self.embed.weight.t()).view(*ids.shape, VOCAB)


class HeadsToTheEnd(Folded):
    """``[B, T]``; the last state is ``[B, T, H, D]``, and so is the weight."""

    def forward(self, ids: Tensor) -> Tensor:
        last = self.hidden(ids.t()).transpose(0, 1).unflatten(-1, (HEADS, HEAD))
        return torch.einsum("bthd,vhd->btv", last, self.embed.weight.view(VOCAB, HEADS, HEAD))


class OverTheBatch(nn.Module):
    """Subtracts what the sequences of a batch have in common."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


EXACT: dict[str, Callable[[], nn.Module]] = {
    "word language model": WordLanguageModel,
    "folded": Folded,
}
BATCH_FIRST: dict[str, Callable[[], nn.Module]] = {
    "time first inside": Inside,
    "flat head": FlatHead,
    "heads to the end": HeadsToTheEnd,
}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "time first, no mask": lambda: WordLanguageModel(masked=False),
    "time first, over the batch": lambda: Folded(OverTheBatch),
    "taken time first": TakenTimeFirst,
}
