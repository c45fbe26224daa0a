"""Masks are what they are called: bands of every kind, near misses, and proofs that must fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_graphs import Site, compare, rewrite, run_like, trace_serving, trace_training
from hypothesis import given, settings, strategies
from spellings import LEGAL
from spellings_base import finish, heads_first
from torch import Tensor, nn

from fxport.passes.masks import prover as masks
from fxport.passes.masks.bands import Band, band_of
from fxport.report import Outcome


@settings(max_examples=150, deadline=None)
@given(
    rows=strategies.integers(2, 12),
    columns=strategies.integers(2, 12),
    lower=strategies.none() | strategies.integers(-12, 3),
    upper=strategies.none() | strategies.integers(-3, 12),
)
def test_a_band_is_recognised_as_itself(
    rows: int, columns: int, lower: int | None, upper: int | None
) -> None:
    allowed = Band(lower, upper).matrix(rows, columns)
    found = band_of(allowed)
    if found is not None:
        assert bool((found.matrix(rows, columns) == allowed).all())
    elif bool(allowed[0].any() and allowed[-1].any()):
        raise AssertionError("a band with full edge rows was not recognised")


@pytest.mark.parametrize("from_end", [False, True])
def test_one_entry_in_any_block_of_rows_tells_bands_apart(from_end: bool) -> None:
    rows, columns = 600, 620
    band = Band(-300, 0, from_end)
    allowed = band.matrix(rows, columns)
    assert band.equals(allowed) and band.equals(allowed.expand(2, 3, -1, -1))
    for row, column in ((0, 619), (255, 0), (256, 256), (511, 619), (599, 0)):
        other = allowed.clone()
        other[row, column] = ~other[row, column]
        assert not band.equals(other)


@settings(max_examples=150, deadline=None)
@given(size=strategies.integers(4, 12), data=strategies.data())
def test_one_flipped_entry_is_no_band(size: int, data: Any) -> None:
    allowed = Band(data.draw(strategies.sampled_from([None, -2])), 0).matrix(size, size)
    i = data.draw(strategies.integers(1, size - 2))
    j = data.draw(strategies.integers(1, size - 2))
    allowed[i, j] = ~allowed[i, j]
    found = band_of(allowed)
    assert found is None or bool((found.matrix(size, size) == allowed).all())
    if abs(i - j) > 2 or 0 < i - j < 2:
        assert found is None


def masked(qkv: Tensor, allowed: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish((q @ k.mT).masked_fill(~allowed, float("-inf")).softmax(-1), v)


def window(qkv: Tensor, width: int) -> Tensor:
    i = torch.arange(qkv.shape[2])
    distance = i[:, None] - i[None, :]
    return masked(qkv, (distance >= 0) & (distance < width))


@pytest.mark.parametrize("width", [1, 2, 64, 200])
def test_windows_longer_than_the_traced_length(width: int) -> None:
    data = torch.randn(3, 2, 9, 4, 6, dtype=torch.float64)
    module = Site(lambda x: window(x, width))
    found = rewrite(trace_training(module, [data], {0: (1, 2)}))
    assert found.result.sites[0].params.window_left == width - 1
    longer = torch.randn(3, 1, max(2 * width, 5), 4, 6, dtype=torch.float64)
    compare(module, found.graph, [longer])


def test_a_mask_that_is_repeated_for_every_head_and_row() -> None:
    def repeated(qkv: Tensor) -> Tensor:
        _, b, t, h, _ = qkv.shape
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        return masked(qkv, causal[None].repeat(b, 1, 1).unsqueeze(1).repeat(1, h, 1, 1))

    data = torch.randn(3, 2, 9, 4, 6, dtype=torch.float64)
    found = rewrite(trace_training(Site(repeated), [data], {0: (1, 2)}))
    assert [s.mask for s in found.result.sites] == ["causal"]
    compare(Site(repeated), found.graph, [torch.randn(3, 3, 17, 4, 6, dtype=torch.float64)])


def reversed_dims(t: int) -> Tensor:
    return torch.ones(t, t).triu().T.bool()


def swapped_dims(t: int) -> Tensor:
    return torch.ones(t, t).triu().swapaxes(0, 1).movedim(0, 1).adjoint().bool()


def zeros_of_nan(t: int) -> Tensor:
    return (torch.ones(t, t).triu(1) * float("-inf")).nan_to_num(0.0, neginf=-1.0) == 0


@pytest.mark.parametrize("mask", [reversed_dims, swapped_dims, zeros_of_nan])
def test_a_mask_is_followed_through_what_moves_it(mask: Callable[[int], Tensor]) -> None:
    def function(qkv: Tensor) -> Tensor:
        return masked(qkv, mask(qkv.shape[2]))

    data = torch.randn(3, 2, 9, 4, 6, dtype=torch.float64)
    found = rewrite(trace_training(Site(function), [data], {0: (1, 2)}))
    assert [(s.mask, s.bias) for s in found.result.sites] == [("causal", "")]
    for length in (3, 21):
        compare(Site(function), found.graph, [torch.randn(3, 1, length, 4, 6, dtype=torch.float64)])


def test_lengths_that_are_no_lengths_of_the_mask_prove_nothing() -> None:
    """q and k in blocks of two, which two symbols say that differ: no crash, and the same."""

    def blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, t, d = q.shape
        q, k, v = (x.reshape(b, h, t // 2, 2, d) for x in (q, k, v))
        future = torch.ones(2, 2, dtype=torch.bool).triu(1)
        return (q @ k.mT).masked_fill(future, float("-inf")).softmax(-1) @ v

    data = list(torch.randn(3, 2, 3, 8, 5, dtype=torch.float64).unbind(0))
    module = Site(blocks)
    found = rewrite(trace_training(module, data, dict.fromkeys(range(3), (0, 2))))
    assert found.count == 0 or found.result.sites[0].bias == "constant"
    compare(module, found.graph, data)


def test_positions_that_come_again_after_the_length_are_no_positions() -> None:
    def again(qkv: Tensor) -> Tensor:
        t = qkv.shape[2]
        i = torch.arange(t).repeat(2)[:t]  # entry T is the first: known for one length only
        return masked(qkv, i[None, :] <= i[:, None])

    data = torch.randn(3, 2, 9, 4, 6, dtype=torch.float64)
    found = rewrite(trace_training(Site(again), [data], {0: (1, 2)}))
    assert [s.bias for s in found.result.sites] == ["constant"]


def test_a_plain_length_says_nothing_about_longer_ones() -> None:
    data = torch.randn(3, 2, 9, 4, 6, dtype=torch.float64)
    found = rewrite(trace_training(Site(lambda x: window(x, 64)), [data]))
    assert found.result.sites[0].mask == "causal"  # at this length, for which alone the graph is


def test_a_mask_that_changes_far_out_is_not_taken_for_causal() -> None:
    def late(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        i = torch.arange(q.size(2))
        allowed = (i[None, :] <= i[:, None]) & (i[None, :] >= i[:, None] // 100 * 100)
        return finish((q @ k.mT).masked_fill(~allowed, float("-inf")).softmax(-1), v)

    data = torch.randn(3, 2, 9, 4, 6, dtype=torch.float64)
    found = rewrite(trace_training(Site(late), [data], {0: (1, 2)}))
    assert [s.mask for s in found.result.sites] == ["causal, chunks of 100"]
    compare(Site(late), found.graph, [torch.randn(3, 1, 130, 4, 6, dtype=torch.float64)])


def test_the_largest_served_length_is_looked_at() -> None:
    """A buffer that is causal but for its last row must not pass because short inputs are."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mask = torch.ones(64, 64, dtype=torch.bool).tril()
            mask[63, 10] = False
            self.register_buffer("mask", mask)

        def forward(self, qkv: Tensor) -> Tensor:
            q, k, v = heads_first(qkv)
            t = q.size(2)
            s = (q @ k.mT).masked_fill(~self.mask[:t, :t], float("-inf"))
            return finish(s.softmax(-1), v)

    auto = torch.export.Dim.AUTO
    data = torch.randn(3, 2, 9, 4, 6)
    found = rewrite(trace_serving(Model(), [data], [{1: auto, 2: auto}]))
    (site,) = found.result.sites
    assert site.bias == "constant" and site.relied_on == ()
    (left,) = [d for d in found.result.decisions if d.outcome is Outcome.LEFT]
    assert left.subject == "mask" and left.reason is not None and left.reason.location is not None


