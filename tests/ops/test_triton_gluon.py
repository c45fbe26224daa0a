"""The kernels in Gluon: which calls they take, and, on a GPU, their results."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fxport.ops import attention, dispatch
from fxport.ops.facts import Facts
from fxport.ops.params import AttentionParams
from fxport.ops.reference import reference_attention
from fxport.ops.triton import attention as triton_attention
from fxport.ops.triton import gluon
from fxport.ops.triton.call import Call

P = AttentionParams
_SCALE = 1 / math.sqrt(128)
_HERE = torch.cuda.is_available() and gluon._unknown_here(torch.device("cuda")) is None


def _call(
    params: AttentionParams,
    rows: int = 1024,
    size: int = 128,
    v_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    **given: Tensor,
) -> Call:
    q, k, v = (
        torch.empty(1, n, rows, d, dtype=dtype) for n, d in ((4, size), (2, size), (2, v_size))
    )
    names = ("bias", "sinks", "slopes", "cu_seqlens", "seed")
    return Call.of(q, k, v, *(given.get(name) for name in names), params)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (_call(P(_SCALE)), None),
        (_call(P(_SCALE, causal=True)), None),
        (_call(P(_SCALE, causal=True, window_left=100), dtype=torch.float16), None),
        (_call(P(_SCALE), rows=511), "fewer"),
        (_call(P(_SCALE), size=64, v_size=64), "head size"),
        (_call(P(_SCALE), size=64), "head size"),
        (_call(P(_SCALE), v_size=64), "head size"),
        (_call(P(_SCALE), dtype=torch.float32), "float32"),
        (_call(P(-_SCALE)), "scale"),
        (_call(P(_SCALE, softcap=3.0)), "band"),
        (_call(P(_SCALE), bias=torch.zeros(1, 4, 1, 1024)), "band"),
        (_call(P(_SCALE), sinks=torch.zeros(4)), "band"),
        (_call(P(_SCALE), slopes=torch.zeros(4)), "band"),
        (_call(P(_SCALE, True), cu_seqlens=torch.tensor([0, 9, 1024], dtype=torch.int32)), None),
        (_call(P(_SCALE, dropout_p=0.1), seed=torch.zeros(1, dtype=torch.int64)), "band"),
    ],
)
def test_what_it_takes(call: Call, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon, "_unknown_here", lambda device: None)
    found = gluon.refuses(call)
    assert found is None if reason is None else found is not None and reason in found


def test_what_backward_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What forward takes, if it fills the GPU and the order of its sums may vary."""
    monkeypatch.setattr(gluon, "_unknown_here", lambda device: None)
    small, large = _call(P(_SCALE)), _call(P(_SCALE), rows=_LONG)  # and two key heads
    assert "too few" in (gluon.refuses_backward(small, None) or "")
    assert gluon.refuses_backward(large, None) is None
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in (gluon.refuses_backward(large, None) or "")
    finally:
        torch.use_deterministic_algorithms(before)


_LONG = 66 * 128


def _bias(*lead: int, dtype: torch.dtype = torch.bfloat16, rows_apart: int = _LONG) -> Tensor:
    return torch.empty(*lead, _LONG, rows_apart, dtype=dtype, device="meta")[..., :_LONG]


