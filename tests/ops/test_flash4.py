"""FlashAttention-4 behind `fxport::attention`: which calls it gets, and that they are right."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from attention_cases import (
    FLASH_CASES,
    FLASH_ROUNDING,
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

from fxport.ops import dispatch, flash3, flash3_package, flash4
from fxport.ops.band import Band, band_of
from fxport.ops.facts import Facts
from fxport.ops.fused import seen_from_diagonal
from fxport.ops.params import AttentionParams
from fxport.ops.reference import reference_attention

pytestmark = pytest.mark.usefixtures("nothing_judged")

P = AttentionParams
CAUSAL = P(0.1, causal=True)


_EARLY = {"band": Band(None, 5)}  # some columns beyond the diagonal


@pytest.mark.parametrize(
    ("facts", "rival", "reason"),
    [
        (hopper_facts(), "cudnn", None),
        (hopper_facts(QKV), "cudnn", None),
        (hopper_facts(QKV, lse_gradient=True), "triton", None),
        (hopper_facts(packed=True), "triton", None),
        (hopper_facts(band=Band(-1023, 0)), "triton", None),
        (hopper_facts(**_EARLY), "triton", None),
        (hopper_facts(deterministic=True), "cudnn", None),  # forward always adds in the same order
        (hopper_facts(QKV, deterministic=True), "cudnn", "deterministic"),
        (hopper_facts(QKV, **sizes(128, 128)), "cudnn", None),
        (hopper_facts(QKV, **sizes(127, 128)), "cudnn", "not faster than cudnn"),
        (hopper_facts(**sizes(2048, 128)), "cudnn", "not faster than cudnn"),
        (hopper_facts(**sizes(2048, 128)), "triton", None),
        (hopper_facts(**sizes(8192, 64)), "triton", None),
        (hopper_facts(packed=True, **sizes(8192, 64)), "triton", "not faster than triton"),
        (
            hopper_facts(band=Band(-9, 0), **sizes(8192, 64)),
            "triton",
            "not faster than triton",
        ),
        (hopper_facts(packed=True, **sizes(1024, 96)), "triton", None),
        (hopper_facts(QKV, band=Band(-9, 0), **sizes(1024, 96)), "triton", None),
        (hopper_facts(packed=True, **sizes(1023, 96)), "triton", "not faster than triton"),
        (hopper_facts(QKV, **sizes(8192, 256)), "cudnn", "head size"),
        (hopper_facts(**sizes(8192, 160)), "cudnn", "at this head size"),
        (hopper_facts(**sizes(8192, 72)), "cudnn", "32 divides"),
        (hopper_facts(band=Band(None, -1)), "triton", "see nothing"),
        (hopper_facts(band=Band(1, None)), "triton", "see nothing"),
        (hopper_facts(capability=(10, 0)), "triton", "not measured"),
        *((facts, "triton", reason) for facts, reason in NOT_FOR_FLASH),
    ],
)
def test_refusals(
    facts: Facts, rival: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash4, "_not_installed", lambda: None)
    found = flash4.refuses(facts, rival)
    assert (found is None) == (reason is None) and (reason or "") in (found or "")


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (hopper_facts(), "flash3"),
        (hopper_facts(packed=True), "flash4"),
        (hopper_facts(packed=True, **sizes(8192, 256)), "flash3"),
        (hopper_facts(packed=True, **sizes(8192, 64)), "triton"),
        (hopper_facts(band=Band(-1023, 0)), "flash4"),
        (hopper_facts(QKV), "flash4"),
    ],
)
def test_which_of_both_flashes(facts: Facts, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both installed, instead of our own kernels."""
    monkeypatch.setattr(flash3_package, "_not_installed", lambda: "left out for this test")
    for flash in (flash3, flash4):
        monkeypatch.setattr(flash, "_not_installed", lambda: None)
    ours = dispatch.Implementation("triton", lambda _: None, reference_attention, lambda *_: ())
    assert dispatch._or_flash(ours, facts).name == name


def test_switched_off_or_not_installed() -> None:
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert "switched off" in (flash4.refuses(hopper_facts(), "cudnn") or "")
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    found = flash4.refuses(hopper_facts(), "cudnn")
    assert found is None or "not installed" in found


