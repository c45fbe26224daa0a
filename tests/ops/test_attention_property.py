"""Random legal calls against the reference, and the identities that attention must satisfy."""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
from attention_cases import Arguments, Case, assert_same, make, op, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxport.ops import tiles
from fxport.ops.band import band_of
from fxport.ops.params import AttentionParams
from fxport.ops.reference import allowed, reference_attention

OPTIONAL_WINDOW = st.one_of(st.just(-1), st.integers(0, 30))


@st.composite
def numbers(draw: st.DrawFn) -> AttentionParams:
    return AttentionParams(
        scale=draw(st.sampled_from([0.3, 1.0, -0.5])),
        causal=draw(st.booleans()),
        window_left=draw(OPTIONAL_WINDOW),
        window_right=draw(OPTIONAL_WINDOW),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.5])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3])),
        q_offset=draw(st.integers(-20, 40)),
        head_offset=draw(st.integers(0, 9)),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch, rows, columns = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 25)),
        draw(st.integers(1, 25)),
    )
    cu = None
    if draw(st.integers(0, 3)) == 0:
        batch, columns = 1, rows
        cu = tuple(sorted([*draw(st.lists(st.integers(0, rows), max_size=4)), 0, rows]))
    shape = None
    if draw(st.booleans()):
        full = (batch, kv_heads * groups, rows, columns)
        dims = draw(st.integers(0, 4))
        shape = tuple(draw(st.sampled_from([1, n])) for n in full[4 - dims :])
    return Case(
        "random",
        batch=batch,
        q_heads=kv_heads * groups,
        kv_heads=kv_heads,
        rows=rows,
        columns=columns,
        size=draw(st.integers(1, 9)),
        value_size=draw(st.integers(0, 9)),
        params=draw(numbers()),
        bias_shape=shape,
        bias_dtype=draw(st.sampled_from([None, torch.bool])),
        sinks=draw(st.booleans()),
        alibi_slopes=draw(st.integers(0, 2)) == 0,
        cu_seqlens=cu,
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=cases(), block=st.sampled_from([3, 8, 64]), with_lse=st.booleans())
def test_any_call(case: Case, block: int, with_lse: bool) -> None:
    arguments = make(case)
    with mock.patch.object(tiles, "block_length", lambda heads: block):
        got = run(op, arguments, with_lse)
    assert_same(got, run(reference_attention, arguments, with_lse), 1e-11)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(params=numbers(), rows=st.integers(1, 20), columns=st.integers(1, 20), data=st.data())
def test_band(params: AttentionParams, rows: int, columns: int, data: st.DataObject) -> None:
    """The band allows what the definition allows, and its tiles are neither missed nor unmasked."""
    band = band_of(params, rows, columns)
    offset = torch.arange(columns) - torch.arange(rows)[:, None]
    inside = torch.ones(rows, columns, dtype=torch.bool)
    if band.low is not None:
        inside &= offset >= band.low
    if band.high is not None:
        inside &= offset <= band.high
    assert torch.equal(inside, allowed(params, rows, columns, None, torch.device("cpu")))
    assert (band.low is None and band.high is None) == bool(inside.all())
    first = data.draw(st.integers(0, rows - 1))
    some = range(first, data.draw(st.integers(first + 1, rows)))
    seen = inside[some.start : some.stop].any(0).nonzero().flatten().tolist()
    assert set(seen) <= set(band.columns(some, columns))
    if seen:
        assert (band.columns(some, columns).start, band.columns(some, columns).stop) == (
            seen[0],
            seen[-1] + 1,
        )
    left = data.draw(st.integers(0, columns - 1))
    part = range(left, data.draw(st.integers(left + 1, columns)))
    tile = inside[some.start : some.stop, part.start : part.stop]
    assert band.covers(some, part) == bool(tile.all())


@pytest.mark.parametrize("softcap", [0.0, 2.0], ids=["cpu_flash", "blocked"])
def test_packed_is_each_segment_alone(softcap: float) -> None:
    """No reference in between: the same op on the pieces."""
    borders = (0, 11, 12, 12, 41, 53)
    params = AttentionParams(0.3, causal=True, softcap=softcap)
    case = Case("", batch=1, rows=53, cu_seqlens=borders, sinks=True, params=params)
    packed = make(case)
    got = run(op, packed, with_lse=False)
    d_out = torch.randn(
        got["out"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    sinks_total = torch.zeros(6, dtype=torch.float64)
    for start, stop in itertools.pairwise(borders):
        part = (slice(None), slice(None), slice(start, stop))
        tensors: list[Tensor | None] = [
            None if x is None else x.detach()[part].requires_grad_() for x in packed.tensors[:3]
        ]
        sinks = packed.tensors[4]
        assert sinks is not None
        tensors += [None, sinks.detach().requires_grad_(), None, None, None]
        alone = Arguments(tuple(tensors), params)
        out, lse = op(*alone.tensors, params)
        leaves = alone.differentiable
        grads = torch.autograd.grad(out, tuple(leaves.values()), d_out[part])
        found = {"out": out, "lse": lse} | dict(zip(leaves, grads, strict=True))
        sinks_total += found.pop("sinks")
        assert_same({n: got[n][part] for n in found}, found, 1e-12)
    assert_same({"sinks": got["sinks"]}, {"sinks": sinks_total}, 1e-12)


def test_one_query_at_a_time() -> None:
    """Decoding with q_offset gives the rows of the whole, which a wrong alignment does not."""
    params = AttentionParams(0.3, causal=True, window_left=9, softcap=3.0)
    case = Case("", rows=29, columns=29, alibi_slopes=True, params=params)
    q, k, v, _, _, slopes, *_ = make(case).tensors
    assert q is not None and k is not None and v is not None
    whole, lse = op(q, k, v, None, None, slopes, None, None, params)
    for i in range(29):
        step = replace(params, q_offset=i)
        past = (k[:, :, : i + 1], v[:, :, : i + 1])
        out, one = op(q[:, :, i : i + 1], *past, None, None, slopes, None, None, step)
        torch.testing.assert_close(out[:, :, 0], whole[:, :, i], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(one[:, :, 0], lse[:, :, i], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("broken", ["covers", "columns", "offset", "groups"])
def test_the_comparison_sees_a_mistake(broken: str) -> None:
    """Mistakes of the usual kinds, made on purpose, are caught by the comparison used above."""
    params = AttentionParams(0.3, causal=True, q_offset=16, window_left=20)
    arguments = make(Case("", params=params))
    want = run(reference_attention, arguments)
    if broken == "covers":
        patch = mock.patch("fxport.ops.band.Band.covers", lambda *_: True)
    elif broken == "columns":
        patch = mock.patch("fxport.ops.band.Band.columns", lambda self, rows, n: range(rows.stop))
    elif broken == "offset":
        patch = mock.patch.object(
            tiles, "band_of", lambda p, r, c: band_of(replace(p, q_offset=15), r, c)
        )
    else:
        fold = tiles.Tiles.fold
        patch = mock.patch.object(
            tiles.Tiles, "fold", lambda self, x, rows: fold(self, x.flip(1), rows)
        )
    with patch, pytest.raises(AssertionError, match=r"error .* >"):
        assert_same(run(op, arguments), want, 1e-11)
