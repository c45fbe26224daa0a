"""Dropout's bits: known answers, statistics, and independence of who computes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import NAMES, Arguments, Case, assert_same, make, op, run
from torch import Tensor

from fxport.ops import blocked, tiles
from fxport.ops.dropout import keep_mask, keep_scale, philox, threshold
from fxport.ops.params import AttentionParams

SEED = torch.tensor([0x0123_4567_89AB_CDEF])
CASE = Case("", params=AttentionParams(0.3, causal=True, q_offset=16, dropout_p=0.4, head_offset=2))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # known-answer vectors of philox4x32-10 published with Random123
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_known_answers(counter: str, key: str, words: str) -> None:
    low, high = (int(word, 16) for word in key.split())
    seed = (high << 32) | low
    signed = seed - (1 << 64) if seed >> 63 else seed
    c0, c1, c2, c3 = (torch.tensor([int(word, 16)]) for word in counter.split())
    result = philox(torch.tensor([signed]), (c0, c1, c2, c3))
    assert " ".join(f"{word.item():08x}" for word in result) == words


def test_recipe_of_one_weight() -> None:
    """The documented recipe, followed by hand in Python integers."""
    p, b, h, i, j = 0.37, 1, 9, 1234, 5678
    c = (torch.tensor([x]) for x in (j // 4, i, h, b))
    words = philox(SEED, tuple(c))  # type: ignore[arg-type]
    for column in range(j - j % 4, j - j % 4 + 4):
        kept = (int(words[column % 4].item()) >> 1) >= int(p * 2**31)
        tile = keep_mask(SEED, p, range(b, b + 1), range(h, h + 1), range(i, i + 1),
                         range(column, column + 1))  # fmt: skip
        assert tile.item() == kept


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.9, 0.999])
def test_kept_fraction(p: float) -> None:
    """Within 5 standard deviations of n trials, over all axes and along each of them."""
    mask = keep_mask(SEED, p, range(3), range(5), range(260), range(300))
    assert mask.shape == (3, 5, 260, 300)
    for dims in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):
        trials = mask.numel() // mask.double().mean(dims).numel()
        deviation = (mask.double().mean(dims) - (1 - p)).abs().max().item()
        assert deviation <= 5 * (p * (1 - p) / trials) ** 0.5


def test_neighbours_are_independent() -> None:
    """Pairs one step apart along each axis agree as often as coins do (5 standard deviations)."""
    mask = keep_mask(SEED, 0.5, range(4), range(4), range(200), range(200))
    for dim in range(4):
        n = mask.shape[dim]
        equal = mask.narrow(dim, 0, n - 1) == mask.narrow(dim, 1, n - 1)
        assert abs(equal.double().mean().item() - 0.5) <= 5 * 0.5 / equal.numel() ** 0.5
    other = keep_mask(SEED + 1, 0.5, range(4), range(4), range(200), range(200))
    assert abs((mask == other).double().mean().item() - 0.5) <= 5 * 0.5 / mask.numel() ** 0.5


@pytest.mark.parametrize("columns", [range(0, 1), range(3, 18), range(5, 8), range(16, 32)])
def test_a_tile_is_a_part_of_the_whole(columns: range) -> None:
    whole = keep_mask(SEED, 0.3, range(3), range(7), range(40), range(40))
    tile = keep_mask(SEED, 0.3, range(1, 3), range(2, 5), range(9, 31), columns)
    assert torch.equal(tile, whole[1:3, 2:5, 9:31, columns.start : columns.stop])


def test_threshold_fits_a_signed_word() -> None:
    assert threshold(0.0) == 0
    assert threshold(1 - 2**-53) < 2**31
    assert keep_scale(0.75) == 4.0


@pytest.mark.parametrize("block", [4, 7, 32])
def test_every_block_size_drops_the_same(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With v the identity, out is the weights: what is dropped is zero exactly."""
    case = CASE.but(value_size=CASE.columns)
    arguments = make(case)
    eye = torch.eye(case.columns, dtype=torch.float64).expand(2, 3, -1, -1)
    tensors = [x if x is None else x.detach() for x in arguments.tensors]
    tensors[2] = eye
    monkeypatch.setattr(tiles, "block_length", lambda heads: block)
    out, _ = blocked.forward(*tensors, case.params)  # type: ignore[arg-type]
    seen = torch.ones(case.rows, case.columns, dtype=torch.bool).tril(16)
    seed = tensors[7]
    assert seed is not None
    kept = keep_mask(seed, 0.4, range(2), range(2, 8), range(case.rows), range(case.columns))
    assert torch.equal(out != 0, kept & seen)


def test_mean_is_preserved() -> None:
    """Averaged over seeds, dropout changes nothing (5 standard deviations of the average)."""
    case = CASE.but(rows=3, columns=9)
    arguments = make(case)
    tensors = [x if x is None else x.detach() for x in arguments.tensors]
    without, _ = op(*tensors, replace(case.params, dropout_p=0.0))
    outs = torch.stack([op(*tensors[:7], torch.tensor([s]), case.params)[0] for s in range(400)])
    error = (outs.mean(0) - without).abs()
    assert (error <= 5 * outs.std(0) / 400**0.5 + 1e-12).all()


def test_shards_drop_what_the_whole_drops() -> None:
    """Query heads split over 3 ranks, with head_offset: outputs and gradients are the slices."""
    arguments = make(CASE.but(sinks=True))
    whole = run(op, arguments)
    for rank in range(3):
        tensors: list[Tensor | None] = list(arguments.tensors)
        for index, per_rank in ((0, 2), (1, 1), (2, 1)):
            x = arguments.tensors[index]
            assert x is not None
            tensors[index] = x.detach()[:, rank * per_rank : (rank + 1) * per_rank].requires_grad_()
        sinks = arguments.tensors[4]
        assert sinks is not None
        tensors[4] = sinks.detach()[2 * rank : 2 * rank + 2].requires_grad_()
        shard = Arguments(tuple(tensors), replace(CASE.params, head_offset=2 + 2 * rank))
        out, lse = op(*shard.tensors, shard.params)
        part = slice(2 * rank, 2 * rank + 2)
        generator = torch.Generator().manual_seed(1)
        incoming = [
            torch.randn(x.shape, generator=generator, dtype=torch.float64)[:, part]
            for x in (whole["out"], whole["lse"])
        ]
        leaves = shard.differentiable
        grads = torch.autograd.grad((out, lse), tuple(leaves.values()), incoming)
        got = {"out": out, "lse": lse} | dict(zip(leaves, grads, strict=True))
        want = {
            "out": whole["out"][:, part],
            "lse": whole["lse"][:, part],
            "q": whole["q"][:, part],
            "k": whole["k"][:, rank : rank + 1],
            "v": whole["v"][:, rank : rank + 1],
            "sinks": whole["sinks"][part],
        }
        assert set(leaves) <= set(NAMES)
        assert_same(got, want, 1e-12)


def test_seed_decides() -> None:
    arguments = make(CASE)
    tensors = arguments.tensors[:7]
    first, again, other = (
        op(*tensors, torch.tensor([s]), CASE.params)[0] for s in (1, 1, 1 + 2**40)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
