"""cuDNN behind `fxport::attention`: which calls it gets, and on a GPU that they come out right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, assert_same, layouts, make, op_on_gpu, run
from torch import Tensor

from fxport.ops import attention, cudnn, dispatch
from fxport.ops.facts import Facts
from fxport.ops.params import AttentionParams
from fxport.ops.reference import reference_attention

P = AttentionParams
ROUNDING = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
CAUSAL = P(0.1, causal=True)
COVERED = (
    Case("causal", rows=517, columns=517, size=64, params=CAUSAL),
    Case("full", rows=389, columns=517, size=128),
    Case("window-that-hides-nothing", rows=129, columns=129, size=80, params=P(0.1, True, 129)),
    Case("mqa", batch=1, q_heads=8, kv_heads=1, rows=260, columns=260, size=96, params=CAUSAL),
    Case("no-groups", kv_heads=6, rows=333, columns=333, size=128, params=CAUSAL),
    Case("192", batch=1, rows=200, columns=200, size=192, params=CAUSAL),
    Case("256", batch=3, rows=300, columns=300, size=256, params=P(0.06, causal=True)),
    Case("equal", batch=128, q_heads=1, kv_heads=1, rows=128, columns=128, size=128),
)


def _facts(needs: tuple[bool, ...] | None = None, lse: bool = False, **changes: Any) -> Facts:
    q = torch.empty(2, 6, 512, 64, dtype=torch.bfloat16)
    params = P(0.125, causal=True)
    facts = Facts.of(q, q, q, None, None, None, None, params, needs, lse)
    return replace(facts, **{"device": "cuda", "capability": (9, 0), **changes})


_BACKWARD = (True, True, True, False, False, False)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (_facts(), None),
        (_facts(_BACKWARD), None),
        (_facts(deterministic=True), None),  # forward always adds in the same order
        (_facts(_BACKWARD, deterministic=True), "deterministic"),
        (_facts(_BACKWARD, lse=True), "gradient of lse"),
        (_facts(dtype=torch.float32), "float32"),
        (_facts(sinks=True), "sinks"),
        (_facts(packed=True), "packing"),
        (_facts(alibi_slopes=True), "ALiBi"),
        (_facts(bias_dtype=torch.bool, bias_shape=(512,)), "bias"),
        (_facts(params=P(0.1, softcap=2.0)), "softcap"),
        (_facts(params=P(0.1, dropout_p=0.1)), "dropout"),
        (_facts(params=P(-0.1, causal=True)), "scale"),
        (_facts(v_shape=torch.Size((2, 6, 512, 32))), "head size"),
        (_facts(capability=(8, 0)), "not measured"),
        (_facts(k_shape=torch.Size((2, 6, 700, 64))), "as many rows"),
        (_facts(q_shape=torch.Size((2, 6, 0, 64)), k_shape=torch.Size((2, 6, 0, 64))), "empty"),
        (_facts(q_shape=torch.Size((2, 6, 4, 64)), k_shape=torch.Size((2, 6, 4, 64))), "faster"),
    ],
)
def test_refusals(facts: Facts, reason: str | None) -> None:
    found = cudnn.refuses(facts)
    assert (found is None) == (reason is None) and (reason or "") in (found or "")


def test_windows_and_offsets_are_not_covered() -> None:
    for params in (P(0.1, True, 100), P(0.1, True, q_offset=3), P(0.1, False, 5, 5)):
        q = torch.empty(2, 6, 512, 64, dtype=torch.bfloat16)
        facts = Facts.of(q, q, q, None, None, None, None, params)
        assert "all columns" in (cudnn.refuses(facts) or "")


# -- on a GPU ----------------------------------------------------------------------------------


def _hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


hopper = pytest.mark.skipif(not _hopper(), reason="measured on Hopper only")


@pytest.mark.gpu
@hopper
@pytest.mark.usefixtures("without_packages")
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("case", COVERED, ids=str)
def test_against_reference(case: Case, dtype: torch.dtype) -> None:
    arguments = make(case, dtype)
    want = run(reference_attention, arguments.to(torch.float64), with_lse=False)
    before = dispatch.calls.copy()
    assert_same(run(op_on_gpu, arguments, with_lse=False), want, ROUNDING[dtype])
    assert dispatch.calls - before == {"cudnn.forward": 1, "cudnn.backward": 1}


@pytest.mark.gpu
@hopper
@pytest.mark.usefixtures("without_packages")
def test_a_gradient_of_lse_goes_to_our_kernels() -> None:
    """Forward by cuDNN, backward by ours: both mean the same by out and lse."""
    arguments = make(COVERED[0], torch.bfloat16)
    want = run(reference_attention, arguments.to(torch.float64))
    before = dispatch.calls.copy()
    assert_same(run(op_on_gpu, arguments), want, ROUNDING[torch.bfloat16])
    assert dispatch.calls - before == {"cudnn.forward": 1, "triton.backward": 1}


def _training_call(inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = attention(*leaves, params=CAUSAL)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.gpu
@hopper
@pytest.mark.usefixtures("without_packages")
def test_layouts() -> None:
    """Whatever the strides of the inputs, results have those that the op promises."""
    changes = layouts(4)
    before = dispatch.calls.copy()
    for name, inputs in changes.items():
        *qkv, grad = inputs
        got = _training_call(qkv, grad)
        want = _training_call([x.contiguous() for x in qkv], grad.contiguous())
        for x, y in zip(got, want, strict=True):
            assert x.stride() == y.stride(), name
            assert (x.float() - y.float()).norm() <= 1e-2 * y.float().norm(), name
        assert all(x.transpose(1, 2).is_contiguous() for x in (got[0], *got[2:])), name
        assert got[1].is_contiguous(), name
    assert dispatch.calls - before == {
        "cudnn.forward": 2 * len(changes),
        "cudnn.backward": 2 * len(changes),
    }


@pytest.mark.gpu
@hopper
@pytest.mark.usefixtures("without_packages")
def test_deterministic_algorithms_give_the_same_bits() -> None:
    generator = torch.Generator("cuda").manual_seed(5)
    shape = (2, 8, 2048, 64)
    *qkv, grad = (
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        for _ in range(4)
    )
    torch.use_deterministic_algorithms(True)
    try:
        before = dispatch.calls.copy()
        first, *others = (_training_call(qkv, grad) for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(False)
    assert dispatch.calls - before == {"cudnn.forward": 4, "triton.backward": 4}
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.gpu
@hopper
@pytest.mark.usefixtures("without_packages")
def test_compiled_and_captured() -> None:
    """Under Inductor, with CUDA graphs: the strides that fakes promise are the real ones."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q * 2, k + 1, v, params=CAUSAL)[0]
        return out.transpose(1, 2).reshape(2, 256, -1).sin()

    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(*leaves)
        got_grads = [x.clone() for x in torch.autograd.grad(got.sum(), leaves)]
        want = model(*leaves)
        want_grads = torch.autograd.grad(want.sum(), leaves)
        for x, y in zip(got_grads, want_grads, strict=True):
            assert (x.float() - y.float()).norm() <= 2e-2 * y.float().norm()