def test_buffers_that_a_proof_read_are_named() -> None:
    spelling = next(s for s in LEGAL if str(s) == "nano_gpt")
    module = Site(spelling.function, (), [b() for b in spelling.buffers])
    found = rewrite(trace_training(module, [torch.randn(3, 2, 7, 4, 6)]))
    assert found.result.sites[0].relied_on == ("b0",)


class Layers(nn.Module):
    """Layers with a mask buffer each, all equal but maybe the last."""

    def __init__(self, count: int, last: Tensor) -> None:
        super().__init__()
        plain = torch.ones(32, 32, dtype=torch.bool).tril()
        for index in range(count):
            mask = last if index == count - 1 else plain
            self.register_buffer(f"mask{index}", mask.clone())
        self.count = count

    def forward(self, qkv: Tensor) -> Tensor:
        x = qkv
        for index in range(self.count):
            q, k, v = heads_first(x)
            t = q.size(2)
            mask = getattr(self, f"mask{index}")[:t, :t]
            w = (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1)
            x = torch.stack([(w @ v).transpose(1, 2), x[1], x[2]])
        return x


def test_equal_buffers_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = masks.joint_effect

    def counted(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(masks, "joint_effect", counted)
    other = torch.ones(32, 32, dtype=torch.bool).tril() & torch.ones(32, 32).bool().triu(-4)
    module = Layers(6, other)
    data = torch.randn(3, 2, 9, 4, 6, dtype=torch.float64)
    found = rewrite(trace_training(module, [data], {0: (1, 2)}))
    assert [s.mask for s in found.result.sites] == ["causal"] * 5 + ["causal, window 5"]
    assert len(calls) == 2
    compare(module, found.graph, [data])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("nano_gpt", Band(None, 1)),
        ("nano_gpt", Band(-2, 0)),
        ("sliding_window", Band(-3, 0)),
        ("sliding_window", Band(-1, 0)),
        ("two_sided_window", Band(-2, 0)),
        ("encoder", None),
    ],
)
def test_the_comparison_notices_a_wrong_mask(
    name: str, wrong: Band | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the classification broken on purpose, the comparison with eager must fail."""
    spelling = next(s for s in LEGAL if str(s) == name)
    module = Site(spelling.function, (), [b() for b in spelling.buffers])
    proof = masks.Proof(wrong or Band(None, 0))
    monkeypatch.setattr(masks.Prover, "prove", lambda *_: proof)
    data = torch.randn(3, 2, 9, 4, 6, dtype=torch.float64)
    found = rewrite(trace_training(module, [data]))
    assert found.count == 1
    with pytest.raises(AssertionError, match="relative error"):
        compare(module, found.graph, [data])


def test_export_runs_at_the_limit() -> None:
    spelling = next(s for s in LEGAL if str(s) == "nano_gpt")
    module = Site(spelling.function, (), [b() for b in spelling.buffers])
    auto = torch.export.Dim.AUTO
    found = rewrite(trace_serving(module, [torch.randn(3, 2, 9, 4, 6)], [({1: auto, 2: auto},)]))
    data = torch.randn(3, 1, 16, 4, 6)
    torch.testing.assert_close(run_like(found.graph, module, [data])[0], module(data))
