"""FlashAttention-3 behind `fxport::attention`: which calls it gets, and that they are right."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from attention_cases import (
    NOT_FOR_FLASH,
    QKV,
    Case,
    assert_layouts_and_bits,
    assert_same,
    hopper_facts,
    make,
    op_on_gpu,
    run,
    sizes,
    usable,
)

from fxport.ops import dispatch, flash3
from fxport.ops.band import Band, band_of
from fxport.ops.facts import Facts
from fxport.ops.params import AttentionParams
from fxport.ops.reference import reference_attention

pytestmark = pytest.mark.usefixtures("nothing_judged")

P = AttentionParams
ROUNDING = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
CAUSAL = P(0.1, causal=True)
COVERED = (
    Case("causal", rows=517, columns=517, size=64, params=CAUSAL),
    Case("full", rows=389, columns=517, size=128),
    Case("fewer-rows", rows=300, columns=517, size=128, params=P(0.1, True, q_offset=217)),
    Case("mqa", batch=1, q_heads=8, kv_heads=1, rows=260, columns=260, size=128, params=CAUSAL),
    Case("no-groups", kv_heads=6, rows=333, columns=333, size=256, params=P(0.06, causal=True)),
    Case("equal", batch=128, q_heads=1, kv_heads=1, rows=128, columns=128, size=128),
    Case(
        "packed", batch=1, rows=533, columns=533, size=128, cu_seqlens=(0, 11, 12, 12, 341, 533),
        params=CAUSAL,
    ),
    Case("packed-full", batch=1, rows=733, columns=733, size=64, cu_seqlens=(0, 200, 733)),
    Case("long", batch=1, rows=1500, columns=2333, size=256, params=P(0.06, True, q_offset=833)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "rival", "reason"),
    [
        (hopper_facts(), "cudnn", None),
        (hopper_facts(packed=True), "triton", None),
        (hopper_facts(deterministic=True), "triton", None),  # forward always adds in the same order
        (hopper_facts(**sizes(512, 128)), "triton", None),
        (hopper_facts(**sizes(512, 128)), "cudnn", "not faster than cudnn"),
        (hopper_facts(**sizes(4096, 64, 8)), "cudnn", None),
        (hopper_facts(**sizes(4096, 64, 7)), "cudnn", "not faster than cudnn"),
        (hopper_facts(**sizes(4095, 64, 8)), "cudnn", "not faster than cudnn"),
        (hopper_facts(**sizes(511, 64, 8)), "triton", "not faster than triton"),
        (hopper_facts(**sizes(64, 128)), "triton", "not faster than triton"),
        (hopper_facts(packed=True, **sizes(512, 128)), "triton", None),
        (hopper_facts(packed=True, **sizes(8192, 64)), "triton", "not faster than triton"),
        (hopper_facts(**sizes(8192, 96)), "triton", "head size"),
        (hopper_facts(QKV), "triton", "backward"),
        (hopper_facts(band=Band(-1023, 0)), "triton", "windows"),
        (hopper_facts(band=Band(None, 5)), "triton", "windows"),
        (hopper_facts(band=Band(None, -1)), "triton", "windows"),
        (hopper_facts(capability=(8, 0)), "triton", "not measured"),
        *((facts, "triton", reason) for facts, reason in NOT_FOR_FLASH),
    ],
)
def test_refusals(
    facts: Facts, rival: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash3, "_not_installed", lambda: None)
    found = flash3.refuses(facts, rival)
    assert (found is None) == (reason is None) and (reason or "") in (found or "")


def test_switched_off_or_not_installed() -> None:
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert "switched off" in (flash3.refuses(hopper_facts(), "cudnn") or "")
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    found = flash3.refuses(hopper_facts(), "cudnn")
    assert found is None or "not installed" in found


@pytest.mark.parametrize("rows", [1, 4, 6])
@pytest.mark.parametrize("columns", [1, 4, 7])
def test_only_what_the_library_means(rows: int, columns: int) -> None:
    """Every small call: those put as causal or full see just the columns that the library does."""
    i, j = torch.arange(rows)[:, None], torch.arange(columns)
    found: Counter[bool | None] = Counter()
    sides = range(-1, columns + 1)
    for causal, left, right, offset in product((False, True), sides, sides, range(-3, columns + 2)):
        params = P(1.0, causal, left, right, q_offset=offset)
        put = flash3._is_causal(band_of(params, rows, columns), rows, columns)
        found[put] += 1
        if put is None:
            continue
        a = i + offset
        seen = (
            ~(causal & (j > a)) & ((j >= a - left) | (left < 0)) & ((j <= a + right) | (right < 0))
        )
        assert torch.equal(seen, (j - i <= columns - rows) | torch.tensor(not put)), params
        assert seen.any(1).all(), params
    assert found[None] and found[False] and (found[True] or rows == 1 or rows > columns)


# -- on a GPU ----------------------------------------------------------------------------------


library = pytest.mark.skipif(not usable(flash3), reason="needs a Hopper GPU and vLLM's library")


@pytest.mark.gpu
@library
@pytest.mark.usefixtures("without_packages")
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("case", COVERED, ids=str)
def test_against_reference(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward by the library, backward from its (out, lse) by whatever is chosen there."""
    monkeypatch.setattr(flash3, "_not_faster", lambda facts, rival: None)  # the sizes are small
    arguments = make(case, dtype)
    want = run(reference_attention, arguments.to(torch.float64), with_lse=False)
    before = dispatch.calls.copy()
    assert_same(run(op_on_gpu, arguments, with_lse=False), want, ROUNDING[dtype])
    forward, backward = sorted(dispatch.calls - before, key=lambda name: "backward" in name)
    assert forward == "flash3.forward" and backward in ("cudnn.backward", "triton.backward")


@pytest.mark.gpu
@library
@pytest.mark.usefixtures("without_packages")
def test_layouts_and_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the inputs' strides: the promised strides, and the same bits each time."""
    monkeypatch.setattr(flash3, "_not_faster", lambda facts, rival: None)
    assert_layouts_and_bits("flash3.forward", CAUSAL)
