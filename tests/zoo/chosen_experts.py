"""Experts whose weights are looked up for each row, as Hugging Face's and OpenAI's code does.

`LOOK_UPS` are products that can run by expert, `LEFT` are twins that cannot.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.zoo.awkward import LAYERS, WIDTH
from tests.zoo.experts import decoder

EXPERTS, CHOSEN, INNER = 5, 2, 24
Mix = Callable[["Chosen", Tensor, Tensor], Tensor]
LOOK_UPS: dict[str, Mix] = {}
LEFT: dict[str, Mix] = {}


class Chosen(nn.Module):
    """Top-2 of 5 experts; `mix` gives ``[N, 2, C]``."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.mix = mix
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) * 0.2)
        self.bias = nn.Parameter(torch.randn(EXPERTS, INNER) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, WIDTH)
        weights, chosen = self.gate(flat).softmax(-1).topk(CHOSEN, dim=-1)
        mixed = self.mix(self, flat, chosen)
        return (mixed * weights.unsqueeze(-1)).sum(1).view_as(x)


def look_up(mix: Mix) -> Mix:
    LOOK_UPS[mix.__name__] = mix
    return mix


def left(mix: Mix) -> Mix:
    LEFT[mix.__name__] = mix
    return mix


@look_up
def einsum_in_all_letters(m: Chosen, x: Tensor, chosen: Tensor) -> Tensor:
    h = torch.einsum("nkoi,ni->nko", m.up[chosen], x) + m.bias[chosen]
    return torch.einsum("nkoi,nki->nko", m.down[chosen], h.relu())


@look_up
def rows_repeated(m: Chosen, x: Tensor, chosen: Tensor) -> Tensor:
    rows, experts = x.repeat_interleave(CHOSEN, dim=0), chosen.reshape(-1)
    h = torch.bmm(m.up[experts], rows.unsqueeze(-1)).squeeze(-1) + m.bias[experts]
    return torch.bmm(m.down[experts], h.relu().unsqueeze(-1)).view(-1, CHOSEN, WIDTH)


@look_up
def weights_turned(m: Chosen, x: Tensor, chosen: Tensor) -> Tensor:
    h = x[:, None, None] @ m.down[chosen] + m.bias[chosen].unsqueeze(2)
    return (h.relu() @ m.up[chosen]).squeeze(2)


@look_up
def result_turned(m: Chosen, x: Tensor, chosen: Tensor) -> Tensor:
    h = torch.einsum("ni,nkoi->okn", x, m.up[chosen]) + m.bias[chosen].permute(2, 1, 0)
    return torch.einsum("inl,nloi->nlo", h.relu().transpose(1, 2), m.down[chosen])


@left
def experts_counted_from_the_end(m: Chosen, x: Tensor, chosen: Tensor) -> Tensor:
    h = torch.einsum("nkoi,ni->nko", m.up[chosen - EXPERTS], x)
    return torch.einsum("nkoi,nki->nko", m.down[chosen - 1], h.relu())


@left
def summed_over_the_chosen(m: Chosen, x: Tensor, chosen: Tensor) -> Tensor:
    h = torch.einsum("nkoi,ni->no", m.up[chosen], x)
    return torch.einsum("nkoi,ni->no", m.down[chosen], h.relu()).unsqueeze(1).expand(-1, 2, -1)


@left
def both_axes_stay(m: Chosen, x: Tensor, chosen: Tensor) -> Tensor:
    h = (m.up[chosen] * x[:, None, None]).amax(-1)
    return (m.down[chosen] * h.unsqueeze(2)).amax(-1)


def of_styles(mixes: dict[str, Mix], layers: int = LAYERS) -> nn.Module:
    """A decoder whose layers mix in turn as these do."""
    styles = itertools.cycle(mixes.values())
    return decoder(lambda: Chosen(next(styles)), layers)
