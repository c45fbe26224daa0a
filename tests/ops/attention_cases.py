"""Calls of `fxport::attention` for the tests: one record per call, tensors made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fxport.ops import dispatch
from fxport.ops.facts import Facts
from fxport.ops.params import AttentionParams

NAMES = ("q", "k", "v", "bias", "sinks", "alibi_slopes")


@dataclass(frozen=True)
class Case:
    """One call. Every size differs from every other unless a test says otherwise."""

    name: str
    batch: int = 2
    q_heads: int = 6
    kv_heads: int = 3
    rows: int = 37
    columns: int = 53
    size: int = 13
    value_size: int = 0  # 0: as `size`
    params: AttentionParams = field(default_factory=lambda: AttentionParams(scale=0.3))
    bias_shape: tuple[int, ...] | None = None
    bias_dtype: torch.dtype | None = None  # None: the case's dtype
    sinks: bool = False
    alibi_slopes: bool = False
    cu_seqlens: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)


@dataclass(frozen=True)
class Arguments:
    """The tensors of a call; `differentiable` are leaves in the order of `NAMES`."""

    tensors: tuple[Tensor | None, ...]  # q, k, v, bias, sinks, alibi_slopes, cu_seqlens, seed
    params: AttentionParams

    @property
    def differentiable(self) -> dict[str, Tensor]:
        found = zip(NAMES, self.tensors[:6], strict=True)
        return {name: x for name, x in found if x is not None and x.requires_grad}

    def to(self, dtype: torch.dtype) -> Arguments:
        """The same values as fresh leaves in another dtype."""
        tensors = tuple(
            x.detach().to(dtype).requires_grad_() if x is not None and x.is_floating_point() else x
            for x in self.tensors
        )
        return replace(self, tensors=tensors)


def hopper_facts(needs: tuple[bool, ...] | None = None, **changes: Any) -> Facts:
    """A causal bf16 call of 8192 rows as on a Hopper GPU, which need not be there."""
    q = torch.empty(2, 6, 8192, 128, dtype=torch.bfloat16, device="meta")
    facts = Facts.of(q, q, q, None, None, None, None, AttentionParams(0.125, causal=True), needs)
    return replace(facts, **{"device": "cuda", "capability": (9, 0), **changes})


# What no FlashAttention takes, whatever else would run, and a word of the reason.
NOT_FOR_FLASH: tuple[tuple[Facts, str], ...] = (
    (hopper_facts(dtype=torch.float32), "float32"),
    (hopper_facts(sinks=True), "sinks"),
    (hopper_facts(alibi_slopes=True), "ALiBi"),
    (hopper_facts(bias_dtype=torch.bool, bias_shape=(512,)), "bias"),
    (hopper_facts(params=AttentionParams(0.1, softcap=2.0)), "tanh"),
    (hopper_facts(params=AttentionParams(0.1, dropout_p=0.1)), "dropout"),
    (hopper_facts(params=AttentionParams(-0.1, causal=True)), "scale"),
    (hopper_facts(v_shape=torch.Size((2, 6, 8192, 64))), "head size"),
    (hopper_facts(q_shape=torch.Size((2, 6, 0, 128))), "empty"),
)


QKV = (True, True, True, False, False, False)


def sizes(length: int, size: int, group: int = 1) -> dict[str, torch.Size]:
    """Six key heads, `group` query heads for each."""
    shape = torch.Size((2, 6, length, size))
    return {"q_shape": torch.Size((2, 6 * group, length, size)), "k_shape": shape, "v_shape": shape}


def usable(library: ModuleType) -> bool:
    """Whether there is a Hopper GPU and one of FlashAttention's libraries for it."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return False
    return library._not_installed() is None


P = AttentionParams
# what FlashAttention's packages take, forward and backward
FLASH_ROUNDING = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
_CAUSAL = P(0.1, causal=True)
FLASH_CASES = (
    Case("causal", rows=517, columns=517, size=64, params=_CAUSAL),
    Case("full", rows=389, columns=517, size=128),
    Case("more-rows", rows=517, columns=389, size=96),
    Case("fewer-rows", rows=300, columns=517, size=128, params=P(0.1, True, q_offset=217)),
    Case("mqa", batch=1, q_heads=8, kv_heads=1, rows=260, columns=260, size=128, params=_CAUSAL),
    Case("no-groups", kv_heads=6, rows=333, columns=333, size=256, params=P(0.06, causal=True)),
    Case("equal", batch=128, q_heads=1, kv_heads=1, rows=128, columns=128, size=128),
    Case("odd", rows=131, columns=131, size=32, params=_CAUSAL),
    Case("window", rows=701, columns=701, size=128, params=P(0.1, True, window_left=333)),
    Case("window-of-one", rows=301, columns=301, size=64, params=P(0.1, True, window_left=0)),
    Case(
        "window-both", rows=300, columns=517, size=64,
        params=P(0.1, window_left=70, window_right=31, q_offset=217),
    ),
    Case("window-right", rows=300, columns=300, size=128, params=P(0.1, window_right=31)),
    Case("window-left", rows=300, columns=300, size=96, params=P(0.1, window_left=31)),
    Case(
        "packed", batch=1, rows=533, columns=533, size=128, cu_seqlens=(0, 11, 12, 12, 341, 533),
        params=_CAUSAL,
    ),
    Case("packed-full", batch=1, rows=733, columns=733, size=64, cu_seqlens=(0, 200, 733)),
    Case(
        "packed-window", batch=1, rows=733, columns=733, size=128, cu_seqlens=(0, 200, 733),
        params=P(0.1, True, window_left=77),
    ),
    Case("long", batch=1, rows=1500, columns=2333, size=256, params=P(0.06, True, q_offset=833)),
)  # fmt: skip


