"""The forward kernel in Gluon: which calls it takes, and, on a GPU, its results."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

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
        (_call(P(_SCALE), rows=1023), "fewer"),
        (_call(P(_SCALE), size=64), "head size"),
        (_call(P(_SCALE), v_size=64), "head size"),
        (_call(P(_SCALE), dtype=torch.float32), "float32"),
        (_call(P(-_SCALE)), "scale"),
        (_call(P(_SCALE, softcap=3.0)), "band"),
        (_call(P(_SCALE), bias=torch.zeros(1, 4, 1, 1024)), "band"),
        (_call(P(_SCALE), sinks=torch.zeros(4)), "band"),
        (_call(P(_SCALE), slopes=torch.zeros(4)), "band"),
        (_call(P(_SCALE, True), cu_seqlens=torch.tensor([0, 9, 1024], dtype=torch.int32)), "band"),
        (_call(P(_SCALE, dropout_p=0.1), seed=torch.zeros(1, dtype=torch.int64)), "band"),
    ],
)
def test_what_it_takes(call: Call, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon, "_unknown_here", lambda device: None)
    found = gluon.refuses(call)
    assert found is None if reason is None else found is not None and reason in found


class _Driver:
    """A driver of another GPU."""

    def __init__(self, backend: str, arch: object) -> None:
        self.backend, self.arch = backend, arch

    def get_current_target(self) -> _Driver:
        return self


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
    monkeypatch.setattr(
        gluon.triton.runtime.driver, "active", _Driver(backend, arch), raising=False
    )
    monkeypatch.setattr(gluon.triton, "__version__", version)
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
_SHAPES = [(2, 4, 2, 1024, 1024), (1, 3, 3, 1111, 1280), (1, 2, 1, 1280, 1001)]


@pytest.mark.gpu
@pytest.mark.skipif(not _HERE, reason="no Hopper GPU, or another Triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("name", _CASES)
def test_against_the_reference(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """out and lse against float64, no number left unwritten, the same bits twice; gradients."""
    batch, heads, kv_heads, rows, columns = shape
    params = _CASES[name]
    torch.manual_seed(0)
    q, grad = (torch.randn(batch, rows, heads, 128) for _ in range(2))
    k, v = (torch.randn(batch, columns, kv_heads, 128) for _ in range(2))
    q, k, v, grad = (x.cuda().to(dtype).transpose(1, 2) for x in (q, k, v, grad))
    rest = (None, None, None, None, None, params)
    ran = []
    taken = gluon.forward
    monkeypatch.setattr(gluon, "forward", lambda *args: (ran.append(True), taken(*args)))
    out, lse = triton_attention.forward(q, k, v, *rest)
    again = triton_attention.forward(q, k, v, *rest)
    assert len(ran) == 2
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
    exact = [x.double().detach().requires_grad_() for x in (q, k, v)]
    want, want_lse = reference_attention(*exact, *rest)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert _off(out, want) < 4e-3
    needs = (True, True, True, False, False, False)
    found = triton_attention.backward(grad, None, q, k, v, out, lse, *rest, needs)
    for got, exactly in zip(found, torch.autograd.grad(want, exact, grad.double()), strict=False):
        assert got is not None
        assert _off(got, exactly) < 6e-3


def _off(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.gpu
@pytest.mark.skipif(not _HERE, reason="no Hopper GPU, or another Triton")
def test_another_triton_gets_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 2, 1024, 128, device="cuda").bfloat16() for _ in range(3))
    rest = (None, None, None, None, None, replace(P(_SCALE), causal=True))
    want = triton_attention.forward(q, k, v, *rest)
    monkeypatch.setattr(gluon, "_unknown_here", lambda device: "another Triton")
    monkeypatch.setattr(gluon, "forward", None)
    got = triton_attention.forward(q, k, v, *rest)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
