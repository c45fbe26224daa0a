"""Stored masks too large to be computed with as a whole: every entry of them is read."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_graphs import Site, compare, rewrite, trace_directly
from spellings_base import finish, heads_first
from torch import Tensor

import fxport.passes.masks.prover as prover
import fxport.passes.masks.tiles as tiles
from fxport.passes.masks.bands import Band

LIMIT = 43


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is large, and what is read at a time."""
    monkeypatch.setattr(prover, "MAX_ENTRIES", 30)
    monkeypatch.setattr(tiles, "_STRETCH", 6)


def _filled(qkv: Tensor, table: Tensor) -> Tensor:
    """nanoGPT's."""
    q, k, v = heads_first(qkv)
    length = q.size(2)
    s = (q @ k.mT).masked_fill(table[:, :, :length, :length] == 0, float("-inf"))
    return finish(s.softmax(-1), v)


def _added(qkv: Tensor, table: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    length = q.size(2)
    low = (1.0 - table[0, 0, :length, :length].to(q.dtype)) * torch.finfo(q.dtype).min
    return finish((q @ k.mT + low).softmax(-1), v)


def _of_the_last_queries(qkv: Tensor, table: Tensor) -> Tensor:
    """GPT-2's, where there are as many keys as queries."""
    q, k, v = heads_first(qkv)
    queries, keys = q.size(-2), k.size(-2)
    seen = table[:, :, keys - queries : keys, :keys].bool()
    return finish(torch.where(seen, q @ k.mT, torch.finfo(q.dtype).min).softmax(-1), v)


def _table(*off: tuple[int, int], window: int = LIMIT) -> Tensor:
    table = torch.ones(LIMIT, LIMIT).tril().triu(1 - window)
    for place in off:
        table[place] = 1 - table[place]
    return table[None, None]


def _example(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(3, 2, length, 4, 6, generator=generator, dtype=torch.float64)]


@pytest.mark.parametrize("length", [None, LIMIT, 29])
@pytest.mark.parametrize("function", [_filled, _added, _of_the_last_queries])
@pytest.mark.parametrize(
    ("table", "words"),
    [(_table(), "causal"), (_table(window=11), "causal, window 11")],
)
def test_bands_are_read(function, table: Tensor, words: str, length: int | None) -> None:  # type: ignore[no-untyped-def]
    site = Site(function, buffers=[table])
    found = rewrite(trace_directly(site, _example(length or 19), {} if length else {0: (1, 2)}))
    assert [(s.mask, s.bias) for s in found.result.sites] == [(words, "")]
    for size in [length] if length else (1, 7, LIMIT):
        compare(site, found.graph, _example(size))


@pytest.mark.parametrize("length", [None, LIMIT])
@pytest.mark.parametrize("place", [(40, 2), (2, 40), (20, 20), (17, 16), (24, 23), (42, 42)])
def test_one_entry_off_is_seen(place: tuple[int, int], length: int | None) -> None:
    site = Site(_filled, buffers=[_table(place)])
    found = rewrite(trace_directly(site, _example(length or 19), {} if length else {0: (1, 2)}))
    assert [s.bias for s in found.result.sites] in ([], ["constant"])
    for size in [length] if length else (7, LIMIT):
        compare(site, found.graph, _example(size))


def test_rows_without_a_key_are_no_reading() -> None:
    table = _table()
    site = Site(_filled, buffers=[table.tril(-1)])
    found = rewrite(trace_directly(site, _example(19), {0: (1, 2)}))
    assert found.count == 0 or found.result.sites[0].bias == "constant"


def test_a_table_for_each_head_or_a_part_from_elsewhere_is_no_reading() -> None:
    def from_one(qkv: Tensor, table: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        n = q.size(2)
        s = (q @ k.mT).masked_fill(table[:, :, 1 : n + 1, :n] == 0, float("-inf"))
        return finish(s.softmax(-1), v)

    def by_head(qkv: Tensor, table: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        n = q.size(2)
        other = torch.cat([table[:, :, :n, :n]] * 3 + [table[:, :, :n, :n].mT], 1)
        return finish((q @ k.mT).masked_fill(other == 0, float("-inf")).softmax(-1), v)

    for function in (from_one, by_head):
        site = Site(function, buffers=[_table()])
        found = rewrite(trace_directly(site, _example(19), {0: (1, 2)}))
        assert [s.bias for s in found.result.sites] in ([], ["constant"])
        compare(site, found.graph, _example(23))


def test_edges_tell_bands_from_everything_else() -> None:
    """All 512 masks of three tokens, two rows and columns at a time."""
    pairs = [torch.tensor(pair) for pair in ((0, 2), (0, 1), (1, 2))]
    limits = itertools.product((None, -1, 0), (None, 0, 1))
    bands = {band.matrix(3, 3): band for band in (Band(low, high) for low, high in limits)}
    for entries in itertools.product((False, True), repeat=9):
        mask = torch.tensor(entries).view(3, 3)
        edges = tiles.Edges()
        for places in pairs:
            edges.add(mask[places][:, places], places)
        known = [band for matrix, band in bands.items() if torch.equal(matrix, mask)]
        assert [edges.band(3)] == (known or [None])
