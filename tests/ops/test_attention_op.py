"""The op as torch sees it: registration, strides, errors, transforms, tracing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from attention_cases import CASES, Arguments, Case, assert_same, make, op, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fxport.ops import attention, dispatch
from fxport.ops.params import AttentionParams

ONE_SIZES = tuple(
    Case(
        f"one-{'-'.join(sizes)}",
        **dict.fromkeys(sizes, 1),
        params=AttentionParams(0.3, softcap=cap),
    )
    for cap in (0.0, 2.0)
    for sizes in (("batch",), ("rows",), ("q_heads", "kv_heads"), ("size",), ("rows", "columns"))
)
EMPTY = (
    Case("no-batch", batch=0, bias_shape=(6, 37, 53)),
    Case("no-rows", rows=0, params=AttentionParams(0.3, causal=True)),
    Case("no-columns", columns=0, sinks=True),
    Case("no-columns-no-sinks", columns=0, params=AttentionParams(0.3, causal=True)),
)


def _flat(arguments: Arguments) -> tuple[Any, ...]:
    return (*arguments.tensors, *astuple(arguments.params))


def _backward_arguments(arguments: Arguments, needs: list[bool]) -> tuple[Any, ...]:
    tensors = tuple(None if x is None else x.detach() for x in arguments.tensors)
    out, lse = op(*tensors, arguments.params)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    return (d_out, d_lse, *tensors[:3], out, lse, *tensors[3:], *astuple(arguments.params), needs)


def test_schema() -> None:
    """Names and order are an interface: passes and backends build calls from them."""
    names = [a.name for a in torch.ops.fxport.attention.default._schema.arguments]
    assert names == [
        *("q", "k", "v", "bias", "sinks", "alibi_slopes", "cu_seqlens", "seed"),
        *("scale", "causal", "window_left", "window_right", "softcap", "dropout_p"),
        *("q_offset", "head_offset", "chunk"),
    ]
    assert [r.name for r in torch.ops.fxport.attention.default._schema.returns] == ["out", "lse"]


OPCHECKED = (
    "plain",
    "causal-top-left",
    "everything",
    "packed-with-everything",
    "bias-batch-columns",
)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in OPCHECKED], ids=str)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(torch.ops.fxport.attention.default, _flat(make(case)))


@pytest.mark.parametrize("needs", [(True,) * 6, (True, False, True, False, True, False)], ids=str)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_opcheck_backward(name: str, needs: tuple[bool, ...]) -> None:
    case = next(c for c in CASES if c.name == name)
    arguments = make(case)
    has = [x is not None for x in arguments.tensors[:6]]
    wanted = [need and given for need, given in zip(needs, has, strict=True)]
    torch.library.opcheck(
        torch.ops.fxport.attention_backward.default, _backward_arguments(arguments, wanted)
    )


@pytest.mark.parametrize("case", (*CASES, *ONE_SIZES, *EMPTY), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_strides_are_the_fakes(case: Case, dtype: torch.dtype) -> None:
    arguments = make(case, dtype)
    has = [x is not None and x.is_floating_point() for x in arguments.tensors[:6]]
    forward = _flat(replace(arguments, tensors=tuple(_detached(x) for x in arguments.tensors)))
    backward = _backward_arguments(arguments, has)
    for overload, values in (
        (torch.ops.fxport.attention.default, forward),
        (torch.ops.fxport.attention_backward.default, backward),
    ):
        real = overload(*values)
        with FakeTensorMode() as mode:
            fake = overload(*(_as_fake(mode, x) for x in values))
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)
            assert r.storage_offset() == 0
    out = torch.ops.fxport.attention.default(*forward)[0]
    assert out.transpose(1, 2).is_contiguous()


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _as_fake(mode: FakeTensorMode, x: Any) -> Any:
    return mode.from_tensor(x) if isinstance(x, Tensor) else x


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty_dimensions(case: Case) -> None:
    """ATen's kernel would end the process."""
    got = run(op, make(case))
    assert got["out"].eq(0).all()
    for name, leaf in make(case).differentiable.items():
        assert got[name].shape == leaf.shape


# -- which implementation ran ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "with_lse", "expected"),
    [
        ("causal-top-left", False, ("cpu_flash", "cpu_flash")),
        ("causal-top-left", True, ("cpu_flash", "blocked")),
        ("sinks-causal", False, ("cpu_flash", "cpu_flash")),
        ("packed", False, ("cpu_flash", "cpu_flash")),
        ("bias-bool-per-key", False, ("cpu_flash", "cpu_flash")),
        ("window-that-hides-nothing", False, ("cpu_flash", "cpu_flash")),
        ("bias-bool-causal", False, ("blocked", "blocked")),
        ("bias-per-key", False, ("blocked", "blocked")),
        ("window-left", False, ("blocked", "blocked")),
        ("dropout", False, ("blocked", "blocked")),
    ],
)
def test_calls_are_counted(name: str, with_lse: bool, expected: tuple[str, str]) -> None:
    case = next(c for c in CASES if c.name == name)
    before = dispatch.calls.copy()
    run(op, make(case), with_lse)
    forward, backward = expected
    assert dispatch.calls - before == {f"{forward}.forward": 1, f"{backward}.backward": 1}


