"""Positions counted from the last token: the same mask at every length, or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_graphs import Site, compare, rewrite, trace_training
from spellings_base import finish, heads_first
from torch import Tensor

from fxport.passes.attention.site import AttentionSite
from fxport.passes.masks.slopes import slopes_of

LIMIT = 600  # more than are looked at one by one

# What is added, and what is allowed, from the length.
Masks = Callable[[int], tuple[Tensor | None, Tensor]]


def slopes() -> Tensor:
    return torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)[:, None, None]


def table() -> Tensor:
    return slopes() * torch.arange(1 - LIMIT, 1)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def from_end(length: int) -> Tensor:
    return torch.arange(1 - length, 1)


def mpt(n: int) -> tuple[Tensor, Tensor]:
    return from_end(n) * slopes(), causal(n)


def distances(n: int) -> tuple[Tensor, Tensor]:
    p = from_end(n)
    return (p[None, :] - p[:, None]).abs().neg() * slopes(), causal(n)


def from_the_last(n: int) -> tuple[Tensor, Tensor]:
    return (n - 1 - torch.arange(n)).double().neg() * slopes(), causal(n)


def end_of_a_table(n: int) -> tuple[Tensor, Tensor]:
    return table()[:, :, LIMIT - n :], causal(n)


def compared(n: int) -> tuple[None, Tensor]:
    p = from_end(n)
    return None, p[None, :] <= p[:, None]


def window(n: int) -> tuple[None, Tensor]:
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    return None, (i - n >= j - n) & (i - n < j - (n - 50))


PROVEN: dict[Masks, str] = {
    mpt: "causal, ALiBi", distances: "causal, ALiBi", from_the_last: "causal, ALiBi",
    end_of_a_table: "causal, ALiBi", compared: "causal", window: "causal, window 50",
}  # fmt: skip


def last_keys(n: int) -> tuple[None, Tensor]:
    """Which keys the rows see depends on how many come after."""
    return None, causal(n) & ((from_end(n)[None, :] > -100) | (torch.arange(n) == 0))


def bent(n: int) -> tuple[Tensor, Tensor]:
    return from_end(n).clamp(min=-100) * slopes(), causal(n)


def steeper(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n) * (n - 1) * slopes() / 50, causal(n)


def twice(n: int) -> tuple[Tensor, Tensor]:
    """Half of the rows count from the end."""
    p = from_end(n)
    return torch.where(torch.arange(n)[:, None] % 2 == 0, p, p * 2) * slopes(), causal(n)


def every_other_length(n: int) -> tuple[None, Tensor]:
    last = torch.arange(n)[-1]
    return None, causal(n) & ((last % 7 != 3) | (torch.arange(n)[:, None] - torch.arange(n) < 3))


def cancels_at_the_limit(n: int) -> tuple[Tensor, Tensor]:
    """A table with a bend, and what straightens it if it is whole."""
    whole = slopes() * (torch.arange(n) - (LIMIT - 1))
    bent = table().clamp(min=-100.0)[:, :, LIMIT - n :]
    return bent + (whole + 100).clamp(max=0.0), causal(n)


def window_when_long(n: int) -> tuple[None, Tensor]:
    near = torch.arange(n)[:, None] - torch.arange(n) < 3
    return None, causal(n) & (near | (from_end(n)[:1] >= -20))


def steeper_when_short(n: int) -> tuple[Tensor, Tensor]:
    return (from_end(n)[:1].clamp(min=-20) + 21) * torch.arange(n) * slopes(), causal(n)


OPEN = [
    last_keys, bent, steeper, twice, every_other_length, cancels_at_the_limit, window_when_long,
    steeper_when_short,
]  # fmt: skip


def example(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(3, 2, length, 4, 6, generator=generator, dtype=torch.float64)


def site(masks: Masks, *, sink: bool = False, fill: float = float("-inf")) -> Site:
    def attention(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        bias, allowed = masks(q.size(2))
        s = q @ k.mT
        s = (s if bias is None else s + bias).masked_fill(~allowed, fill)
        if not sink:
            return finish(s.softmax(-1), v)
        s = torch.cat([s, s.new_full((*s.shape[:-1], 1), 0.3)], -1)
        return finish(s.softmax(-1)[..., :-1], v)

    return Site(attention)


def sites(module: Site, *lengths: int) -> tuple[AttentionSite, ...]:
    found = rewrite(trace_training(module, [example(9)], {0: (1, 2)}))
    for length in lengths:
        compare(module, found.graph, [example(length)])
    return tuple(found.result.sites)


@pytest.mark.parametrize("masks", PROVEN, ids=lambda m: m.__name__)
def test_what_does_not_depend_on_the_length_is_proven(masks: Masks) -> None:
    (seen,) = sites(site(masks), 5, 130)
    words = [seen.mask, *(["ALiBi"] if seen.alibi else [])]
    assert ", ".join(words) == PROVEN[masks] and seen.bias == ""


@pytest.mark.parametrize("masks", OPEN, ids=lambda m: m.__name__)
def test_what_does_is_not(masks: Masks) -> None:
    (seen,) = sites(site(masks), 5, 130)
    assert not seen.alibi and seen.bias == "constant"


@pytest.mark.parametrize("masks", [mpt, distances], ids=lambda m: m.__name__)
def test_beside_a_sink_a_number_for_a_whole_row_matters(masks: Masks) -> None:
    (seen,) = sites(site(masks, sink=True), 5, 40)
    assert seen.alibi == (masks is distances)


def test_beside_a_number_that_is_filled_in_it_may_matter() -> None:
    assert not any(seen.alibi for seen in sites(site(mpt, fill=-1e4)))


def test_anchored_slopes_are_zero_at_each_rows_own_key() -> None:
    distance = torch.arange(9)[None, :] - torch.arange(9)[:, None]
    seen = distance <= 0
    own = (slopes() * distance)[None]
    assert slopes_of(own, seen[None, None], 0.0, anchored=True) is not None
    assert slopes_of(own + 1e-3, seen[None, None], 0.0, anchored=True) is None
    assert slopes_of(own + 1e-3, seen[None, None], 0.0) is not None
