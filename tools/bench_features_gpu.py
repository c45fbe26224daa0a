"""Attention that no library covers in both directions, on one GPU: milliseconds and peak memory.

    python -m fxport.tools.bench_features_gpu [--length 8192] [--only NAME ...]
                                              [--against flex,flash,dense]

Forward and backward of one causal call in bf16 (B = 2, 8 heads of 128; packed: B = 1, 16 heads) by
`fxport::attention`, by FlexAttention (with its Triton kernels; "flash": with those of the package
flash-attn-4) and by the dense formula, all but the first under ``torch.compile`` with fixed
shapes. All results are compared with ours before anything is timed; the table says where one
differs by more than rounding. Medians by CUDA events with a cold L2 cache; memory is what a call
needs on top of its inputs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    create_block_mask,
    flex_attention,
)

from fxport.ops import attention, dispatch
from fxport.ops.params import AttentionParams
from fxport.tools.bench_attention_gpu import ceilings, milliseconds

__all__ = ["Backend", "main"]

Backend = Literal["TRITON", "FLASH"]  # FlexAttention's

_SIZE = 128
_ROUNDING = 1e-2  # bf16, of the norm
_NAMES = {"flex": "FlexAttention", "flash": "FlexAttention, FLASH", "dense": "dense, compiled"}
_FLEX_BACKENDS: dict[str, Backend] = {"flex": "TRITON", "flash": "FLASH"}
_PLAIN = AttentionParams(scale=1 / math.sqrt(_SIZE), causal=True)


@dataclass(frozen=True)
class _Feature:
    """One causal call: its tensors beside q, k, v, and its numbers."""

    name: str
    params: AttentionParams = _PLAIN
    batch: int = 2
    heads: int = 8
    bias: Tensor | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def learned(self) -> list[Tensor]:
        """What wants a gradient beside q, k and v."""
        return [x for x in (self.bias, self.sinks, self.slopes) if x is not None]

    def with_learned(self, tensors: list[Tensor]) -> _Feature:
        """The same call with other tensors in the places of `learned`."""
        names = [n for n in ("bias", "sinks", "slopes") if getattr(self, n) is not None]
        return replace(self, **dict(zip(names, tensors, strict=True)))  # type: ignore[arg-type]


def _features(length: int) -> list[_Feature]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    borders = [0, *(length * n // 16 for n in (1, 2, 4, 5, 8, 9, 13)), length]
    cu_seqlens = torch.tensor(borders, device="cuda", dtype=torch.int32)
    window = replace(_PLAIN, window_left=1023)
    return [
        _Feature("nothing"),
        _Feature("window 1024", window),
        _Feature("softcap 30", replace(_PLAIN, softcap=30.0)),
        _Feature("sinks", sinks=torch.randn(8, device="cuda")),
        _Feature("window 1024, sinks", window, sinks=torch.randn(8, device="cuda")),
        _Feature("ALiBi, slopes learned", slopes=torch.rand(8, device="cuda") / 8),
        _Feature("bias [1, H, T, T] learned", bias=normal(1, 8, length, length)),
        _Feature("bias [B, 1, 1, T] learned", bias=normal(2, 1, 1, length)),
        _Feature("packed, 8 sequences", batch=1, heads=16, cu_seqlens=cu_seqlens),
    ]


def _ours(q: Tensor, k: Tensor, v: Tensor, f: _Feature) -> Tensor:
    return attention(
        q, k, v, bias=f.bias, sinks=f.sinks, alibi_slopes=f.slopes, cu_seqlens=f.cu_seqlens,
        params=f.params,
    )[0]  # fmt: skip


def _segments(f: _Feature, length: int) -> Tensor | None:
    if f.cu_seqlens is None:
        return None
    token = torch.arange(length, device="cuda", dtype=torch.int32)
    return torch.bucketize(token, f.cu_seqlens[1:-1], right=True)


def _dense(q: Tensor, k: Tensor, v: Tensor, f: _Feature) -> Tensor:
    """As a model writes it out: products in bf16, softmax in float32."""
    length = q.shape[2]
    position = torch.arange(length, device=q.device)
    distance = position - position[:, None]
    scores = (q @ k.mT).float() * f.params.scale
    if f.params.softcap:
        scores = f.params.softcap * torch.tanh(scores / f.params.softcap)
    if f.bias is not None:
        scores = scores + f.bias
    if f.slopes is not None:
        scores = scores + f.slopes[:, None, None] * distance
    hidden = distance > 0
    if f.params.window_left >= 0:
        hidden = hidden | (distance < -f.params.window_left)
    if (segment := _segments(f, length)) is not None:
        hidden = hidden | (segment != segment[:, None])
    scores = scores.masked_fill(hidden, -torch.inf)
    if f.sinks is not None:
        sink = f.sinks[:, None, None].expand(*q.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    return scores.softmax(-1)[..., :length].to(q.dtype) @ v


def _flex(
    length: int, f: _Feature, backend: Backend
) -> Callable[[Tensor, Tensor, Tensor, _Feature], Tensor]:
    """FlexAttention with the block mask made beforehand, as a model would keep it."""
    segment, left = _segments(f, length), f.params.window_left

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed = j <= i
        if left >= 0:
            allowed = allowed & (i - j <= left)
        if segment is not None:
            allowed = allowed & (segment[i] == segment[j])
        return allowed

    mask = create_block_mask(seen, None, None, length, length, "cuda")

    def function(q: Tensor, k: Tensor, v: Tensor, g: _Feature) -> Tensor:
        bias, slopes, cap = g.bias, g.slopes, g.params.softcap

        def change(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if cap:
                s = cap * torch.tanh(s / cap)
            if bias is not None:
                per_row = bias.shape[2] > 1
                s = s + (bias[0, h, i, j] if per_row else bias[b, 0, 0, j])
            if slopes is not None:
                s = s + slopes[h] * (j - i)
            return s

        plain = bias is None and slopes is None and not cap
        out, aux = flex_attention(
            q, k, v, None if plain else change, block_mask=mask, scale=g.params.scale,
            return_aux=AuxRequest(lse=True), kernel_options={"BACKEND": backend},
        )  # fmt: skip
        if g.sinks is not None and aux.lse is not None:  # one more column in the denominator
            share = torch.sigmoid(aux.lse - g.sinks[:, None])
            out = (out * share[..., None]).to(q.dtype)
        return out

    compiled: Callable[[Tensor, Tensor, Tensor, _Feature], Tensor] = torch.compile(
        function, dynamic=False
    )
    return compiled


def _training_call(
    function: Callable[[Tensor, Tensor, Tensor, _Feature], Tensor],
    leaves: list[Tensor],
    grad: Tensor,
    f: _Feature,
) -> tuple[Tensor, ...]:
    q, k, v, *learned = leaves
    out = function(q, k, v, f.with_learned(learned))
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def _measure(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds; GiB."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return milliseconds(call), peak


def _check(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest relative error of out and gradients."""
    worst = 0.0
    for x, y in zip(got, want, strict=True):
        worst = max(worst, ((x.float() - y.float()).norm() / y.float().norm()).item())
    return worst