# -- errors ------------------------------------------------------------------------------------


def _change(index: int, change: Callable[[Tensor], Tensor | None]) -> Callable[..., Arguments]:
    def apply(arguments: Arguments) -> Arguments:
        tensors = list(arguments.tensors)
        x = tensors[index]
        assert x is not None
        tensors[index] = change(x.detach())
        return replace(arguments, tensors=tuple(tensors))

    return apply


def _with(**numbers: Any) -> Callable[..., Arguments]:
    return lambda arguments: replace(arguments, params=replace(arguments.params, **numbers))


WRONG = (
    ("q must be", _change(0, lambda x: x[0])),
    ("q must be floating", _change(0, lambda x: x.long())),
    ("k is torch.float32, q is torch.float64", _change(1, lambda x: x.float())),
    ("v has batch 1, not 2", _change(2, lambda x: x[:1])),
    ("v has 2 heads, k has 3", _change(2, lambda x: x[:, :2])),
    ("v has length 52, k has 53", _change(2, lambda x: x[:, :, 1:])),
    ("k has head size 12, q has 13", _change(1, lambda x: x[..., 1:])),
    ("5 query heads are no multiple of 3", _change(0, lambda x: x[:, :5])),
    ("bias .* does not broadcast", _change(3, lambda x: x[:, :36])),
    ("bias .* does not broadcast", _change(3, lambda x: x[:5])),
    ("bias must have at most 4", _change(3, lambda x: x[None, None])),
    ("bias must be floating", _change(3, lambda x: x.int())),
    ("sinks has 5 of 6", _change(4, lambda x: x[1:])),
    ("sinks must be", _change(4, lambda x: x[None])),
    ("alibi_slopes must be floating", _change(5, lambda x: x.long())),
    ("dropout needs a seed", _change(7, lambda x: None)),
    ("seed must be int64", _change(7, lambda x: x.int())),
    (r"seed must have shape \[1\]", _change(7, lambda x: x[0])),
    ("window_left must be >= -1, got -2", _with(window_left=-2)),
    ("window_right must be >= -1", _with(window_right=-3)),
    ("softcap must be", _with(softcap=-1.0)),
    ("scale must be finite", _with(scale=float("nan"))),
    (r"dropout_p must be in \[0, 1\)", _with(dropout_p=1.0)),
    ("head_offset must be", _with(head_offset=-1)),
)


@pytest.mark.parametrize(("message", "change"), WRONG, ids=[m for m, _ in WRONG])
def test_wrong_arguments(message: str, change: Callable[..., Arguments]) -> None:
    arguments = make(next(c for c in CASES if c.name == "everything"))
    wrong = change(arguments)
    with pytest.raises(ValueError, match=message):
        op(*wrong.tensors, wrong.params)
    detached = [_detached(x) for x in wrong.tensors]
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        op(*(_as_fake(mode, x) for x in detached), wrong.params)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("must rise from 0 to 53", _change(6, lambda x: x[:-1])),
        ("must rise from 0 to 53", _change(6, lambda x: x[1:])),
        ("must rise from 0 to 53", _change(6, lambda x: x[[0, 3, 1, 2, 4, 5]])),
        ("cu_seqlens must be int32", _change(6, lambda x: x.long())),
        ("need batch 1, got 2", _change(0, lambda x: x.expand(2, -1, -1, -1))),
        ("q and k of one length, got 52 and 53", _change(0, lambda x: x[:, :, 1:])),
    ],
)
def test_wrong_packing(message: str, change: Callable[..., Arguments]) -> None:
    wrong = change(make(next(c for c in CASES if c.name == "packed")))
    if "batch" in message:
        k, v = (x.expand(2, -1, -1, -1) for x in wrong.tensors[1:3] if x is not None)
        wrong = replace(wrong, tensors=(wrong.tensors[0], k, v, *wrong.tensors[3:]))
    with pytest.raises(ValueError, match=message):
        op(*wrong.tensors, wrong.params)


@pytest.mark.parametrize("name", ["bias", "sinks", "alibi_slopes"])
def test_float64_term_in_a_float32_softmax_is_refused(name: str) -> None:
    arguments = make(next(c for c in CASES if c.name == "everything"))
    index = ("bias", "sinks", "alibi_slopes").index(name) + 3
    tensors = list(arguments.to(torch.float32).tensors)
    tensors[index] = arguments.tensors[index]
    with pytest.raises(ValueError, match=f"{name} is float64"):
        op(*tensors, arguments.params)


