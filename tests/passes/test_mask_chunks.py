"""Masks that let positions see their own chunk only, however they are written; and near misses."""

from __future__ import annotations

import pytest
import torch
from attention_graphs import Rewritten, Site, compare, rewrite, trace_directly, trace_training
from mask_rules import Rule, example, site
from spellings_base import finish, heads_first
from torch import Tensor, nn

import fxport

C = 8


def floors(i: Tensor, j: Tensor) -> Tensor:
    return (i // C == j // C) & (j <= i)


def divisions(i: Tensor, j: Tensor) -> Tensor:
    one, other = (torch.div(x, C, rounding_mode="floor") for x in (i, j))
    return torch.logical_and(one == other, i >= j)


def distance_of_blocks(i: Tensor, j: Tensor) -> Tensor:
    return ((i // C - j // C).abs() == 0) & (j <= i)


def from_the_start(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (j >= i // C * C)


def remainder(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (i - j <= i % C)


def forbidden(i: Tensor, j: Tensor) -> Tensor:
    return ~((j > i) | (i // C != j // C))


def truncated(i: Tensor, j: Tensor) -> Tensor:
    return ((i / C).long() == (j / C).long()) & (j <= i)


def rounded_down(i: Tensor, j: Tensor) -> Tensor:
    return (torch.floor(i / C) == torch.floor(j / C)) & (j <= i)


def table(i: Tensor, j: Tensor) -> Tensor:
    blocks = torch.block_diag(*[torch.ones(C, C)] * 9)
    return blocks[: i.size(0), : i.size(0)].tril() > 0


def of_sixty(i: Tensor, j: Tensor) -> Tensor:
    return (i // 60 == j // 60) & (j <= i)


def by_parts(i: Tensor, j: Tensor) -> Tensor:
    """Of a batch, which are the last part's, beside those of its own."""
    return torch.where(j // C == i // C, j <= i, False)


SPELLINGS = (
    floors, divisions, distance_of_blocks, from_the_start, remainder, forbidden, truncated,
    rounded_down, table, by_parts,
)  # fmt: skip


def keys_shifted(i: Tensor, j: Tensor) -> Tensor:
    return (i // C == (j + 1) // C) & (j <= i) | (i == j)


def both_shifted(i: Tensor, j: Tensor) -> Tensor:
    return ((i + 1) // C == (j + 1) // C) & (j <= i)


def other_for_keys(i: Tensor, j: Tensor) -> Tensor:
    return (i // C == j // (C + 1)) & (j <= i) | (i == j)


def one_key_more(i: Tensor, j: Tensor) -> Tensor:
    return (i // C == j // C) & (j <= i) | (i == j + C)


def longer_far_out(i: Tensor, j: Tensor) -> Tensor:
    far = i // C >= 9
    return torch.where(far, i // C - j // C <= 1, i // C == j // C) & (j <= i)


def none_far_out(i: Tensor, j: Tensor) -> Tensor:
    return ((i // C == j // C) | (j >= 9 * C)) & (j <= i)


def by_the_length(i: Tensor, j: Tensor) -> Tensor:
    size = i.size(0) // 2 + 1
    return (i // size == j // size) & (j <= i)


def size_by_row(i: Tensor, j: Tensor) -> Tensor:
    size = torch.where(i < 9 * C, C, 2 * C)
    return (i // size == j // size) & (j <= i)


def first_chunk_open(i: Tensor, j: Tensor) -> Tensor:
    return ((i // C == j // C) | (j < 2)) & (j <= i)


NEAR_MISSES = (
    keys_shifted, both_shifted, other_for_keys, one_key_more, longer_far_out, none_far_out,
    by_the_length, size_by_row, first_chunk_open,
)  # fmt: skip


def of_any_length(module: Site) -> Rewritten:
    return rewrite(trace_directly(module, [example(2, 19)], {0: (1, 2)}))


@pytest.mark.parametrize("rule", SPELLINGS, ids=[r.__name__ for r in SPELLINGS])
def test_spellings(rule: Rule) -> None:
    module = site(rule)
    found = of_any_length(module)
    assert [s.mask for s in found.result.sites] == [f"causal, chunks of {C}"]
    assert found.result.sites[0].params.chunk == C
    for length in (3, C, C + 1, 2 * C, 5 * C + 3):
        compare(module, found.graph, [example(2, length)])


@pytest.mark.parametrize("rule", NEAR_MISSES, ids=[r.__name__ for r in NEAR_MISSES])
def test_near_misses(rule: Rule) -> None:
    module = site(rule)
    found = of_any_length(module)
    assert all("chunks" not in s.mask for s in found.result.sites)
    for length in (3, 2 * C, 12 * C + 3):
        compare(module, found.graph, [example(1, length)])


@pytest.mark.parametrize(("length", "mask"), [(7, "causal"), (8, "causal"), (19, "chunks of 8")])
def test_a_plain_length(length: int, mask: str) -> None:
    module = site(floors)
    found = rewrite(trace_training(module, [example(2, length)]))
    assert mask in found.result.sites[0].mask
    compare(module, found.graph, [example(2, length)])


def test_chunks_without_an_end_are_longer_than_the_traced_length() -> None:
    found = of_any_length(site(of_sixty))
    assert [s.mask for s in found.result.sites] == ["causal, chunks of 60"]
    compare(site(of_sixty), found.graph, [example(1, 131)])


def test_chunks_of_a_thousand_are_looked_at() -> None:
    found = of_any_length(site(lambda i, j: (i // 1024 == j // 1024) & (j <= i)))
    assert [s.mask for s in found.result.sites] == ["causal, chunks of 1024"]


def test_both_ways() -> None:
    module = site(lambda i, j: i // C == j // C)
    found = of_any_length(module)
    assert [s.mask for s in found.result.sites] == [f"full, chunks of {C}"]
    compare(module, found.graph, [example(2, 3 * C + 1)])


def test_a_softcap_beside_them_is_not_served() -> None:
    class Capped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(17, 8), nn.Linear(8, 17)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            t = torch.arange(ids.shape[1])
            s = 5 * torch.tanh(x @ x.mT / 5)
            s = s.masked_fill(~floors(t[:, None], t[None, :]), float("-inf"))
            return self.head(x + s.softmax(-1) @ x)

    with pytest.raises(fxport.PortError, match="in chunks of positions, with a softcap"):
        fxport.port(Capped())


def test_another_size_in_every_head_stays_a_tensor() -> None:
    def by_head(i: Tensor, j: Tensor) -> Tensor:
        size = torch.tensor([4, 4, 8, 8])[:, None, None]
        return (i // size == j // size) & (j <= i)

    found = of_any_length(site(by_head))
    assert [s.bias for s in found.result.sites] == ["constant"]
    compare(site(by_head), found.graph, [example(2, 19)])


def test_a_mask_of_the_data_beside_it_stays_a_tensor() -> None:
    def padded(qkv: Tensor, keep: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        t = torch.arange(q.size(2))
        allowed = floors(t[:, None], t[None, :])
        s = (q @ k.mT).masked_fill(~allowed, float("-inf"))
        return finish(s.masked_fill(~keep[:, None, None, :], float("-inf")).softmax(-1), v)

    data = [example(2, 19), torch.ones(2, 19, dtype=torch.bool)]
    found = rewrite(trace_directly(Site(padded), data, {0: (1, 2), 1: (0, 1)}))
    assert all("chunks" not in s.mask for s in found.result.sites)
    compare(Site(padded), found.graph, data)
