"""What `fxport::attention` chooses, against every installed library, on one GPU.

    python -m fxport.tools.bench_dispatcher_gpu [plain] [masks] [host] [--rounds 20]
                                [--sizes 64,128,256] [--flex] [--flex-flash]

* plain: bf16, causal, 16,384 tokens in all, and grouped heads, no causality, float16: PyTorch's
  flash and cuDNN kernels, FlashAttention-3 (vLLM's, forward only, and the package flash-attn-3 or
  xformers' copy) and FlashAttention-4 (the package flash-attn-4) where installed, our Triton
  kernels, the op;
* masks: a window, packed sequences, a chunk of rows against more columns: FlashAttention-3 (not
  for windows), FlashAttention-4, our Triton kernels, the op, and FlexAttention (at head size 128
  and 8,192 columns; with --flex its Triton kernels, with --flex-flash those of flash-attn-4);
* host: what a call costs the host, and where its time goes.

All implementations of a row are timed in turns, a cold L2 before each call, medians of `rounds`.
Each is timed twice: launched from Python ("eager") and replayed from a CUDA graph ("graph"), which
leaves the kernels alone. The last columns divide the op's rate by the best library's.
Operations are counted as in `fxport.tools.bench_attention_gpu`. Forward passes need no gradient:
SDPA leaves out lse then, which the op always returns.
"""

from __future__ import annotations

import argparse
import cProfile
import math
import pstats
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
import triton
from tabulate import tabulate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxport.ops import attention, dispatch, flash3, flash3_package, flash4
from fxport.ops.facts import Facts
from fxport.ops.params import AttentionParams
from fxport.ops.triton import attention as triton_attention
from fxport.tools.bench_attention_gpu import ceilings
from fxport.tools.bench_features_gpu import Backend

__all__ = ["main"]

_TOKENS, _WIDTH = 16384, 2048
_QKV = (True, True, True, False, False, False)
Call = Callable[[], object]


@dataclass(frozen=True)
class _Row:
    """One row of a table; `pairs` counts the (row, column) pairs of one head that are seen."""

    name: str
    size: int
    batch: int
    rows: int
    columns: int
    params: AttentionParams
    pairs: float
    groups: int = 1
    dtype: torch.dtype = torch.bfloat16
    cu_seqlens: Tensor | None = None

    @property
    def heads(self) -> int:
        return _WIDTH // self.size

    def inputs(self) -> list[Tensor]:
        """q, k, v and out's gradient, laid out [B, T, H, D] as a model makes them."""
        kv_heads = self.heads // self.groups
        shapes = [
            (self.rows, self.heads),
            (self.columns, kv_heads),
            (self.columns, kv_heads),
            (self.rows, self.heads),
        ]
        return [
            torch.randn(
                self.batch, length, n, self.size, device="cuda", dtype=self.dtype
            ).transpose(1, 2)
            for length, n in shapes
        ]

    def work(self) -> float:
        """Operations of a forward pass."""
        return 4 * self.batch * self.heads * self.pairs * self.size