@pytest.mark.parametrize(
    ("params", "given", "reason"),
    [
        (P(_SCALE), {"bias": _bias(1, 4)}, None),
        (P(_SCALE, causal=True), {"bias": _bias(1, 1)}, None),
        (P(-_SCALE), {"bias": _bias(1, 4)}, None),
        (P(_SCALE), {"bias": _bias(1, 4), "sinks": torch.zeros(4)}, None),
        (P(_SCALE), {"bias": _bias(1, 4), "size": 64, "v_size": 64}, None),
        (P(_SCALE), {"bias": _bias(1, 4), "size": 96, "v_size": 96}, "head size"),
        (P(_SCALE), {"bias": _bias(1, 4), "v_size": 64}, "head size"),
        (P(_SCALE), {"size": 64, "v_size": 64}, "head size"),
        (P(_SCALE), {"sinks": torch.zeros(4)}, None),
        (P(_SCALE, softcap=3.0), {}, "positive scale"),
        (P(-_SCALE), {}, "positive scale"),
        (P(_SCALE), {"slopes": torch.zeros(4)}, "positive scale"),
        (P(_SCALE), {"bias": torch.zeros(1, 4, 1, _LONG)}, "both lengths"),
        (P(_SCALE), {"bias": torch.zeros(1, 4, _LONG, 1)}, "both lengths"),
        (P(_SCALE), {"bias": _bias(1, 4, dtype=torch.bool)}, "uint8"),
        (P(_SCALE), {"bias": _bias(1, 4, dtype=torch.float32)}, "float32"),
        (P(_SCALE), {"bias": _bias(1, 4, dtype=torch.float16)}, "float16"),
        (P(_SCALE), {"bias": _bias(1, 4, rows_apart=_LONG + 1)}, "both lengths"),
        (P(_SCALE, softcap=3.0), {"bias": _bias(1, 4)}, "otherwise"),
        (P(_SCALE), {"bias": _bias(1, 4), "slopes": torch.zeros(4)}, "otherwise"),
        (P(_SCALE, dropout_p=0.1), {"seed": torch.zeros(1, dtype=torch.int64)}, "dropout"),
        (P(_SCALE, True), {"cu_seqlens": torch.tensor([0, 9, _LONG]).int()}, "too few"),
    ],
)
def test_what_backward_takes_beside_a_band(
    params: P, given: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gluon, "_unknown_here", lambda device: None)
    found = gluon.refuses_backward(_call(params, rows=_LONG, **given), None)
    assert found is None if reason is None else found is not None and reason in found


def test_packed_sequences_want_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon, "_unknown_here", lambda device: None)
    borders = torch.tensor([0, 9, 4096], dtype=torch.int32)
    for heads, reason in ((31, "too few"), (32, None)):
        q, k, v = (torch.empty(1, heads, 4096, 128, dtype=torch.bfloat16) for _ in range(3))
        packed = Call.of(q, k, v, None, None, None, borders, None, P(_SCALE, causal=True))
        assert gluon.refuses_backward(replace(packed, first=None, end=None), None) is None
        found = gluon.refuses_backward(packed, None)
        assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize(
    ("rows", "size", "dtype", "params", "needs", "expected"),
    [
        (4096, 128, torch.bfloat16, P(_SCALE, causal=True), None, True),
        (8192, 128, torch.float16, P(_SCALE, causal=True), None, True),
        (4095, 128, torch.bfloat16, P(_SCALE, causal=True), None, False),
        (4096, 64, torch.bfloat16, P(_SCALE, causal=True), None, False),
        (4096, 128, torch.float32, P(_SCALE, causal=True), None, False),
        (4096, 128, torch.bfloat16, P(_SCALE), None, False),
        (4096, 128, torch.bfloat16, P(-_SCALE, causal=True), None, False),
        (4096, 128, torch.bfloat16, P(_SCALE, causal=True), (True,) * 3 + (False,) * 3, False),
    ],
)
def test_what_it_is_used_for_instead_of_cudnn(
    rows: int, size: int, dtype: torch.dtype, params: P, needs: tuple[bool, ...] | None,
    expected: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    q, k, v = (torch.empty(1, n, rows, size, dtype=dtype, device="meta") for n in (4, 2, 2))
    facts = Facts.of(q, k, v, None, None, None, None, params, needs)
    monkeypatch.setattr(gluon, "_unknown_here", lambda device: None)
    assert gluon.before_cudnn(facts) is expected
    monkeypatch.setattr(gluon, "_unknown_here", lambda device: "another Triton")
    assert not gluon.before_cudnn(facts)


def test_a_gradient_that_it_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are not aligned; or batches one after the other, each too small."""
    monkeypatch.setattr(gluon, "_unknown_here", lambda device: None)
    call = _call(P(_SCALE), rows=_LONG, bias=_bias(1, 4))
    assert gluon.refuses_backward(call, _bias(1, 4)) is None
    assert "aligned" in (gluon.refuses_backward(call, _bias(1, 4, rows_apart=_LONG + 1)) or "")
    q, k, v = (torch.empty(2, n, _LONG, 128, dtype=torch.bfloat16) for n in (2, 1, 1))
    two = Call.of(q, k, v, _bias(2, 2), None, None, None, None, P(_SCALE))
    assert gluon.refuses_backward(two, _bias(2, 2)) is None
    assert "too few" in (gluon.refuses_backward(two, _bias(1, 2)) or "")


@pytest.mark.parametrize(
    ("backend", "arch", "version", "interpreted", "reason"),
    [
        ("cuda", 90, "3.6.0", False, None),
        ("cuda", 90, "3.6.1+cu130", False, None),
        ("cuda", 100, "3.6.0", False, "cuda 100"),
        ("hip", "gfx942", "3.6.0", False, "hip gfx942"),
        ("cuda", 90, "3.9.0", False, "Triton 3.9.0"),
        ("cuda", 90, "3.60.0", False, "Triton 3.60.0"),
        ("cuda", 90, "3.6.0", True, "interpreter"),
    ],
)
def test_where_it_runs(
    backend: str,
    arch: object,
    version: str,
    interpreted: bool,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Never asked for where Triton is another: Gluon's functions may have changed."""
    monkeypatch.setattr(gluon, "INTERPRETED", interpreted)
    target = SimpleNamespace(backend=backend, arch=arch)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: target))
    found_triton = SimpleNamespace(__version__=version, runtime=SimpleNamespace(driver=driver))
    monkeypatch.setattr(gluon, "triton", found_triton)
    found = gluon._unknown_here.__wrapped__(torch.device("cuda"))
    assert found is None if reason is None else found is not None and reason in found


