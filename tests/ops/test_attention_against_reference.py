"""Forward and every gradient against the dense formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import CASES, Case, assert_same, make, op, run
from torch import Tensor

from fxport.ops import blocked, cpu_flash, dispatch, tiles
from fxport.ops.facts import Facts
from fxport.ops.params import AttentionParams
from fxport.ops.reference import reference_attention

F64 = 1e-12  # float64 rounding over sums of at most a few thousand terms
F32 = 2e-5


class _Function(torch.autograd.Function):
    """An implementation's forward and backward joined, without dispatch."""

    @staticmethod
    def forward(ctx: Any, module: Any, params: AttentionParams, *tensors: Any) -> Any:
        out, lse = module.forward(*tensors, params)
        ctx.module, ctx.params = module, params
        ctx.save_for_backward(*tensors, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor | None) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        q, k, v, *rest = tensors
        needs = tuple(ctx.needs_input_grad[2:8])
        grads = ctx.module.backward(d_out, d_lse, q, k, v, out, lse, *rest, ctx.params, needs)
        assert [g is not None for g in grads] == list(needs)
        return (None, None, *grads, None, None)


def _by(module: Any) -> Any:
    def call(*arguments: Any) -> Any:
        return _Function.apply(module, arguments[-1], *arguments[:-1])

    return call


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_float64(case: Case) -> None:
    arguments = make(case)
    assert_same(run(op, arguments), run(reference_attention, arguments), F64)