def test_transforms_without_a_rule_raise() -> None:
    """Rather than map, or drop tangents, in silence."""
    q, k, v, *_ = (x for x in make(CASES[0]).tensors if x is not None)
    params = CASES[0].params

    def f(x: Tensor) -> Tensor:
        return attention(x, k, v, params=params)[0]

    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(f)(q[None])
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(f, (q,), (q,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        f(torch.autograd.forward_ad.make_dual(q.detach(), q.detach()))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: f(x).sum())(q)
    (once,) = torch.autograd.grad(f(q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        once.sum().backward()


# -- precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled: bool) -> None:
    """q, k and v are cast, as SDPA does; the rest stays, and gradients come back as they were."""
    case = next(c for c in CASES if c.name == "everything")
    arguments = make(case, torch.float32)

    def call(*tensors: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return op(*tensors)

    traced = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = run(traced if compiled else call, arguments)
    assert got["out"].dtype == torch.bfloat16 and got["lse"].dtype == torch.float32
    assert all(got[n].dtype == torch.float32 for n in arguments.differentiable)
    by_hand = make(case, torch.float32)
    cast = tuple(x.to(torch.bfloat16) for x in by_hand.tensors[:3] if x is not None)
    want = run(lambda *a: op(*cast, *a[3:]), by_hand)
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_autocast_leaves_float64() -> None:
    arguments = make(CASES[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert op(*arguments.tensors, arguments.params)[0].dtype == torch.float64


# -- tracing -----------------------------------------------------------------------------------


def _model(x: Tensor, weight: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """[B, T, C] -> [B, T, C]: fused qkv, 4 heads on 2, sinks, an offset made of symbolic sizes."""
    batch, length, width = x.shape
    q, k, v = (x @ weight).split([width, width // 2, width // 2], dim=-1)
    q, k, v = (y.unflatten(-1, (-1, width // 4)).transpose(1, 2) for y in (q, k, v))
    params = AttentionParams(
        0.4, causal=True, dropout_p=dropout_p, q_offset=k.shape[2] - q.shape[2] + 3
    )
    out, lse = attention(q[:, :, 3:], k, v, seed=seed, params=replace(params))
    return out.transpose(1, 2).reshape(batch, length - 3, width) * lse.mean()


def _leaves(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, 24, dtype=torch.float64, generator=generator)
    weight = 0.2 * torch.randn(24, 48, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize(("backend", "dropout_p"), [("inductor", 0.3), ("aot_eager", 0.0)])
def test_compile_with_changing_length(backend: str, dropout_p: float) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(_model, fullgraph=True, dynamic=True, backend=backend)
    seed = torch.tensor([5])
    for length in (19, 40, 31):
        x, weight = _leaves(length)
        want, got = _model(x, weight, seed, dropout_p), compiled(x, weight, seed, dropout_p)
        incoming = torch.randn_like(want)
        grads = [torch.autograd.grad(y, (x, weight), incoming) for y in (got, want)]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-11)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counted == 1, f"{counted} graphs for three lengths"


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpoint_recomputes_the_same_mask(compiled: bool) -> None:
    def plain(x: Tensor, weight: Tensor, seed: Tensor) -> Tensor:
        return _model(torch.tanh(x), weight, seed, 0.4)

    def saved(x: Tensor, weight: Tensor, seed: Tensor) -> Tensor:
        y = checkpoint(plain, x, weight, seed, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    torch._dynamo.reset()
    function = torch.compile(saved, fullgraph=True, backend="aot_eager") if compiled else saved
    x, weight = _leaves(19)
    seed = torch.tensor([77])
    before = dispatch.calls["blocked.forward"]
    got = torch.autograd.grad(function(x, weight, seed).square().sum(), (x, weight))
    runs = dispatch.calls["blocked.forward"] - before
    assert runs == 2, "checkpoint did not recompute: the test shows nothing"
    want = torch.autograd.grad(plain(x, weight, seed).square().sum(), (x, weight))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_export_keeps_one_node_with_symbolic_numbers() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, seed: Tensor) -> Tensor:
            return _model(x, weight, seed, 0.0)

    example = (torch.randn(2, 19, 24), torch.randn(24, 48), torch.tensor([0]))
    length = torch.export.Dim("length", min=8, max=64)
    program = torch.export.export(Model(), example, dynamic_shapes=({1: length}, None, None))
    nodes = [n for n in program.graph.nodes if n.target is torch.ops.fxport.attention.default]
    assert len(nodes) == 1
    x = torch.randn(2, 33, 24)
    torch.testing.assert_close(
        program.module()(x, *example[1:]), _model(x, *example[1:], 0.0), rtol=0, atol=0
    )


def test_convenience_is_the_op() -> None:
    arguments = make(next(c for c in CASES if c.name == "everything"))
    q, k, v, bias, sinks, slopes, cu, seed = arguments.tensors
    assert q is not None and k is not None and v is not None
    got = attention(
        q,
        k,
        v,
        bias=bias,
        sinks=sinks,
        alibi_slopes=slopes,
        cu_seqlens=cu,
        seed=seed,
        params=arguments.params,
    )
    want = op(*arguments.tensors, arguments.params)
    assert_same(dict(zip("ol", got, strict=True)), dict(zip("ol", want, strict=True)), 0.0)
