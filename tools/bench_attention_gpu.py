"""Attention kernels on one GPU, side by side: TFLOP/s, milliseconds, peak memory.

    python -m fxport.tools.bench_attention_gpu [ceilings] [libraries] [features] [sweep] [--flex]

* ceilings: copy bandwidth and bf16 matrix product, to read the rest against;
* libraries: forward and backward, bf16, causal, 16,384 tokens in all, by PyTorch's flash and cuDNN
  kernels, FlexAttention (with --flex: each length is compiled, which takes a while) and ours;
* features: what no library covers in both directions (learned bias, ALiBi slopes, sinks), forward
  and backward together at T = 8192, ours against the dense formula under `torch.compile`;
* sweep: other block shapes for our kernels, to check `fxport.ops.triton_config` against.

Operations are counted as everybody does: 4 B H Tq Tk D forward, 2.5 times that backward, half of it
when causal, whatever a kernel recomputes. Times are medians by CUDA events with a cold L2 cache.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from tabulate import tabulate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from fxport.ops import triton_attention, triton_config
from fxport.ops.params import AttentionParams
from fxport.ops.triton_config import Blocks

__all__ = ["main"]

_TOKENS = 16384
_WIDTH = 2048  # heads * head size
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
_NOTHING = (None,) * 5  # bias, sinks, alibi_slopes, cu_seqlens, seed


def _milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call."""
    return float(do_bench(call, warmup=50, rep=200, return_mode="median"))