@pytest.mark.parametrize("block", [5, 16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocked_whatever_the_block(
    case: Case, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that do not divide the lengths; tiles before, on and after every limit."""
    monkeypatch.setattr(tiles, "block_length", lambda heads: block)
    arguments = make(case)
    assert_same(run(_by(blocked), arguments), run(reference_attention, arguments), F64)


def _flash_takes(case: Case) -> bool:
    arguments = make(case)
    facts = Facts.of(*arguments.tensors[:7], arguments.params)
    return cpu_flash.refuses(facts) is None


@pytest.mark.parametrize("case", [c for c in CASES if _flash_takes(c)], ids=str)
def test_cpu_flash(case: Case) -> None:
    arguments = make(case)
    got = run(_by(cpu_flash), arguments, with_lse=False)
    assert_same(got, run(reference_attention, arguments, with_lse=False), F64)


def test_cpu_flash_takes_what_it_should() -> None:
    taken = {c.name for c in CASES if _flash_takes(c)}
    assert taken == {
        "plain",
        "causal-top-left",
        "causal-more-rows",
        "window-that-hides-nothing",
        "sinks",
        "sinks-causal",
        "bias-bool-per-key",
        "mqa",
        "no-groups",
        "one-row",
        "one-column",
        "packed",
        "packed-both-ways",
        "all-sizes-equal",
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_float32(case: Case) -> None:
    """float32 in, float32 out and lse, compared with float64 on the same values."""
    arguments = make(case, torch.float32)
    got = run(op, arguments)
    assert all(x.dtype == torch.float32 for x in got.values())
    assert_same(got, run(reference_attention, arguments.to(torch.float64)), F32)


@pytest.mark.parametrize("size", [1, 8, 13, 16, 40, 64, 80, 96, 128, 131, 192, 256])
@pytest.mark.parametrize("feature", ["cpu_flash", "blocked"])
def test_head_sizes(size: int, feature: str) -> None:
    softcap = 0.0 if feature == "cpu_flash" else 5.0
    params = AttentionParams(size**-0.5, causal=True, softcap=softcap)
    arguments = make(Case("", size=size, params=params))
    before = dispatch.calls[f"{feature}.backward"]
    got = run(op, arguments, with_lse=False)
    assert dispatch.calls[f"{feature}.backward"] == before + 1
    assert_same(got, run(reference_attention, arguments, with_lse=False), F64)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "sinks", "alibi_slopes"])
def test_one_gradient_alone(wanted: str) -> None:
    """Nothing else is computed, and what is computed does not need the rest."""
    case = next(c for c in CASES if c.name == "everything")
    arguments = make(case)
    whole = run(reference_attention, arguments)
    for name, leaf in arguments.differentiable.items():
        leaf.requires_grad_(name == wanted)
    got = run(op, arguments)
    assert_same(got, {name: whole[name] for name in ("out", "lse", wanted)}, F64)


@pytest.mark.parametrize("kind", ["infinite", "finfo.min", "-1e4"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_that_a_float_mask_forbids(kind: str, sinks: bool, dtype: torch.dtype) -> None:
    """-inf gives zeros. A finite number gives what softmax gives: uniform weights, and gradients
    that lse alone cannot tell (log(n) is rounded away)."""
    arguments = make(Case("", bias_shape=(37, 53), sinks=sinks), dtype)
    bias = arguments.tensors[3]
    assert bias is not None
    value = {"infinite": -torch.inf, "finfo.min": torch.finfo(torch.float32).min, "-1e4": -1e4}
    with torch.no_grad():
        bias[3] += value[kind]
        bias[7, 1:] += value[kind]
        bias[:, 20] = value[kind]
    # the formula in the same dtype: what is rounded away there is part of what softmax means
    want = run(reference_attention, arguments)
    if kind == "infinite" and not sinks:
        assert want["out"][:, :, 3].eq(0).all() and want["lse"][:, :, 3].isneginf().all()
    assert_same(run(op, arguments), want, F64 if dtype == torch.float64 else F32)


def test_keys_all_masked_in_one_batch_entry() -> None:
    case = next(c for c in CASES if c.name == "bias-bool-per-key")
    arguments = make(case)
    mask = arguments.tensors[3]
    assert mask is not None
    mask[1] = False
    before = dispatch.calls["cpu_flash.forward"]
    got = run(op, arguments)
    assert dispatch.calls["cpu_flash.forward"] == before + 1
    assert got["out"][1].eq(0).all() and got["lse"][1].isneginf().all()
    assert_same(got, run(reference_attention, arguments), F64)
    got = run(op, arguments, with_lse=False)
    assert_same(got, run(reference_attention, arguments, with_lse=False), F64)


@pytest.mark.parametrize("sink", [-torch.inf, 80.0])
@pytest.mark.parametrize("rows_without_columns", [False, True])
def test_extreme_sinks(sink: float, rows_without_columns: bool) -> None:
    offset = -16 if rows_without_columns else 0
    arguments = make(Case("", sinks=True, params=AttentionParams(0.3, True, q_offset=offset)))
    with torch.no_grad():
        arguments.tensors[4][2] = sink  # type: ignore[index]
    got, want = run(op, arguments), run(reference_attention, arguments)
    assert_same(got, want, F64)


@pytest.mark.parametrize("layout", ["heads-inside", "fused", "permuted-last", "expanded"])
@pytest.mark.parametrize("softcap", [0.0, 4.0], ids=["cpu_flash", "blocked"])
def test_input_layouts(layout: str, softcap: float) -> None:
    """Strides of the inputs and of the incoming gradient change nothing."""
    base = make(
        Case("", columns=37, kv_heads=6, params=AttentionParams(0.3, True, softcap=softcap))
    )
    q, k, v = (x.detach() for x in base.tensors[:3] if x is not None)
    if layout == "heads-inside":
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    elif layout == "fused":
        fused = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2).contiguous()
        views = [x.transpose(1, 2) for x in fused.unbind(2)]
    elif layout == "permuted-last":
        views = [x.mT.contiguous().mT for x in (q, k, v)]
    else:
        k, v = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
        views = [q, k, v]
    leaves = [x.requires_grad_() for x in (x.detach() for x in views)]
    assert [x.stride() for x in leaves] == [x.stride() for x in views]
    rest = (None, None, None, None, None, base.params)
    wanted = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    out, want = op(*leaves, *rest)[0], reference_attention(*wanted, *rest)[0]
    # the gradient of sum() is expanded from one number: all strides 0
    grads, want_grads = (
        torch.autograd.grad(out.sum(), leaves),
        torch.autograd.grad(want.sum(), wanted),
    )
    names = ("q", "k", "v")
    assert_same(
        {"out": out} | dict(zip(names, grads, strict=True)),
        {"out": want} | dict(zip(names, want_grads, strict=True)),
        F64,
    )


@pytest.mark.parametrize("name", ["everything", "empty-rows", "packed-with-everything"])
def test_gradcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients against finite differences, independent of the reference's own derivative."""
    monkeypatch.setattr(tiles, "block_length", lambda heads: 3)
    case = next(c for c in CASES if c.name == name)
    small = case.but(batch=1, q_heads=2, kv_heads=1, rows=5, columns=7, size=3, value_size=2)
    params = AttentionParams(
        0.7,
        case.params.causal,
        window_left=4 if case.params.window_left >= 0 else -1,
        softcap=case.params.softcap,
        dropout_p=case.params.dropout_p,
        q_offset=-2 if name == "empty-rows" else 2,
    )
    if case.bias_shape:
        small = small.but(bias_shape=(2, 5, 1))
    if case.cu_seqlens:
        small = small.but(rows=7, cu_seqlens=(0, 3, 7), bias_shape=(2, 7, 1))
    arguments = make(small.but(params=params))
    leaves = arguments.differentiable

    def function(*values: Tensor) -> Tensor | tuple[Tensor, ...]:
        given = dict(zip(leaves, values, strict=True))
        names = ("q", "k", "v", "bias", "sinks", "alibi_slopes")
        tensors = [given.get(n, x) for n, x in zip(names, arguments.tensors, strict=False)]
        out, lse = op(*tensors, *arguments.tensors[6:], params)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=False)
