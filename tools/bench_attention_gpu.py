"""Attention kernels on one GPU, side by side, where libraries have one too: TFLOP/s.

    python -m fxport.tools.bench_attention_gpu [ceilings] [libraries] [shapes] [lengths] [sweep]
                                               [--flex] [--flash-3]

* ceilings: copy bandwidth and bf16 matrix product, to read the rest against;
* libraries: forward and backward, bf16, causal, 16,384 tokens in all, by PyTorch's flash and cuDNN
  kernels, FlexAttention (with --flex, at two lengths: each is compiled), FlashAttention-3
  (with --flash-3; vLLM's, forward only), our Triton kernels, and what `fxport::attention`
  chooses, called as a model's graph calls it;
* shapes: the same at other head sizes, with grouped heads, without causality, in float16;
* lengths: what the first call at a length never seen costs;
* sweep: other block shapes for our kernels, to check `fxport.ops.triton.config` against.

Operations are counted as everybody does: 4 B H Tq Tk D forward, 2.5 times that backward, half of it
when causal, whatever a kernel recomputes. Times are medians by CUDA events with a cold L2 cache.
What no library covers: `fxport.tools.bench_features_gpu`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
from tabulate import tabulate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from fxport.ops import attention, dispatch
from fxport.ops.params import AttentionParams
from fxport.ops.triton import attention as triton_attention
from fxport.ops.triton import config as triton_config
from fxport.ops.triton import gluon
from fxport.ops.triton.call import launches_of
from fxport.ops.triton.config import Blocks

__all__ = ["ceilings", "main", "milliseconds"]

_TOKENS = 16384
_WIDTH = 2048  # query heads * head size
_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_FLEX_LENGTHS = (2048, 8192)
_NOTHING = (None,) * 5  # bias, sinks, alibi_slopes, cu_seqlens, seed
_QKV = (True, True, True, False, False, False)


@dataclass(frozen=True)
class _Shape:
    """One row of a table; `groups`: query heads per key head."""

    size: int
    length: int
    causal: bool = True
    groups: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def params(self) -> AttentionParams:
        return AttentionParams(scale=1 / math.sqrt(self.size), causal=self.causal)

    def inputs(self) -> list[Tensor]:
        """q, k, v and out's gradient, laid out [B, T, H, D] as a model makes them."""
        heads = _WIDTH // self.size
        return [
            torch.randn(
                _TOKENS // self.length, self.length, n, self.size, device="cuda", dtype=self.dtype
            ).transpose(1, 2)
            for n in (heads, heads // self.groups, heads // self.groups, heads)
        ]

    def work(self) -> float:
        """Operations of a forward pass."""
        pairs = _TOKENS * self.length / (2 if self.causal else 1)
        return 4 * pairs * (_WIDTH // self.size * self.size)


_OTHER_SHAPES = (
    *(_Shape(size, 2048) for size in (32, 80, 96, 192)),
    *(_Shape(128, length, groups=4) for length in (512, 2048, 8192)),
    *(_Shape(64, length, groups=8) for length in (512, 4096)),
    *(_Shape(128, length, causal=False) for length in (256, 1024, 8192)),
    *(_Shape(128, length, dtype=torch.float16) for length in (512, 4096)),
)


def milliseconds(call: Callable[[], object], warmup: int = 25, rep: int = 100) -> float:
    """Median time of a call."""
    return float(do_bench(call, warmup=warmup, rep=rep, return_mode="median"))


def ceilings() -> None:
    """Print copy bandwidth (read plus written) and the rate of a bf16 matrix product."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e9
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9
    print(f"copy {copied:.2f} TB/s, bf16 matrix product 8192^3 {product:.0f} TFLOP/s\n", flush=True)


# -- libraries -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Passes:
    """One implementation on given inputs.

    Attributes:
        forward: runs the forward pass and returns out.
        backward: runs the backward pass on what a forward pass left; None: there is none.
    """

    forward: Callable[[], Tensor]
    backward: Callable[[], object] | None


def _by_autograd(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> _Passes:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return _Passes(forward, lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))


def _sdpa(backend: SDPBackend) -> Callable[[_Shape, list[Tensor], Tensor], _Passes]:
    def make(shape: _Shape, inputs: list[Tensor], grad: Tensor) -> _Passes:
        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=shape.causal, enable_gqa=shape.groups > 1
                )

        return _by_autograd(function, inputs, grad)

    return make


def _flex(shape: _Shape, inputs: list[Tensor], grad: Tensor) -> _Passes:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, mask = shape.length, None
    if shape.causal:
        mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, length, length, "cuda")
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(q, k, v, block_mask=mask, enable_gqa=shape.groups > 1)
        assert isinstance(out, Tensor)
        return out

    return _by_autograd(function, inputs, grad)


def _flash_3(shape: _Shape, inputs: list[Tensor], grad: Tensor) -> _Passes:
    """FlashAttention-3 as vLLM carries it: packed sequences, forward only."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    torch.backends.cuda.enable_cudnn_sdp(True)  # importing vLLM switches it off
    batch = _TOKENS // shape.length
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in inputs)
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * shape.length

    def forward() -> Tensor:
        out = flash_attn_varlen_func(
            q, k, v, shape.length, starts, shape.length, starts, causal=shape.causal, fa_version=3
        )
        assert isinstance(out, Tensor)
        return out.unflatten(0, (batch, shape.length)).transpose(1, 2)

    return _Passes(forward, None)


def _ours(shape: _Shape, inputs: list[Tensor], grad: Tensor) -> _Passes:
    q, k, v = inputs
    out, lse = triton_attention.forward(q, k, v, *_NOTHING, shape.params)

    def backward() -> object:
        return triton_attention.backward(
            grad, None, q, k, v, out, lse, *_NOTHING, shape.params, _QKV
        )

    return _Passes(lambda: triton_attention.forward(q, k, v, *_NOTHING, shape.params)[0], backward)


def _dispatched(shape: _Shape, inputs: list[Tensor], grad: Tensor) -> _Passes:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, params=shape.params)[0]

    return _by_autograd(function, inputs, grad)