def test_a_release_that_was_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash4, "version", lambda name: "4.0.0b1")
    flash4._library.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"4\.0\.0b1 was not compared"):
            assert "not a release checked" in (flash4.refuses(hopper_facts(), "cudnn") or "")
    finally:
        flash4._library.cache_clear()


def test_a_package_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an nvidia-cutlass-dsl that does not fit."""
    package = tmp_path / "flash_attn" / "cute"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()  # else the real one, where it is installed, comes first
    (package.parent / "__init__.py").touch()
    (package / "interface.py").write_text("import torch\ntorch.no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(flash4, "version", lambda name: "4.0.0b36")
    for name in [n for n in sys.modules if n.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    flash4._library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="not used: AttributeError"):
            assert flash4._not_installed() is not None
    finally:
        flash4._library.cache_clear()
        for name in [n for n in sys.modules if n.split(".")[0] == "flash_attn"]:
            del sys.modules[name]


@pytest.mark.parametrize("rows", [1, 4, 6])
@pytest.mark.parametrize("columns", [1, 4, 7])
def test_only_what_the_library_means(rows: int, columns: int) -> None:
    """Every small call that is put to the library sees just the columns that the library does."""
    i, j = torch.arange(rows)[:, None], torch.arange(columns)
    diagonal = i + columns - rows
    found: Counter[bool] = Counter()
    sides = range(-1, columns + 1)
    for causal, left, right, offset in product((False, True), sides, sides, range(-3, columns + 2)):
        params = P(1.0, causal, left, right, q_offset=offset)
        put = seen_from_diagonal(band_of(params, rows, columns), rows, columns)
        found[put is None] += 1
        if put is None:
            continue
        a = i + offset
        seen = (
            ~(causal & (j > a)) & ((j >= a - left) | (left < 0)) & ((j <= a + right) | (right < 0))
        )
        lower, upper = put["window_size_left"], 0 if put["causal"] else put["window_size_right"]
        meant = torch.ones(rows, columns, dtype=torch.bool)
        if lower is not None:
            meant &= j >= diagonal - lower
        if upper is not None:
            meant &= j <= diagonal + upper
        assert torch.equal(seen, meant), params
        assert seen.any(1).all(), params
    assert found[True] and found[False]


# -- on a GPU ----------------------------------------------------------------------------------


library = pytest.mark.skipif(not usable(flash4), reason="needs a Hopper GPU and flash-attn-4")


@pytest.fixture
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the length, since the sizes here are small, and whatever else is installed."""
    monkeypatch.setattr(flash4, "_not_faster", lambda facts, rival: None)
    for other in (flash3, flash3_package):
        monkeypatch.setattr(other, "_not_installed", lambda: "left out for this test")


@pytest.mark.gpu
@library
@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("dtype", list(FLASH_ROUNDING), ids=str)
@pytest.mark.parametrize("case", FLASH_CASES, ids=str)
def test_against_reference(case: Case, dtype: torch.dtype) -> None:
    """Forward and backward by the library; cuDNN's results for backward have no gradient of lse."""
    arguments = make(case, dtype)
    want = run(reference_attention, arguments.to(torch.float64))
    before = dispatch.calls.copy()
    assert_same(run(op_on_gpu, arguments), want, FLASH_ROUNDING[dtype])
    assert dispatch.calls - before == {"flash4.forward": 1, "flash4.backward": 1}


@pytest.mark.gpu
@library
@pytest.mark.usefixtures("_always")
def test_backward_of_another_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward takes (out, lse) from whatever made them: up to 4,096 tokens that is cuDNN."""
    monkeypatch.setattr(flash4, "_FORWARD", {})
    monkeypatch.setattr(
        flash4, "_not_faster", lambda facts, rival: "here" if facts.needs is None else None
    )
    arguments = make(FLASH_CASES[0], torch.bfloat16)
    want = run(reference_attention, arguments.to(torch.float64), with_lse=False)
    before = dispatch.calls.copy()
    assert_same(run(op_on_gpu, arguments, with_lse=False), want, FLASH_ROUNDING[torch.bfloat16])
    assert dispatch.calls - before == {"cudnn.forward": 1, "flash4.backward": 1}


@pytest.mark.gpu
@library
@pytest.mark.usefixtures("_always")
def test_layouts_and_bits() -> None:
    """Whatever the inputs' strides: the promised strides, and the same bits each time."""
    assert_layouts_and_bits("flash4.forward", CAUSAL)
