"""FlashAttention-3's own build behind `fxport::attention`: which calls, and that they are right."""

from __future__ import annotations

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
from fxport.ops.band import Band
from fxport.ops.facts import Facts
from fxport.ops.params import AttentionParams
from fxport.ops.reference import reference_attention

pytestmark = pytest.mark.usefixtures("nothing_judged")


@pytest.mark.parametrize(
    ("facts", "rival", "reason"),
    [
        (hopper_facts(), "cudnn", None),
        (hopper_facts(QKV), "cudnn", None),
        (hopper_facts(QKV, lse_gradient=True), "triton", "gradient of lse"),
        (hopper_facts(deterministic=True), "cudnn", None),  # forward always adds in the same order
        (hopper_facts(QKV, deterministic=True), "cudnn", "deterministic"),
        (hopper_facts(**sizes(1024, 128)), "cudnn", None),
        (hopper_facts(**sizes(1023, 128)), "cudnn", "not faster than cudnn"),
        (hopper_facts(QKV, **sizes(2048, 128, 4)), "cudnn", None),
        (
            hopper_facts(QKV, **sizes(2047, 128, 4)),
            "cudnn",
            "not faster than cudnn",
        ),
        (hopper_facts(band=Band(None, -1)), "triton", "see nothing"),
        (hopper_facts(band=Band(1, None)), "triton", "see nothing"),
        (hopper_facts(**sizes(64, 128)), "triton", None),
        (hopper_facts(**sizes(64, 64)), "triton", "not faster than triton"),
        (hopper_facts(packed=True, **sizes(1024, 256)), "triton", None),
        (
            hopper_facts(band=Band(-9, 0), **sizes(1023, 256)),
            "triton",
            "not faster than triton",
        ),
        (hopper_facts(**sizes(8192, 256, 2)), "cudnn", "not faster than cudnn"),
        (hopper_facts(**sizes(8192, 96)), "cudnn", "at this head size"),
        (hopper_facts(capability=(10, 0)), "triton", "not measured"),
        *((facts, "triton", reason) for facts, reason in NOT_FOR_FLASH),
    ],
)
def test_refusals(
    facts: Facts, rival: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash3_package, "_not_installed", lambda: None)
    found = flash3_package.refuses(facts, rival)
    assert (found is None) == (reason is None) and (reason or "") in (found or "")


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (hopper_facts(), "flash3_package"),
        (hopper_facts(packed=True), "flash3_package"),
        (hopper_facts(packed=True, **sizes(4096, 128)), "flash4"),
        (hopper_facts(QKV), "flash3_package"),
        (hopper_facts(QKV, **sizes(512, 128)), "flash4"),
        (hopper_facts(QKV, packed=True), "flash4"),
        (hopper_facts(QKV, band=Band(None, None)), "flash4"),
        (
            hopper_facts(QKV, band=Band(None, None), **sizes(8192, 256)),
            "flash3_package",
        ),
        (hopper_facts(QKV, lse_gradient=True), "flash4"),
        (hopper_facts(**sizes(8192, 96)), "flash4"),
    ],
)
def test_which_of_all_flashes(facts: Facts, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all installed, instead of our own kernels."""
    for flash in (flash3, flash3_package, flash4):
        monkeypatch.setattr(flash, "_not_installed", lambda: None)
    ours = dispatch.Implementation("triton", lambda _: None, reference_attention, lambda *_: ())
    assert dispatch._or_flash(ours, facts).name == name


def test_switched_off_or_not_installed() -> None:
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert "switched off" in (flash3_package.refuses(hopper_facts(), "cudnn") or "")
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    found = flash3_package.refuses(hopper_facts(), "cudnn")
    assert found is None or "not installed" in found


def test_a_library_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found and left out, which is said."""
    package = tmp_path / "flash_attn_3"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_C.abi3.so").write_text("no library")
    monkeypatch.syspath_prepend(tmp_path)
    flash3_package._operators.cache_clear()
    try:
        with pytest.warns(UserWarning, match="flash-attn-3 is not used"):
            assert flash3_package._not_installed() is not None
    finally:
        flash3_package._operators.cache_clear()


# -- on a GPU ----------------------------------------------------------------------------------


library = pytest.mark.skipif(
    not usable(flash3_package), reason="needs a Hopper GPU and flash-attn-3"
)


@pytest.fixture
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the length, since the sizes here are small, and whatever else is installed."""
    monkeypatch.setattr(flash3_package, "_not_faster", lambda facts, rival: None)
    for other in (flash3, flash4):
        monkeypatch.setattr(other, "_not_installed", lambda: "left out for this test")


@pytest.mark.gpu
@library
@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("dtype", list(FLASH_ROUNDING), ids=str)
@pytest.mark.parametrize("case", FLASH_CASES, ids=str)
def test_against_reference(case: Case, dtype: torch.dtype) -> None:
    """Forward and backward by the library."""
    arguments = make(case, dtype)
    want = run(reference_attention, arguments.to(torch.float64), with_lse=False)
    before = dispatch.calls.copy()
    assert_same(run(op_on_gpu, arguments, with_lse=False), want, FLASH_ROUNDING[dtype])
    ran = {"flash3_package.forward": 1, "flash3_package.backward": 1}
    assert dispatch.calls - before == ran


@pytest.mark.gpu
@library
@pytest.mark.usefixtures("_always")
def test_backward_of_another_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward takes (out, lse) from whatever made them: at short lengths that is cuDNN."""
    monkeypatch.setattr(
        flash3_package, "_not_faster", lambda facts, rival: "here" if facts.needs is None else None
    )
    arguments = make(FLASH_CASES[0], torch.bfloat16)
    want = run(reference_attention, arguments.to(torch.float64), with_lse=False)
    before = dispatch.calls.copy()
    got = run(op_on_gpu, arguments, with_lse=False)
    assert_same(got, want, FLASH_ROUNDING[torch.bfloat16])
    assert dispatch.calls - before == {"cudnn.forward": 1, "flash3_package.backward": 1}


@pytest.mark.gpu
@library
@pytest.mark.usefixtures("_always")
def test_layouts_and_bits() -> None:
    """Whatever the inputs' strides: the promised strides, and the same bits each time."""
    assert_layouts_and_bits("flash3_package.forward", AttentionParams(0.1, causal=True))