def _rates(passes: _Passes, shape: _Shape) -> tuple[float, float]:
    """TFLOP/s forward and backward; NaN where there is no backward."""
    work = shape.work()
    forward = work / milliseconds(passes.forward) / 1e9
    if passes.backward is None:
        return forward, math.nan
    return forward, 2.5 * work / milliseconds(passes.backward) / 1e9


def _makers(
    flex: bool, flash_3: bool = False
) -> dict[str, Callable[[_Shape, list[Tensor], Tensor], _Passes]]:
    return {
        "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
        **({"FlexAttention": _flex} if flex else {}),
        **({"FlashAttention-3": _flash_3} if flash_3 else {}),
        "our Triton": _ours,
        "fxport::attention": _dispatched,
    }


def table(shapes: Iterator[_Shape], flex: bool, flash_3: bool) -> None:
    """Print rates, and what the dispatcher chose; check on the way that all compute the same."""
    makers = _makers(flex, flash_3)
    rows: list[list[object]] = []
    for shape in shapes:
        *inputs, grad = shape.inputs()
        want = _sdpa(SDPBackend.FLASH_ATTENTION)(shape, inputs, grad).forward()
        cells: list[str] = []
        before = dispatch.calls.copy()
        for name, make in makers.items():
            if make is _flex and shape.length not in _FLEX_LENGTHS:
                cells.append("")
                continue
            try:
                passes = make(shape, inputs, grad)
            except (RuntimeError, OutOfResources) as error:  # the library does not take the shape
                print(f"{name} {shape}: {str(error).splitlines()[0]}")
                cells.append("-")
                continue
            torch.testing.assert_close(passes.forward(), want, rtol=3e-2, atol=3e-2)
            rates = _rates(passes, shape)
            cells.append(" / ".join(f"{rate:.0f}" for rate in rates if not math.isnan(rate)))
        ran = ", ".join(sorted(dispatch.calls - before))
        kind = ("" if shape.causal else "full ") + str(shape.dtype).removeprefix("torch.")
        rows.append([shape.size, shape.length, kind, shape.groups, *cells, ran])
    print("TFLOP/s forward / backward\n")
    headers = ["D", "T", "kind", "groups", *makers, "ran"]
    print(tabulate(rows, headers, tablefmt="github"), end="\n\n", flush=True)