def _fresh(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def ceilings() -> None:
    """Print copy bandwidth (read plus written) and the rate of a bf16 matrix product."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _milliseconds(lambda: target.copy_(source)) / 1e9
    a, b = _fresh(8192, 8192), _fresh(8192, 8192)
    product = 2 * 8192**3 / _milliseconds(lambda: a @ b) / 1e9
    print(f"copy {copied:.2f} TB/s, bf16 matrix product 8192^3 {product:.0f} TFLOP/s\n")


# -- libraries -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Passes:
    """One implementation on given inputs.

    Attributes:
        forward: runs the forward pass and returns out.
        backward: runs the backward pass on what a forward pass left.
    """

    forward: Callable[[], Tensor]
    backward: Callable[[], object]


def _by_autograd(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> _Passes:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return _Passes(forward, lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))


def _sdpa(backend: SDPBackend) -> Callable[[list[Tensor], Tensor], _Passes]:
    def make(inputs: list[Tensor], grad: Tensor) -> _Passes:
        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return _by_autograd(function, inputs, grad)

    return make


def _flex(inputs: list[Tensor], grad: Tensor) -> _Passes:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = inputs[0].shape[2]
    mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, length, length, device="cuda")
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(q, k, v, block_mask=mask)
        assert isinstance(out, Tensor)
        return out

    return _by_autograd(function, inputs, grad)


def _ours(inputs: list[Tensor], grad: Tensor) -> _Passes:
    q, k, v = inputs
    params = AttentionParams(scale=1 / math.sqrt(q.shape[3]), causal=True)
    needs = (True, True, True, False, False, False)
    out, lse = triton_attention.forward(q, k, v, *_NOTHING, params)

    def backward() -> object:
        return triton_attention.backward(grad, None, q, k, v, out, lse, *_NOTHING, params, needs)

    return _Passes(lambda: triton_attention.forward(q, k, v, *_NOTHING, params)[0], backward)


def _inputs(length: int, size: int) -> list[Tensor]:
    """q, k, v and out's gradient, laid out [B, T, H, D] as a model makes them."""
    shape = (_TOKENS // length, length, _WIDTH // size, size)
    return [_fresh(*shape).transpose(1, 2) for _ in range(4)]


def _rates(passes: _Passes, length: int, size: int) -> tuple[float, float]:
    """TFLOP/s forward and backward of a causal call."""
    work = 4 * _TOKENS * length * _WIDTH / 2
    return (
        work / _milliseconds(passes.forward) / 1e9,
        2.5 * work / _milliseconds(passes.backward) / 1e9,
    )


def libraries(flex: bool) -> None:
    """Print the table of rates; check on the way that all compute the same."""
    makers: dict[str, Callable[[list[Tensor], Tensor], _Passes]] = {
        "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    if flex:
        makers["FlexAttention"] = _flex
    makers["ours"] = _ours
    rows: list[list[object]] = []
    for size in (64, 128, 256):
        for length in _LENGTHS:
            *inputs, grad = _inputs(length, size)
            want = _sdpa(SDPBackend.FLASH_ATTENTION)(inputs, grad).forward()
            cells: list[str] = []
            for name, make in makers.items():
                try:
                    passes = make(inputs, grad)
                except (
                    RuntimeError,
                    OutOfResources,
                ) as error:  # the library does not take the shape
                    print(f"{name} D={size} T={length}: {str(error).splitlines()[0]}")
                    cells.append("-")
                    continue
                torch.testing.assert_close(passes.forward(), want, rtol=3e-2, atol=3e-2)
                forward, backward = _rates(passes, length, size)
                cells.append(f"{forward:.0f} / {backward:.0f}")
            rows.append([size, length, *cells])
    print("TFLOP/s forward / backward, bf16, causal\n")
    print(tabulate(rows, ["D", "T", *makers], tablefmt="github"), end="\n\n")


# -- features ------------------------------------------------------------------------------------


def _features(length: int, heads: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    yield "bias [1, H, T, T]", {"bias": _fresh(1, heads, length, length)}
    yield "bias [B, 1, 1, T]", {"bias": _fresh(2, 1, 1, length)}
    yield "ALiBi slopes", {"alibi_slopes": torch.rand(heads, device="cuda") / 8}
    yield "sinks", {"sinks": torch.randn(heads, device="cuda")}


def _training_call(
    inputs: tuple[Any, ...], grad: Tensor, params: AttentionParams, needs: tuple[bool, ...]
) -> object:
    """Forward and backward by our kernels; `inputs`: q, k, v, bias, sinks, slopes."""
    q, k, v, bias, sinks, slopes = inputs
    out, lse = triton_attention.forward(q, k, v, bias, sinks, slopes, None, None, params)
    return triton_attention.backward(
        grad, None, q, k, v, out, lse, bias, sinks, slopes, None, None, params, needs
    )


def _dense(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None,
    slopes: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Causal attention as a model writes it out: products in bf16, softmax in float32."""
    length = q.shape[2]
    position = torch.arange(length, device=q.device)
    distance = position - position[:, None]
    scores = (q @ k.mT).float() * scale
    if bias is not None:
        scores = scores + bias
    if slopes is not None:
        scores = scores + slopes[:, None, None] * distance
    scores = scores.masked_fill(distance > 0, -torch.inf)
    if sinks is not None:
        sink = sinks[:, None, None].expand(*q.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    return scores.softmax(-1)[..., :length].to(q.dtype) @ v


def _dense_call(
    dense: Callable[..., Tensor], leaves: list[Tensor | None], grad: Tensor, scale: float
) -> object:
    """Forward and backward by the dense formula."""
    out = dense(*leaves, scale)
    return torch.autograd.grad(out, [x for x in leaves if x is not None], grad)


def features() -> None:
    """Print times and peak memory of a training call against the compiled dense formula."""
    batch, length, heads, size = 2, 8192, 8, 128
    params = AttentionParams(scale=1 / math.sqrt(size), causal=True)
    rows: list[list[object]] = []
    for name, extra in _features(length, heads):
        q, k, v, grad = (_fresh(batch, length, heads, size).transpose(1, 2) for _ in range(4))
        bias, sinks, slopes = (extra.get(n) for n in ("bias", "sinks", "alibi_slopes"))
        inputs = (q, k, v, bias, sinks, slopes)
        needs = tuple(x is not None for x in inputs)
        ours = partial(_training_call, inputs, grad, params, needs)
        torch.compiler.reset()
        dense = torch.compile(_dense, dynamic=False)
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        formula = partial(_dense_call, dense, leaves, grad, params.scale)
        cells: list[str] = []
        times: list[float] = []
        for call in (ours, formula):
            call()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            times.append(_milliseconds(call))
            cells.append(f"{times[-1]:.2f} ms, {peak:.2f} GiB")
        rows.append([name, *cells, f"{times[1] / times[0]:.1f}"])
    print(f"forward + backward, bf16, causal, B={batch} T={length} H={heads} D={size}\n")
    print(tabulate(rows, ["", "ours", "dense, compiled", "times faster"], tablefmt="github"))
    print()


# -- sweep ---------------------------------------------------------------------------------------

_CANDIDATES: dict[str, dict[int, list[Blocks]]] = {
    "forward": {
        64: [Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 4), Blocks(64, 128, 4, 3)],
        128: [
            Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3),
            Blocks(64, 128, 4, 2),
        ],
        256: [Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 64, 4, 2)],
    },
    "key": {
        64: [Blocks(64, 128, 8, 3), Blocks(128, 128, 8, 2), Blocks(64, 64, 4, 3)],
        128: [Blocks(64, 128, 8, 2), Blocks(32, 128, 8, 3), Blocks(64, 64, 4, 2)],
        256: [Blocks(32, 64, 8, 2), Blocks(64, 64, 8, 2)],
    },
    "query": {
        64: [Blocks(128, 64, 8, 3), Blocks(128, 128, 8, 2), Blocks(64, 64, 4, 3)],
        128: [Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2)],
        256: [Blocks(128, 32, 8, 2), Blocks(64, 64, 8, 2)],
    },
}  # fmt: skip


@contextmanager
def _instead(kernel: str, size: int, blocks: Blocks) -> Iterator[None]:
    """Another entry in the table for a while."""
    line = triton_config.HALF[kernel]
    usual = line[size]
    line[size] = blocks
    try:
        yield
    finally:
        line[size] = usual


def sweep(length: int = 8192) -> None:
    """Print the rate with each candidate; "query" and "key" both show the whole backward pass."""
    rows: list[list[object]] = []
    for kernel, sizes in _CANDIDATES.items():
        for size, candidates in sizes.items():
            *inputs, grad = _inputs(length, size)
            for blocks in candidates:
                with _instead(kernel, size, blocks):
                    try:
                        forward, backward = _rates(_ours(inputs, grad), length, size)
                    except OutOfResources as error:
                        rows.append([kernel, size, blocks, str(error)[:60]])
                        continue
                rate = forward if kernel == "forward" else backward
                rows.append([kernel, size, blocks, f"{rate:.0f}"])
    print(f"TFLOP/s by block shape, bf16, causal, T={length}\n")
    print(tabulate(rows, ["kernel", "D", "blocks", "TFLOP/s"], tablefmt="github"), end="\n\n")


def main() -> None:
    """Print the parts asked for, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parts = ("ceilings", "libraries", "features", "sweep")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; default: all")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    wanted = arguments.parts or parts
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}\n")
    if "ceilings" in wanted:
        ceilings()
    if "libraries" in wanted:
        libraries(arguments.flex)
    if "features" in wanted:
        features()
    if "sweep" in wanted:
        sweep()


if __name__ == "__main__":
    main()
