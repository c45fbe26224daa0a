"""The tests of the Triton kernels, on a GPU or in Triton's interpreter; see test_triton_attention.

Not collected by its name: the kernels are bound to a GPU or to the interpreter when they are
imported, which `test_triton_attention` arranges.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from attention_cases import CASES, Case, assert_same, make, run
from torch import Tensor

from fxport.ops.dropout import keep_mask
from fxport.ops.facts import Facts
from fxport.ops.params import AttentionParams
from fxport.ops.reference import reference_attention
from fxport.ops.triton import attention as triton_attention
from fxport.ops.triton.config import group_parts

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
P = AttentionParams
# the interpreter's tl.dot multiplies the bit patterns of bfloat16: only a GPU can tell
HALVES = (torch.float16, torch.bfloat16) if GPU else (torch.float16,)
ROUNDING = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_FULL = P(
    0.2, causal=True, window_left=300, softcap=3.0, dropout_p=0.2, q_offset=128, head_offset=5
)

# the bias gets its gradient before the softcap's derivative, and by query head
PER_KEY = Case(
    "bias-per-key-everything",
    params=P(0.3, causal=True, softcap=3.0, dropout_p=0.2, q_offset=16),
    bias_shape=(2, 1, 1, 53),
    sinks=True,
    alibi_slopes=True,
)
# rows of the bias that bulk copies can address (4 divides 52); its gradient is written where dq is
# made if one or few batches share it, else by a kernel of its own
TILES = (
    Case("bias-tiles", columns=52, bias_shape=(2, 6, 37, 52), params=P(0.3, True, 9, q_offset=16)),
    Case("bias-tiles-bool", columns=64, bias_shape=(2, 1, 37, 64), bias_dtype=torch.bool),
    Case(
        "bias-tiles-shared",
        columns=52,
        bias_shape=(6, 37, 52),
        params=P(0.3, True, softcap=3.0, dropout_p=0.2, q_offset=9),
        sinks=True,
        alibi_slopes=True,
    ),
    Case(
        "bias-tiles-shared-by-many",
        batch=9,
        q_heads=2,
        kv_heads=1,
        rows=33,
        columns=40,
        size=8,
        bias_shape=(2, 33, 40),
    ),
)
# several blocks of the size that a GPU gets, none of them full at the end
LARGE = (
    Case("large-dense", rows=389, columns=517, size=64),
    Case("large-causal", rows=517, columns=517, size=128, params=P(0.1, causal=True)),
    Case("large-offset", rows=389, columns=517, size=80, params=P(0.1, True, q_offset=128)),
    Case("large-window", rows=517, columns=517, size=64, params=P(0.1, True, window_left=200)),
    Case("large-both-sides", rows=517, columns=389, size=64, params=P(0.1, False, 150, 70)),
    Case("large-256", batch=1, rows=300, columns=333, size=256, params=P(0.06, True, q_offset=33)),
    Case("large-bias", rows=389, columns=517, size=64, bias_shape=(1, 6, 389, 517)),
    Case("large-bias-128", rows=389, columns=517, size=128, bias_shape=(1, 6, 389, 517)),
    Case(
        "large-bias-float32",
        rows=389,
        columns=517,
        size=128,
        bias_shape=(1, 6, 389, 517),
        bias_dtype=torch.float32,
    ),
    Case(
        "large-bool-128",
        rows=389,
        columns=528,
        size=128,
        bias_shape=(1, 6, 389, 528),
        bias_dtype=torch.bool,
    ),
    *(
        Case(
            f"large-bias-tiles-{size}-{served}-{dtype}",
            batch=batch,
            rows=389,
            columns=520,
            size=size,
            bias_shape=(batch // served, 6, 389, 520),
            bias_dtype=dtype,
            params=P(1 / math.sqrt(size), causal=True, q_offset=128),
        )
        for size, batch, served, dtype in (
            (64, 2, 1, None),
            (64, 2, 2, torch.float32),
            (128, 2, 1, None),
            (128, 2, 1, torch.float32),
            (128, 2, 2, None),
            (128, 3, 3, torch.float32),
            (256, 2, 1, torch.float32),
            (256, 1, 1, None),
        )
    ),
    # a launch for each batch, each of which fills a GPU
    *(
        Case(
            f"large-bias-added-{size}-{dtype}",
            batch=3,
            q_heads=12,
            kv_heads=6,
            rows=1421,
            columns=1424,
            size=size,
            bias_shape=(12, 1421, 1424),
            bias_dtype=dtype,
            params=P(1 / math.sqrt(size), causal=True, window_left=1000, q_offset=3),
        )
        for size, dtype in ((64, torch.float32), (128, None), (128, torch.float32))
    ),
    # what takes most of the shared memory at this size
    Case("large-256-dropout", rows=300, columns=333, size=256, params=P(0.06, dropout_p=0.2)),
    Case(
        "large-256-crowded",
        batch=1,
        rows=333,
        columns=333,
        size=256,
        params=P(0.06, True, window_left=200, softcap=3.0, dropout_p=0.2),
        bias_shape=(333,),
        sinks=True,
        alibi_slopes=True,
        cu_seqlens=(0, 100, 333),
    ),
    Case("large-256-packed", batch=1, rows=333, columns=333, size=256, cu_seqlens=(0, 100, 333)),
    Case("large-256-window", rows=517, columns=517, size=256, params=P(0.06, True, 200)),
    Case("large-256-slopes", rows=300, columns=333, size=256, alibi_slopes=True),
    Case(
        "large-bias-tiles-bool",
        rows=389,
        columns=528,
        size=128,
        bias_shape=(389, 528),
        bias_dtype=torch.bool,
    ),
    Case("large-bias-per-key", rows=389, columns=517, size=64, bias_shape=(2, 1, 1, 517)),
    Case("large-mqa", q_heads=8, kv_heads=1, rows=517, columns=517, size=64, params=P(0.1, True)),
    Case(
        "large-packed",
        batch=1,
        rows=517,
        columns=517,
        size=64,
        cu_seqlens=(0, 100, 100, 300, 517),
        params=P(0.1, causal=True),
    ),
    Case(
        "large-everything",
        rows=389,
        columns=517,
        size=72,
        value_size=40,
        params=_FULL,
        bias_shape=(6, 389, 517),
        sinks=True,
        alibi_slopes=True,
    ),
    *(
        Case(
            f"large-everything-{name}",
            rows=389,
            columns=520,
            size=size,
            params=_FULL,
            bias_shape=(2, 6, 389, 520),
            bias_dtype=torch.float32,
            sinks=True,
            alibi_slopes=True,
        )
        for name, size in (("256", 256), ("tiles", 128))
    ),
    Case(
        "large-everything-128",
        rows=389,
        columns=517,
        size=128,
        params=_FULL,
        bias_shape=(6, 389, 517),
        bias_dtype=torch.float32,
        sinks=True,
        alibi_slopes=True,
    ),
)


class _Function(torch.autograd.Function):
    """The kernels' forward and backward joined, without dispatch."""

    @staticmethod
    def forward(ctx: Any, params: AttentionParams, *tensors: Any) -> Any:
        out, lse = triton_attention.forward(*tensors, params)
        ctx.params = params
        ctx.save_for_backward(*tensors, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor | None) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        q, k, v, *rest = tensors
        needs = tuple(ctx.needs_input_grad[1:7])
        grads = triton_attention.backward(d_out, d_lse, q, k, v, out, lse, *rest, ctx.params, needs)
        assert [g is not None for g in grads] == list(needs)
        for grad, x in zip(grads, tensors, strict=False):
            assert grad is None or (grad.shape == x.shape and grad.dtype == x.dtype)
        return (None, *grads, None, None)