def lengths(count: int = 8) -> None:
    """Print the wall time of the first call, forward and backward, at lengths never seen."""
    makers = {name: make for name, make in _makers(False).items() if name != "SDPA flash"}
    rows: list[list[object]] = []
    for name, make in makers.items():
        seconds = []
        for index in range(count):
            shape = replace(_Shape(128, 1024), length=1000 + 24 * index)
            *inputs, grad = shape.inputs()
            torch.cuda.synchronize()
            start = time.perf_counter()
            backward = make(shape, inputs, grad).backward
            assert backward is not None
            backward()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        rows.append([name, *(f"{1e3 * s:.1f}" for s in seconds)])
    print("ms of the first call, forward + backward, at one new length after another (D=128)\n")
    print(tabulate(rows, tablefmt="github"), end="\n\n", flush=True)


# -- sweep ---------------------------------------------------------------------------------------

_CANDIDATES: dict[str, dict[int, list[Blocks]]] = {
    "forward": {
        64: [Blocks(64, 128, 4, 2), Blocks(128, 128, 8, 3), Blocks(128, 64, 4, 3)],
        128: [
            Blocks(128, 64, 4, 2), Blocks(128, 128, 8, 3), Blocks(128, 128, 8, 2),
            Blocks(128, 64, 8, 3),
        ],
        256: [Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 3), Blocks(64, 64, 4, 2)],
    },
    "key": {
        64: [Blocks(64, 64, 4, 3), Blocks(128, 64, 4, 2), Blocks(64, 128, 8, 3)],
        128: [Blocks(64, 64, 4, 2), Blocks(64, 128, 8, 3), Blocks(64, 128, 8, 2)],
        256: [Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 4), Blocks(32, 64, 8, 2)],
    },
    "query": {
        64: [Blocks(128, 64, 4, 3), Blocks(64, 128, 4, 3), Blocks(128, 64, 8, 3)],
        128: [Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2), Blocks(128, 64, 8, 2)],
        256: [Blocks(128, 32, 8, 2), Blocks(128, 16, 8, 3)],
    },
}  # fmt: skip


@contextmanager
def _instead(kernel: str, size: int, blocks: Blocks) -> Iterator[None]:
    """Another entry in the table for a while, and no kernels that have no entry."""
    line = triton_config.HALF[kernel]
    usual, refuses = line[size], gluon.refuses
    line[size], gluon.refuses = blocks, lambda call: "the table is measured"
    launches_of.cache_clear()
    try:
        yield
    finally:
        line[size], gluon.refuses = usual, refuses
        launches_of.cache_clear()


def sweep(length: int = 8192) -> None:
    """Print the rate with each candidate; "query" and "key" both show the whole backward pass."""
    rows: list[list[object]] = []
    for kernel, sizes in _CANDIDATES.items():
        for size, candidates in sizes.items():
            shape = _Shape(size, length)
            *inputs, grad = shape.inputs()
            for blocks in candidates:
                with _instead(kernel, size, blocks):
                    try:
                        forward, backward = _rates(_ours(shape, inputs, grad), shape)
                    except OutOfResources as error:
                        rows.append([kernel, size, blocks, str(error)[:60]])
                        continue
                rate = forward if kernel == "forward" else backward
                rows.append([kernel, size, blocks, f"{rate:.0f}"])
    print(f"TFLOP/s by block shape, bf16, causal, T={length}\n")
    headers = ["kernel", "D", "blocks", "TFLOP/s"]
    print(tabulate(rows, headers, tablefmt="github"), end="\n\n", flush=True)


def main() -> None:
    """Print the parts asked for, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parts = ("ceilings", "libraries", "shapes", "lengths", "sweep")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; default: all")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too")
    parser.add_argument("--flash-3", action="store_true", help="vLLM's FlashAttention-3 too")
    parser.add_argument("--lengths", default=",".join(map(str, _LENGTHS)), help="of `libraries`")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    wanted = arguments.parts or parts
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{name}, {versions}, cuDNN {torch.backends.cudnn.version()}\n", flush=True)
    if "ceilings" in wanted:
        ceilings()
    if "libraries" in wanted:
        chosen = [int(n) for n in arguments.lengths.split(",")]
        shapes = (_Shape(size, n) for size in (64, 128, 256) for n in chosen)
        table(shapes, arguments.flex, arguments.flash_3)
    if "shapes" in wanted:
        table(iter(_OTHER_SHAPES), arguments.flex, arguments.flash_3)
    if "lengths" in wanted:
        lengths()
    if "sweep" in wanted:
        sweep()


if __name__ == "__main__":
    main()