def _function(
    name: str, length: int, f: _Feature
) -> Callable[[Tensor, Tensor, Tensor, _Feature], Tensor]:
    if name == "ours":
        return _ours
    if name == "dense":
        return torch.compile(_dense, dynamic=False)
    return _flex(length, f, _FLEX_BACKENDS[name])


def _row(f: _Feature, length: int, against: list[str]) -> list[object]:
    shape = (f.batch, length, f.heads, _SIZE)
    tensors = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)
    ]
    *qkv, grad = tensors
    leaves = [x.detach().requires_grad_() for x in (*qkv, *f.learned)]
    torch.compiler.reset()
    want: tuple[Tensor, ...] | None = None
    cells: list[object] = []
    times: list[float] = []
    before = dispatch.calls.copy()
    for name in ("ours", *against):
        try:
            call = partial(_training_call, _function(name, length, f), leaves, grad, f)
            got = call()
            want = want or got
            error = _check(got, want)
            ms, gib = _measure(call)
        except (RuntimeError, AssertionError, NotImplementedError) as problem:  # the table says so
            print(f"{f.name}, {name}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
            cells.append("failed")
            times.append(math.nan)
            continue
        times.append(ms)
        verdict = "" if error < _ROUNDING else f", WRONG by {error:.0e}"
        cells.append(f"{ms:.2f} ms, {gib:.2f} GiB{verdict}")
    ran = ", ".join(sorted(dispatch.calls - before))
    return [f.name, *cells, *(f"{t / times[0]:.2f}" for t in times[1:]), ran]


def main() -> None:
    """Print one line per feature."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--only", nargs="*", help="features whose name starts with one of these")
    parser.add_argument("--against", default="flex,dense", help="what else to time")
    arguments = parser.parse_args()
    against = [name for name in _NAMES if name in arguments.against.split(",")]
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    ceilings()
    rows = []
    for feature in _features(arguments.length):
        if not arguments.only or feature.name.startswith(tuple(arguments.only)):
            rows.append(_row(feature, arguments.length, against))
            print("|".join(map(str, rows[-1])), flush=True)
    columns = [_NAMES[name] for name in against]
    headers = ["", "fxport::attention", *columns, *(f"x {n}" for n in against)]
    print(f"\nforward + backward, bf16, causal, T={arguments.length}\n")
    print(tabulate(rows, [*headers, "ran"], tablefmt="github"))


if __name__ == "__main__":
    main()