def make(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Arguments:
    """Normal q, k, v and bias; sinks around 0; slopes in [0, 0.5)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    q = normal(case.batch, case.q_heads, case.rows, case.size)
    k = normal(case.batch, case.kv_heads, case.columns, case.size)
    v = normal(case.batch, case.kv_heads, case.columns, case.value_size or case.size)
    bias = None
    if case.bias_shape is not None and case.bias_dtype == torch.bool:
        bias = torch.rand(case.bias_shape, generator=generator) > 0.3
    elif case.bias_shape is not None:
        bias = normal(*case.bias_shape).detach().to(case.bias_dtype or dtype).requires_grad_()
    sinks = normal(case.q_heads) if case.sinks else None
    slopes = None
    if case.alibi_slopes:
        values = 0.5 * torch.rand(case.q_heads, generator=generator, dtype=torch.float64)
        slopes = values.to(dtype).requires_grad_()
    cu = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, dtype=torch.int32)
    key = torch.tensor([0x1234_5678_9ABC_DEF]) if case.params.dropout_p > 0 else None
    return Arguments((q, k, v, bias, sinks, slopes, cu, key), case.params)


def run(
    function: Callable[..., tuple[Tensor, Tensor]], arguments: Arguments, with_lse: bool = True
) -> dict[str, Tensor]:
    """out, lse and the gradient of every differentiable argument, for fixed incoming gradients."""
    out, lse = function(*arguments.tensors, arguments.params)
    generator = torch.Generator().manual_seed(1)
    d_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    d_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse.dtype)
    leaves = arguments.differentiable
    results, incoming = ((out, lse), (d_out, d_lse)) if with_lse else ((out,), (d_out,))
    grads = torch.autograd.grad(results, tuple(leaves.values()), incoming)
    return {"out": out, "lse": lse} | dict(zip(leaves, grads, strict=True))


def op(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The registered op, called as the implementations are: tensors, then params."""
    *tensors, p = arguments
    return torch.ops.fxport.attention(
        *tensors,
        p.scale,
        p.causal,
        p.window_left,
        p.window_right,
        p.softcap,
        p.dropout_p,
        p.q_offset,
        p.head_offset,
        p.chunk,
    )


def op_on_gpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As `op`, for tensors of the CPU; computed on the GPU."""
    *tensors, params = arguments
    out, lse = op(*(None if x is None else x.cuda() for x in tensors), params)
    return out.cpu(), lse.cpu()


def layouts(count: int, device: str = "cuda") -> dict[str, list[Tensor]]:
    """`count` bf16 tensors ``[3, 4, 192, 64]`` in every layout that calls are seen to have."""
    generator, shape = torch.Generator(device).manual_seed(3), (3, 4, 192, 64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    plain = [normal(*shape) for _ in range(count)]
    fused = normal(3, 192, count * 4 * 64)
    return {
        "new": plain,
        "rows first": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain],
        "last stride": [x.transpose(2, 3).contiguous().transpose(2, 3) for x in plain],
        "misaligned": [torch.cat([x[..., :1], x], -1)[..., 1:] for x in plain],
        "one projection": [x.view(3, 192, 4, 64).transpose(1, 2) for x in fused.split(256, -1)],
        "expanded": [x[:1].expand(shape) for x in plain],
    }


def assert_layouts_and_bits(ran: str, params: AttentionParams, device: str = "cuda") -> None:
    """Forward by `ran`: the promised strides in every layout, and the same bits each time."""
    for name, inputs in layouts(3, device).items():
        before = dispatch.calls.copy()
        out, lse = op(*inputs, *[None] * 5, params)
        again = op(*(x.contiguous() for x in inputs), *[None] * 5, params)
        assert dispatch.calls - before == {ran: 2}, name
        assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous(), name
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1]), name


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], relative: float) -> None:
    """Every entry within `relative` of the largest wanted value (or of 1)."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        actual, expected = got[name].detach().double(), expected.detach().double()
        assert actual.shape == expected.shape, name
        infinite = expected.isinf()
        assert torch.equal(actual[infinite], expected[infinite]), f"{name}: infinities differ"
        bound = relative * max(
            1.0, expected[~infinite].abs().amax().item() if (~infinite).any() else 1
        )
        error = (actual - expected)[~infinite].abs()
        assert not error.isnan().any(), f"{name} is NaN"
        worst = error.amax().item() if error.numel() else 0.0
        assert worst <= bound, f"{name}: error {worst:.3g} > {bound:.3g}"


_BASE = Case("plain")
_FULL = P(0.2, causal=True, window_left=19, softcap=3.0, dropout_p=0.2, q_offset=16, head_offset=5)

CASES = (
    _BASE,
    Case("causal-top-left", params=P(0.3, causal=True)),
    Case("causal-bottom-right", params=P(0.3, causal=True, q_offset=16)),
    Case("causal-more-rows", rows=53, columns=37, params=P(0.3, causal=True)),
    Case("empty-rows", rows=53, columns=37, params=P(0.3, causal=True, q_offset=-16)),
    Case("empty-rows-sinks", rows=53, columns=37, sinks=True, params=P(0.3, True, q_offset=-16)),
    Case("past-the-keys", params=P(0.3, window_left=5, q_offset=49)),
    Case("window-left", params=P(0.3, causal=True, window_left=7, q_offset=16)),
    Case("window-both", params=P(0.3, window_left=7, window_right=4)),
    Case("window-right", params=P(0.3, window_right=9)),
    Case("window-zero", params=P(0.3, window_left=0, window_right=0)),
    Case("window-that-hides-nothing", params=P(0.3, window_left=40, window_right=60)),
    Case("softcap", params=P(0.9, softcap=1.5)),
    Case("sinks", sinks=True),
    Case("sinks-causal", sinks=True, params=P(0.3, causal=True)),
    Case("alibi", alibi_slopes=True, params=P(0.3, causal=True, q_offset=16)),
    Case("alibi-both-sides", alibi_slopes=True),
    Case("bias-full", bias_shape=(2, 6, 37, 53)),
    Case("bias-rows-columns", bias_shape=(37, 53)),
    Case("bias-heads", bias_shape=(6, 1, 53)),
    Case("bias-batch-columns", bias_shape=(2, 1, 1, 53)),
    Case("bias-rows", bias_shape=(1, 6, 37, 1), params=P(0.3, causal=True, softcap=2.0)),
    Case("bias-per-key", bias_shape=(53,)),
    Case("bias-scalar", bias_shape=()),
    Case("bias-bool", bias_shape=(2, 1, 37, 53), bias_dtype=torch.bool),
    Case("bias-bool-per-key", bias_shape=(2, 1, 1, 53), bias_dtype=torch.bool),
    Case("bias-bool-causal", bias_shape=(53,), bias_dtype=torch.bool, params=P(0.3, True)),
    Case("dropout", params=P(0.3, dropout_p=0.25)),
    Case("value-size", value_size=7),
    Case("mqa", kv_heads=1, params=P(0.3, causal=True)),
    Case("no-groups", kv_heads=6, params=P(0.3, causal=True)),
    Case("one-row", rows=1, params=P(0.3, causal=True, q_offset=52)),
    Case("one-column", columns=1),
    Case("negative-scale", params=P(-0.4, causal=True)),
    Case("zero-scale", params=P(0.0, causal=True)),
    Case("packed", batch=1, rows=53, cu_seqlens=(0, 11, 12, 12, 41, 53), params=P(0.3, True)),
    Case("packed-both-ways", batch=1, rows=53, cu_seqlens=(0, 20, 53)),
    Case(
        "packed-with-everything",
        batch=1,
        rows=53,
        cu_seqlens=(0, 0, 30, 53, 53),
        params=_FULL,
        bias_shape=(6, 53, 53),
        sinks=True,
        alibi_slopes=True,
    ),
    Case(
        "everything",
        value_size=9,
        params=_FULL,
        bias_shape=(6, 37, 53),
        sinks=True,
        alibi_slopes=True,
    ),
    Case("all-sizes-equal", batch=8, q_heads=8, kv_heads=8, rows=8, columns=8, size=8),
    Case(
        "all-sizes-equal-everything",
        batch=4,
        q_heads=4,
        kv_heads=4,
        rows=4,
        columns=4,
        size=4,
        bias_shape=(4, 1),
        sinks=True,
        alibi_slopes=True,
        params=P(0.5, causal=True, window_left=2, softcap=2.0, dropout_p=0.3),
    ),
)