def _plain(size: int, length: int, causal: bool = True, **changes: object) -> _Row:
    params = AttentionParams(scale=1 / math.sqrt(size), causal=causal)
    pairs = length**2 / (2 if causal else 1)
    name = "causal" if causal else "full"
    return _Row(name, size, _TOKENS // length, length, length, params, pairs, **changes)  # type: ignore[arg-type]


def _plain_rows(sizes: tuple[int, ...]) -> Iterable[_Row]:
    for size in sizes:
        for length in (128, 256, 512, 1024, 2048, 4096, 8192, 16384):
            yield _plain(size, length)
    if 128 not in sizes:
        return
    for length in (512, 2048, 8192):
        yield _plain(128, length, groups=4)
    yield _plain(64, 4096, groups=8)
    yield _plain(128, 1024, causal=False)
    yield _plain(128, 8192, causal=False)
    yield _plain(128, 512, dtype=torch.float16)
    yield _plain(128, 4096, dtype=torch.float16)


def _masked_rows(sizes: tuple[int, ...]) -> Iterable[_Row]:
    for size in sizes:
        scale = 1 / math.sqrt(size)
        causal = AttentionParams(scale, True)
        for length in (1024, 8192):
            count = _TOKENS // length
            for reach in (length // 8, length // 64) if size == 128 else (length // 8,):
                window = AttentionParams(scale, True, window_left=reach - 1)
                yield _Row(f"window {reach}", size, count, length, length, window, length * reach)
            borders = [0, *(length * n // 16 for n in (1, 2, 4, 5, 8, 9, 13)), length]
            cu_seqlens = torch.tensor(borders, device="cuda", dtype=torch.int32)
            pairs = sum((end - start) ** 2 / 2 for start, end in pairwise(borders))
            yield _Row("packed, 8", size, 1, length, length, causal, pairs, cu_seqlens=cu_seqlens)
            rows = length // 16
            late = AttentionParams(scale, True, q_offset=length - rows)
            pairs = rows * (length - rows / 2)
            yield _Row(f"last {rows} rows", size, 4 * count, rows, length, late, pairs)


# -- implementations -----------------------------------------------------------------------------


def _autograd(
    function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor
) -> tuple[Call, Call]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return forward, lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _sdpa(backend: SDPBackend, row: _Row, inputs: list[Tensor], grad: Tensor) -> tuple[Call, Call]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=row.params.causal, enable_gqa=row.groups > 1
            )

    return _autograd(function, inputs, grad)


def _flex(row: _Row, inputs: list[Tensor], grad: Tensor, backend: Backend) -> tuple[Call, Call]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    p, segment = row.params, None
    if row.cu_seqlens is not None:
        token = torch.arange(row.rows, device="cuda", dtype=torch.int32)
        segment = torch.bucketize(token, row.cu_seqlens[1:-1], right=True)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        a = i + p.q_offset
        allowed = j <= a
        if p.window_left >= 0:
            allowed = allowed & (a - j <= p.window_left)
        return allowed if segment is None else allowed & (segment[i] == segment[j])

    mask = create_block_mask(seen, None, None, row.rows, row.columns, "cuda")
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(q, k, v, block_mask=mask, kernel_options={"BACKEND": backend})
        assert isinstance(out, Tensor)
        return out

    return _autograd(function, inputs, grad)


def _directly(
    row: _Row, inputs: list[Tensor], grad: Tensor
) -> dict[str, tuple[Call | None, Call | None]]:
    """FlashAttention-3, FlashAttention-4 and our kernels, below the op."""
    q, k, v = inputs
    rest = (None, None, None, row.cu_seqlens, None, row.params)
    out, lse = triton_attention.forward(q, k, v, *rest)

    def backward() -> object:
        return triton_attention.backward(grad, None, q, k, v, out, lse, *rest, _QKV)

    found: dict[str, tuple[Call | None, Call | None]] = {}
    facts = Facts.of(q, k, v, None, None, None, row.cu_seqlens, row.params)
    if not (flash3._not_covered(facts) or flash3._not_installed()):
        found["FA3"] = (lambda: flash3.forward(q, k, v, *rest)[0], None)
    if not (flash3_package._not_covered(facts) or flash3_package._not_installed()):
        found["FA3, package"] = (
            lambda: flash3_package.forward(q, k, v, *rest)[0],
            lambda: flash3_package.backward(grad, None, q, k, v, out, lse, *rest, _QKV),
        )
    if not (flash4._not_covered(facts) or flash4._not_installed()):
        found["FA4"] = (
            lambda: flash4.forward(q, k, v, *rest)[0],
            lambda: flash4.backward(grad, None, q, k, v, out, lse, *rest, _QKV),
        )
    found["our Triton"] = (lambda: triton_attention.forward(q, k, v, *rest)[0], backward)
    return found


def _unless_it_refuses(
    name: str, make: Callable[[], tuple[Call, Call]]
) -> dict[str, tuple[Call | None, Call | None]]:
    try:
        forward, backward = make()
        forward()
        backward()
    except (RuntimeError, AssertionError, NotImplementedError) as refusal:
        print(f"{name}: {type(refusal).__name__}: {str(refusal)[:300]}", flush=True)
        return {}
    return {name: (forward, backward)}


def _implementations(
    row: _Row, flex: Sequence[Backend]
) -> dict[str, tuple[Call | None, Call | None]]:
    *inputs, grad = row.inputs()

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, cu_seqlens=row.cu_seqlens, params=row.params)[0]

    found: dict[str, tuple[Call | None, Call | None]] = {}
    if row.name in ("causal", "full"):
        found["SDPA flash"] = _sdpa(SDPBackend.FLASH_ATTENTION, row, inputs, grad)
        found["SDPA cuDNN"] = _sdpa(SDPBackend.CUDNN_ATTENTION, row, inputs, grad)
    elif row.size == 128 and row.columns > 1024:
        for backend in flex:
            made = partial(_flex, row, inputs, grad, backend)
            found |= _unless_it_refuses(f"Flex, {backend}", made)
    return {**found, **_directly(row, inputs, grad), "op": _autograd(op, inputs, grad)}


# -- timing --------------------------------------------------------------------------------------


def _captured(call: Call) -> Call:
    """Replays of the call's kernels, captured on the stream where its forward pass ran."""
    for _ in range(2):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


def _in_turns(calls: dict[str, Call], rounds: int, flush: Tensor) -> dict[str, float]:
    """Median milliseconds of each."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            call()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(a.elapsed_time(b) for a, b in pairs)
        for name, pairs in events.items()
    }


def _rates(
    row: _Row, flex: Sequence[Backend], rounds: int, flush: Tensor
) -> list[dict[str, float]]:
    """TFLOP/s by implementation: eager forward, eager backward, graph forward, graph backward."""
    made = _implementations(row, flex)
    want = next(f for f, _ in made.values() if f is not None)()
    assert isinstance(want, Tensor)
    for name, (forward, _) in made.items():
        got = forward() if forward else want
        assert isinstance(got, Tensor)
        error = ((got.float() - want.float()).norm() / want.float().norm()).item()
        if not error < 1e-2:
            print(f"!! {name} in {row.name}, {row.size}, {row.rows}: other result, {error:.1e}")
    results = []
    for graph in (False, True):
        for part, factor in ((0, 1.0), (1, 2.5)):
            calls = {n: pair[part] for n, pair in made.items() if pair[part] is not None}
            chosen = {n: _captured(c) if graph else c for n, c in calls.items() if c is not None}
            times = _in_turns(chosen, rounds, flush)
            results.append({n: factor * row.work() / ms / 1e9 for n, ms in times.items()})
    return results


def table(rows: Iterable[_Row], flex: Sequence[Backend], rounds: int) -> None:
    """Print rates, graph over eager, and the op's rate over the best library's."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    found: list[tuple[_Row, list[dict[str, float]], str]] = []
    for row in rows:
        before = dispatch.calls.copy()
        results = _rates(row, flex, rounds, flush)
        found.append((row, results, ", ".join(sorted(dispatch.calls - before))))
        print(_line(row, results, list(results[0]), found[-1][2]), flush=True)
        torch.cuda.empty_cache()
    names = list(dict.fromkeys(name for _, results, _ in found for name in results[0]))
    lines = [_line(row, results, names, ran) for row, results, ran in found]
    headers = ["D", "T", "kind", *names, "of best, graph", "of best, eager", "ran"]
    print("\nTFLOP/s forward / backward, replayed (and launched from Python)\n")
    print(tabulate(lines, headers, tablefmt="github"), end="\n\n", flush=True)


def _line(row: _Row, results: list[dict[str, float]], names: list[str], ran: str) -> list[object]:
    ratios = []
    for rates in results:
        libraries = [r for n, r in rates.items() if n not in ("op", "our Triton")]
        ratios.append(f"{rates['op'] / max(libraries):.2f}" if libraries else "-")
    eager_forward, eager_backward, forward, backward = results
    cells = [
        f"{_cell(forward, n)} / {_cell(backward, n)} "
        f"({_cell(eager_forward, n)} / {_cell(eager_backward, n)})"
        for n in names
    ]
    kind = row.name + (" f16" if row.dtype == torch.float16 else "")
    kind += f", {row.groups} a group" if row.groups > 1 else ""
    of_best = [" / ".join(ratios[2:]), " / ".join(ratios[:2])]
    return [row.size, row.rows, kind, *cells, *of_best, ran]


def _cell(rates: dict[str, float], name: str) -> str:
    return f"{rates[name]:.0f}" if name in rates else "-"


# -- the host's time -----------------------------------------------------------------------------


def _microseconds(call: Call, count: int = 300) -> float:
    """The host's time for a call whose kernels are shorter than that."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / count * 1e6


def host() -> None:
    """Print what calls on small inputs cost the host, and a profile of our Triton kernels'."""
    row = _Row("causal", 128, 1, 128, 128, AttentionParams(0.1, True), 128**2 / 2)
    lines = []
    made = _implementations(row, ())
    for name, pair in made.items():
        spent = [f"{_microseconds(call):.0f}" if call else "-" for call in pair]
        lines.append([name, *spent])
    print("microseconds of the host, D=128, T=128, B=1\n")
    print(tabulate(lines, ["", "forward", "backward"], tablefmt="github"), end="\n\n", flush=True)
    for part, which in enumerate(("forward", "backward")):
        call = made["our Triton"][part]
        assert call is not None
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(100):
            call()
        profile.disable()
        torch.cuda.synchronize()
        print(f"our Triton, {which}, 100 calls")
        pstats.Stats(profile).sort_stats("tottime").print_stats(22)


def main() -> None:
    """Print the parts asked for, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parts = ("plain", "masks", "host")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; default: all")
    for flag, backend in (("--flex", "TRITON"), ("--flex-flash", "FLASH")):
        parser.add_argument(
            flag, dest="flex", action="append_const", const=backend, default=[],
            help=f"FlexAttention in `masks`, backend {backend}",
        )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sizes", default="128,64,256", help="head sizes")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    wanted = arguments.parts or parts
    sizes = tuple(int(size) for size in arguments.sizes.split(","))
    torch.manual_seed(0)
    torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be captured
    name = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{name}, {versions}, cuDNN {torch.backends.cudnn.version()}", flush=True)
    print(f"FlashAttention-3: {flash3._not_installed() or 'from vLLM'}", flush=True)
    print(f"the package flash-attn-3: {flash3_package._not_installed() or 'installed'}", flush=True)
    print(f"FlashAttention-4: {flash4._not_installed() or 'installed'}\n", flush=True)
    ceilings()
    if "host" in wanted:
        host()
    if "plain" in wanted:
        table(_plain_rows(sizes), [], arguments.rounds)
    if "masks" in wanted:
        table(_masked_rows(sizes), arguments.flex, arguments.rounds)


if __name__ == "__main__":
    main()