_CASES = {
    "full": P(_SCALE),
    "causal": P(_SCALE, causal=True),
    "window": P(_SCALE, causal=True, window_left=200),
    "narrow": P(_SCALE, causal=True, window_left=7),
    "both sides": P(0.2, window_left=130, window_right=70),
    "rows without keys": P(_SCALE, causal=True, q_offset=-300),
    "rows past the keys": P(_SCALE, window_left=5, q_offset=900),
    "last rows": P(0.3, causal=True, q_offset=256),
}
_SHAPES = [(2, 4, 2, 1024, 1024, 128), (1, 3, 3, 1111, 1280, 128), (1, 2, 1, 1280, 1001, 128)]


_QKV = (True, True, True, False, False, False)
hopper = pytest.mark.skipif(not _HERE, reason="no Hopper GPU, or another Triton")


def _counted(name: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each call of a function of `gluon` from now on."""
    ran: list[bool] = []
    function = getattr(gluon, name)
    monkeypatch.setattr(gluon, name, lambda *args: (ran.append(True), function(*args))[1])
    return ran


def _tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and out's gradient."""
    batch, heads, kv_heads, rows, columns, size = shape
    torch.manual_seed(0)
    sizes = ((rows, heads), (columns, kv_heads), (columns, kv_heads), (rows, heads))
    made = [torch.randn(batch, length, n, size) for length, n in sizes]
    return [x.cuda().to(dtype).transpose(1, 2) for x in made]


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("name", _CASES)
def test_against_the_reference(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """out, lse and gradients against float64; the same bits twice, but for dq."""
    q, k, v, grad = _tensors(shape, dtype)
    rest = (None, None, None, None, None, _CASES[name])
    ran = _counted("forward", monkeypatch)
    out, lse = triton_attention.forward(q, k, v, *rest)
    again = triton_attention.forward(q, k, v, *rest)
    assert len(ran) == 2
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
    exact = [x.double().detach().requires_grad_() for x in (q, k, v)]
    want, want_lse = reference_attention(*exact, *rest)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert _off(out, want) < 4e-3

    monkeypatch.setattr(gluon, "fills_the_gpu", lambda programs, interpreted: True)
    ran = _counted("backward", monkeypatch)
    grad_lse = torch.randn_like(lse) * (lse > -torch.inf)
    loss = (want * grad.double()).sum()
    loss = loss + (want_lse.masked_fill(lse == -torch.inf, 0.0) * grad_lse.double()).sum()
    exactly = torch.autograd.grad(loss, exact)
    for _ in range(2):  # prepared, then launched as prepared
        found = triton_attention.backward(grad, grad_lse, q, k, v, out, lse, *rest, _QKV)
        assert found[3:] == (None, None, None)
        for got, wanted, x in zip(found, exactly, (q, k, v), strict=False):
            assert got is not None
            assert got.stride() == x.stride()
            assert _off(got, wanted) < 6e-3
    assert len(ran) == 2


def _off(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


# learned by itself in all batches, by each batch; shared by heads; the same for all, or a mask
_BIASES = {
    "all batches": (1, None, True),
    "each batch": (None, None, True),
    "each batch, not learned": (None, None, False),
    "all heads": (None, 1, True),
    "one": (1, 1, False),
}
_BIAS_SHAPES = [(2, 4, 2, 640, 1024, 128), (3, 2, 2, 1001, 1280, 128), (3, 2, 1, 1001, 1280, 64)]


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("name", ["full", "causal", "both sides", "rows without keys"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", _BIAS_SHAPES, ids=str)
@pytest.mark.parametrize("kind", _BIASES)
def test_a_bias_against_the_reference(
    kind: str, name: str, shape: tuple[int, ...], dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All gradients, the bias' too, with hidden keys and a row of the least scores; and sinks."""
    q, k, v, grad = _tensors(shape, dtype)
    batch, heads, _, rows, columns, _ = shape
    batches, bias_heads, learned = _BIASES[kind]
    lead = (batches or batch, bias_heads or heads)
    bias = torch.randn(*lead, rows, columns, device="cuda").to(dtype)
    bias.masked_fill_(torch.rand_like(bias) < 0.1, -torch.inf)
    bias[..., 7, :] = torch.finfo(dtype).min
    sinks = torch.randn(heads, device="cuda") if learned else None
    rest = (None, None, None, _CASES[name])
    out, lse = triton_attention.forward(q, k, v, bias, sinks, *rest)
    inputs = [x for x in (q, k, v, bias, sinks) if x is not None]
    exact = [x.double().detach().requires_grad_() for x in inputs]
    want, _ = reference_attention(*exact, *[None] * (5 - len(exact)), *rest)
    assert _off(out, want) < 4e-3
    exactly = torch.autograd.grad((want * grad.double()).sum(), exact)

    for module in (gluon, triton_attention):
        monkeypatch.setattr(module, "fills_the_gpu", lambda programs, interpreted: True)
    ran = _counted("backward", monkeypatch)
    needs = (True, True, True, learned, learned, False)
    for _ in range(2):  # prepared, then launched as prepared
        found = triton_attention.backward(grad, None, q, k, v, out, lse, bias, sinks, *rest, needs)
        for got, wanted, x, need in zip(found, exactly, inputs, needs, strict=False):
            assert (got is not None) == need
            if got is not None:
                assert got.shape == x.shape
                assert got.dtype == x.dtype
                # of the sinks: sums over all rows, which cancel
                assert _off(got, wanted) < (6e-3 if x.dim() > 1 else 0.03)
    assert len(ran) == 2


_PACKED = {
    "causal": P(_SCALE, causal=True),
    "full": P(_SCALE),
    "window": P(_SCALE, causal=True, window_left=90),
    "both sides": P(0.2, window_left=130, window_right=70),
}


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("name", _PACKED)
@pytest.mark.parametrize("length", [1024, 1111])
@pytest.mark.parametrize("more", ["", "sinks", "bias"])
def test_packed_sequences(
    more: str, length: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1 to 400 tokens, at borders of blocks and elsewhere; a bias or sinks beside."""
    q, k, v, grad = _tensors((1, 4, 2, length, length, 128), torch.bfloat16)
    borders = [0, 1, 64, 128, 131, 512, 576, 976, length]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32, device="cuda")
    columns = length + -length % 8
    whole = torch.randn(1, 1, length, columns, device="cuda", dtype=torch.bfloat16)
    bias = whole[..., :length] if more == "bias" else None
    sinks = torch.randn(4, device="cuda") if more == "sinks" else None
    rest = (bias, sinks, None, cu_seqlens, None, _PACKED[name])
    forwards, backwards = (_counted(x, monkeypatch) for x in ("forward", "backward"))
    monkeypatch.setattr(gluon, "fills_the_gpu", lambda programs, interpreted: True)
    monkeypatch.setattr(gluon, "_PACKED_PROGRAMS", 0)
    exact = [x.double().detach().requires_grad_() for x in (q, k, v)]
    wide = [None if x is None else x.double() for x in (bias, sinks)]
    want, want_lse = reference_attention(*exact, *wide, *rest[2:])
    exactly = torch.autograd.grad((want * grad.double()).sum(), exact)
    for _ in range(2):  # prepared, then launched as prepared
        out, lse = triton_attention.forward(q, k, v, *rest)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
        assert _off(out, want) < 4e-3
        found = triton_attention.backward(grad, None, q, k, v, out, lse, *rest, _QKV)
        for got, wanted in zip(found, exactly, strict=False):
            assert got is not None
            assert _off(got, wanted) < 6e-3
    assert len(forwards) == (0 if more else 2)
    assert len(backwards) == 2


@pytest.mark.gpu
@hopper
def test_scores_far_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key past the end, whose score would be zero, must not outweigh all others."""
    monkeypatch.setattr(gluon, "fills_the_gpu", lambda programs, interpreted: True)
    q, k, v, grad = _tensors((1, 2, 2, 640, 1001, 128), torch.bfloat16)
    q[..., 0], k[..., 0] = 64, -64
    rest = (None, None, None, None, None, P(_SCALE))
    out, lse = triton_attention.forward(q, k, v, *rest)
    exact = [x.double().detach().requires_grad_() for x in (q, k, v)]
    want, want_lse = reference_attention(*exact, *rest)
    assert want_lse.max() < -300
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert _off(out, want) < 4e-3
    found = triton_attention.backward(grad, None, q, k, v, out, lse, *rest, _QKV)
    for got, wanted in zip(found, torch.autograd.grad(want, exact, grad.double()), strict=False):
        assert got is not None
        assert _off(got, wanted) < 0.03  # the first number of a row cancels


@pytest.mark.gpu
@hopper
def test_the_same_bits_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where some gradient is not needed, backward is that of the other kernels."""
    q, k, v, grad = _tensors((4, 16, 16, 512, 512, 128), torch.bfloat16)
    rest = (None, None, None, None, None, P(_SCALE, causal=True))
    out, lse = triton_attention.forward(q, k, v, *rest)
    ran = _counted("backward", monkeypatch)
    loose = triton_attention.backward(grad, None, q, k, v, out, lse, *rest, _QKV)
    assert len(ran) == 1
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            triton_attention.backward(grad, None, q, k, v, out, lse, *rest, _QKV) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    dq, *_ = triton_attention.backward(grad, None, q, k, v, out, lse, *rest, (True, *[False] * 5))
    assert len(ran) == 1
    for a, b, c in zip(first[:3], second[:3], loose[:3], strict=True):
        assert a is not None
        assert b is not None
        assert c is not None
        assert torch.equal(a, b)
        assert _off(c, a.double()) < 6e-3
    assert dq is not None
    assert first[0] is not None
    assert torch.equal(dq, first[0])


@pytest.mark.gpu
@hopper
def test_long_causal_calls_without_flash_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward is ours, backward cuDNN's: they mean the same by lse."""
    for flash in (dispatch.flash3, dispatch.flash4, dispatch.flash3_package):
        monkeypatch.setattr(flash, "refuses", lambda facts, rival: "not installed")
    dispatch.calls.clear()
    q, k, v, grad = _tensors((1, 2, 1, 4096, 4096, 128), torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    params = P(_SCALE, causal=True)
    out, _ = attention(*leaves, params=params)
    found = torch.autograd.grad(out, leaves, grad)
    assert set(dispatch.calls) == {"triton.forward", "cudnn.backward"}
    exact = [x.double().detach().requires_grad_() for x in (q, k, v)]
    want, _ = reference_attention(*exact, None, None, None, None, None, params)
    assert _off(out, want) < 4e-3
    exactly = torch.autograd.grad(want, exact, grad.double())
    for got, wanted in zip(found, exactly, strict=True):
        assert _off(got, wanted) < 6e-3


@pytest.mark.gpu
@hopper
def test_another_triton_gets_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 2, 1024, 128, device="cuda").bfloat16() for _ in range(3))
    rest = (None, None, None, None, None, replace(P(_SCALE), causal=True))
    want = triton_attention.forward(q, k, v, *rest)
    monkeypatch.setattr(gluon, "_unknown_here", lambda device: "another Triton")
    monkeypatch.setattr(gluon, "forward", None)
    got = triton_attention.forward(q, k, v, *rest)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