def ours(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The kernels on the device; arguments and results on the CPU."""
    *tensors, params = arguments
    moved = [None if x is None else x.to(DEVICE) for x in tensors]
    out, lse = _Function.apply(params, *moved)
    return out.cpu(), lse.cpu()


def _against_reference(case: Case, dtype: torch.dtype, relative: float) -> None:
    arguments = make(case, dtype)
    want = run(reference_attention, arguments.to(torch.float64))
    got = run(ours, arguments)
    assert_same(got, want, relative)
    if GPU:  # launched as prepared by the first call: the same bits
        again = run(ours, arguments)
        assert all(torch.equal(again[name], got[name]) for name in got)


@pytest.mark.parametrize("case", (*CASES, PER_KEY, *TILES), ids=str)
def test_float32(case: Case) -> None:
    _against_reference(case, torch.float32, ROUNDING[torch.float32])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["window-left", "everything"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    case = next(c for c in CASES if c.name == name)
    _against_reference(case, dtype, ROUNDING[dtype])


@pytest.mark.skipif(not GPU, reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case, dtype: torch.dtype) -> None:
    _against_reference(case, dtype, ROUNDING[dtype])


@pytest.mark.parametrize("sizes", [(8, 8), (1, 3), (33, 64), (192, 128), (256, 256)])
def test_head_sizes(sizes: tuple[int, int]) -> None:
    case = Case(
        "sizes", batch=1, q_heads=2, kv_heads=1, rows=35, columns=18, size=sizes[0],
        value_size=sizes[1], params=P(1 / math.sqrt(sizes[0]), causal=True),
    )  # fmt: skip
    _against_reference(case, torch.float32, ROUNDING[torch.float32])


@pytest.mark.parametrize("seed", [0x0123_4567_89AB_CDEF, -3])
def test_dropout_bits(seed: int) -> None:
    """Equal weights and an identity for v: out shows which weights were kept."""
    rows, columns, p = 37, 48, 0.4
    q = torch.zeros(2, 3, rows, 16, device=DEVICE)
    k = torch.zeros(2, 3, columns, 16, device=DEVICE)
    v = torch.eye(columns, device=DEVICE).expand(2, 3, columns, columns)
    key = torch.tensor([seed], device=DEVICE)
    params = P(1.0, dropout_p=p, head_offset=7)
    out, _ = triton_attention.forward(q, k, v, None, None, None, None, key, params)
    want = keep_mask(key, p, range(2), range(7, 10), range(rows), range(columns))
    assert torch.equal(out > 0, want)
    torch.testing.assert_close(out[want], torch.full_like(out[want], 1 / (columns * (1 - p))))
    # dv sums the kept weights over the rows; that kernel's tiles are transposed
    ones = torch.ones_like(out)
    _, _, dv, *_ = triton_attention.backward(
        ones, None, q, k, v, out, torch.full_like(out[..., 0], math.log(columns)),
        None, None, None, None, key, params, (False, False, True, False, False, False),
    )  # fmt: skip
    assert dv is not None
    kept = want.sum(2)[..., None] / (columns * (1 - p))
    torch.testing.assert_close(dv, kept.expand_as(dv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_a_bias_in_tiles_gives_the_same_numbers(dtype: torch.dtype) -> None:
    """Bulk copies need aligned rows: the same numbers one element further on come by pointers."""
    arguments = make(
        Case("", columns=64, bias_shape=(6, 37, 64), bias_dtype=dtype, params=P(0.3, True)),
        torch.float32,
    )
    tensors = [None if x is None else x.detach().to(DEVICE) for x in arguments.tensors]
    bias = tensors[3]
    assert bias is not None
    further = torch.empty(bias.numel() + 1, dtype=dtype, device=DEVICE)[1:].view(bias.shape)
    needs = (True, True, True, dtype != torch.bool, False, False)
    found = []
    for given in (bias, further.copy_(bias)):
        tensors[3] = given
        q, k, v, *rest = tensors
        out, lse = triton_attention.forward(q, k, v, *rest, arguments.params)
        grads = triton_attention.backward(
            out, None, q, k, v, out, lse, *rest, arguments.params, needs
        )
        found.append([out, lse, *(x for x in grads if x is not None)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def _call(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    params = P(0.3, causal=True)
    none = (None,) * 5
    out, lse = triton_attention.forward(q, k, v, *none, params)
    needs = (True, True, True, False, False, False)
    grads = triton_attention.backward(grad, None, q, k, v, out, lse, *none, params, needs)
    return [out, lse, *(x for x in grads if x is not None)]


def test_any_strides_and_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(2)
    plain = [torch.randn(2, 3, 18, 24, generator=generator).to(DEVICE) for _ in range(4)]
    want = _call(*plain)
    again = _call(*plain)
    assert all(torch.equal(x, y) for x, y in zip(want, again, strict=True))
    for x in (want[0], *want[2:]):
        assert x.transpose(1, 2).is_contiguous()

    def strided(x: Tensor) -> Tensor:  # last stride is not 1
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    def misaligned(x: Tensor) -> Tensor:
        return torch.cat([x[..., :1], x], -1)[..., 1:]

    def heads_last(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    for change in (strided, misaligned, heads_last):
        changed = [change(x) for x in plain]
        assert not changed[0].is_contiguous()
        got = _call(*changed)
        assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True)), change.__name__
    shared = [x[:1].expand(2, -1, -1, -1) for x in plain]  # stride 0, as after .sum().backward()
    got, full = _call(*shared), _call(*(x.contiguous() for x in shared))
    assert all(torch.equal(x, y) for x, y in zip(got, full, strict=True))


def test_parts_of_a_group() -> None:
    """Few keys and many query heads: the group is cut into parts that are added up."""
    assert group_parts(2, 6, interpreted=True) == 6
    assert group_parts(3, 6, interpreted=True) == 3
    assert group_parts(300, 6, interpreted=False) == 1
    for columns in (17, 40):
        case = Case("parts", batch=1, kv_heads=1, columns=columns, params=P(0.3, True, q_offset=3))
        _against_reference(case, torch.float32, ROUNDING[torch.float32])


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
def test_masks_by_a_bias(lowest: float, sinks: bool) -> None:
    """A row of -inf has no weights (zeros); one of finfo.min or -1e9 is finite: equal weights.

    Their lse cannot say so: at 1e9 float32 has rounded log(n) away.
    """
    arguments = make(
        Case("", batch=1, rows=20, columns=20, bias_shape=(20, 20), sinks=sinks), torch.float32
    )
    bias = arguments.tensors[3]
    assert bias is not None
    with torch.no_grad():
        bias[:, 12:] = lowest
        bias[7] = lowest
    # the scores are rounded when finfo.min is added: the formula in float32, not in float64
    want = run(reference_attention, arguments, with_lse=False)
    assert_same(run(ours, arguments, with_lse=False), want, ROUNDING[torch.float32])


@pytest.mark.parametrize("shape", [(2, 1, 20, 20), (20,)])
def test_rows_that_a_bool_bias_empties(shape: tuple[int, ...]) -> None:
    case = Case("", rows=20, columns=20, bias_shape=shape, bias_dtype=torch.bool)
    arguments = make(case, torch.float32)
    bias = arguments.tensors[3]
    assert bias is not None
    bias[..., :] = False
    if len(shape) == 4:
        bias[1, :, :9, 3:] = True
    want = run(reference_attention, arguments.to(torch.float64))
    assert_same(run(ours, arguments), want, ROUNDING[torch.float32])


def test_only_the_gradients_asked_for() -> None:
    case = Case("needs", batch=1, alibi_slopes=True, bias_shape=(6, 1, 1), sinks=True)
    arguments = make(case, torch.float32)
    tensors = [None if x is None else x.detach().to(DEVICE) for x in arguments.tensors]
    out, lse = triton_attention.forward(*tensors, arguments.params)
    grad = torch.ones_like(out)

    def grads(needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        return triton_attention.backward(
            grad, None, *tensors[:3], out, lse, *tensors[3:], arguments.params, needs
        )

    everything = grads((True,) * 6)
    for index in range(6):
        alone = grads(tuple(i == index for i in range(6)))
        assert [x is not None for x in alone] == [i == index for i in range(6)]
        assert torch.equal(alone[index], everything[index])  # type: ignore[arg-type]


def test_refusals() -> None:
    def refusal(dtype: torch.dtype, size: int, rows: int = 4) -> str | None:
        q = torch.empty(1, 2, rows, size, dtype=dtype)
        facts = Facts.of(q, q, q, None, None, None, None, P(1.0))
        return triton_attention.refuses(facts)

    assert refusal(torch.bfloat16, 256) is None
    assert "float64" in (refusal(torch.float64, 64) or "")
    assert "head size" in (refusal(torch.bfloat16, 257) or "")
    assert "empty" in (refusal(torch.bfloat16, 64, rows=0) or "")


@pytest.mark.skipif(not GPU, reason="needs GBs")
def test_offsets_beyond_32_bits() -> None:
    """The last rows of a [1, 2, 9M, 128] call equal the same rows by themselves."""
    rows, window, tail = 9 * 2**20, 64, 256
    generator = torch.Generator(DEVICE).manual_seed(4)
    q, k, v = (
        torch.randn(
            1, rows, 2, 128, generator=generator, device=DEVICE, dtype=torch.bfloat16
        ).transpose(1, 2)
        for _ in range(3)
    )
    params = P(0.1, causal=True, window_left=window)
    none = (None,) * 5
    needs = (True, True, True, False, False, False)

    def both(*tensors: Tensor) -> list[Tensor]:
        out, lse = triton_attention.forward(*tensors, *none, params)
        grads = triton_attention.backward(out, None, *tensors, out, lse, *none, params, needs)
        return [out, *(x for x in grads if x is not None)]

    whole = both(q, k, v)
    part = both(*(x[:, :, -tail:] for x in (q, k, v)))
    for got, want in zip(whole, part, strict=True):
        error = (got[:, :, -tail + window :] - want[:, :, window:]).float()
        assert error.norm() <= 1e-2 * want.float().norm()


@pytest.mark.skipif(not GPU, reason="measures GPU memory")
def test_memory_is_linear() -> None:
    """With a learned bias per key, backward stays far below one [T, T] tensor."""
    length = 8192
    q, k, v = (torch.randn(1, 4, length, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(1, 1, 1, length, device=DEVICE)
    params = P(0.125, causal=True)
    none = (None,) * 4
    out, lse = triton_attention.forward(q, k, v, bias, *none, params)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    needs = (True, True, True, True, False, False)
    triton_attention.backward(out, None, q, k, v, out, lse, bias, *none, params, needs)
    assert torch.cuda.max_memory_allocated() - before < length * length * 2 // 4


@pytest.mark.skipif(not GPU, reason="threads have a CUDA context of their own")
def test_in_new_threads() -> None:
    """A thread of autograd's may start with our kernels, without any other CUDA call before."""
    q, k, v = (torch.randn(2, 4, 300, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    none, params = (None,) * 5, P(0.125, causal=True)
    needs = (True, True, True, False, False, False)

    def both() -> list[Tensor | None]:
        out, lse = triton_attention.forward(q, k, v, *none, params)
        return [out, *triton_attention.backward(q, None, q, k, v, out, lse, *none, params, needs)]

    want = both()
    del want[1:]
    torch.cuda.synchronize()
    both()  # leaves its memory to the thread, which would get a context by allocating
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(both).result()
    assert want[0] is not None and got[0] is not None
    assert torch.equal(got[0], want[0])
