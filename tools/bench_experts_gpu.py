"""A mixture's experts on one GPU: our kernels against torch's grouped product and vLLM's.

    python -m fxport.tools.bench_experts_gpu [ceilings] [check] [forward] [backward] [sweep] [one]

A gated MLP of every expert, ``down[e] @ (silu(gate[e] @ x) * (up[e] @ x))``, and the sum over each
token's experts; bf16, random experts. Shapes: a layer of Qwen3-30B-A3B and one of Mixtral-8x7B.
Replayed from CUDA graphs, median of 7; the weights are many times the L2 cache.

* ours: `fxport::expert_linear` twice, silu, product and sum each by a kernel of torch's;
* grouped_mm: the same with `torch.nn.functional.grouped_mm`, rows sorted and copied first;
* vllm: `fused_experts`, where vLLM is installed (forward only);
* read: what reading every chosen expert's weights once, and computing at the rate of a big matrix
  product, would take, whichever is longer.

``sweep`` times other block shapes of one product. ``one``: the first shape only.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from fxport.ops.experts import expert_linear
from fxport.ops.triton.experts import _Blocks, product

__all__ = ["main"]


@dataclass(frozen=True)
class _Shape:
    name: str
    experts: int
    chosen: int
    width: int
    hidden: int


_SHAPES = (_Shape("qwen3", 128, 8, 2048, 768), _Shape("mixtral", 8, 2, 4096, 14336))
_TOKENS = (1, 8, 64, 512, 4096, 16384)
_Linear = Callable[[Tensor, Tensor, Tensor], Tensor]


def _milliseconds(run: Callable[[], object], count: int = 5) -> float:
    """Median time, replayed from a graph of `count` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the inputs
    with torch.cuda.stream(stream):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(count):
                run()
        times = []
        for _ in range(9):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            times.append((begin, end))
        torch.cuda.synchronize()
    del graph
    return statistics.median(a.elapsed_time(b) / count for a, b in times[2:])


class _Case:
    """Weights, tokens and the experts that a router might choose."""

    def __init__(self, shape: _Shape, tokens: int) -> None:
        torch.manual_seed(tokens)
        made = {"device": "cuda", "dtype": torch.bfloat16}
        self.shape = shape
        self.x = torch.randn(tokens, shape.width, **made)  # type: ignore[call-overload]
        sizes = (shape.experts, 2 * shape.hidden, shape.width)
        self.gate_up = 0.02 * torch.randn(sizes, **made)  # type: ignore[call-overload]
        sizes = (shape.experts, shape.width, shape.hidden)
        self.down = 0.02 * torch.randn(sizes, **made)  # type: ignore[call-overload]
        scores = torch.randn(tokens, shape.experts, device="cuda").softmax(-1)
        self.part, self.expert = scores.topk(shape.chosen, dim=-1)

    def floor_ms(self, bandwidth: float, rate: float) -> float:
        """The longer of reading what must be read and computing, at GB/s and TFLOP/s."""
        shape, rows = self.shape, self.expert.numel()
        weights = 3 * shape.hidden * shape.width
        read = len(self.expert.unique()) * weights * 2 / bandwidth / 1e6
        return max(read, 2 * rows * weights / rate / 1e9)

    def by(self, linear: _Linear) -> Tensor:
        """The mixture's output, products by `linear`."""
        rows = self.x.unsqueeze(1).expand(-1, self.shape.chosen, -1)
        gate, up = linear(rows, self.gate_up, self.expert).chunk(2, dim=-1)
        y = linear(F.silu(gate) * up, self.down, self.expert)
        return (y * self.part.to(y.dtype).unsqueeze(-1)).sum(1)

    def by_vllm(self) -> Tensor:
        """The same by vLLM."""
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        expert = self.expert.int()
        found: Tensor = fused_experts(self.x, self.gate_up, self.down, self.part, expert)
        return found

    def reference(self) -> Tensor:
        """The same in float64, of the first 64 tokens."""
        found = []
        for row, experts, parts in zip(self.x[:64], self.expert, self.part, strict=False):
            x = row.double()
            both = torch.einsum("koi,i->ko", self.gate_up[experts].double(), x)
            gate, up = both.chunk(2, dim=-1)
            y = torch.einsum("koi,ki->ko", self.down[experts].double(), F.silu(gate) * up)
            found.append((y * parts.double().unsqueeze(-1)).sum(0))
        return torch.stack(found)


def _grouped_mm(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    rows, chosen = x.reshape(-1, x.shape[-1]), experts.reshape(-1)
    order = chosen.argsort(stable=True)
    counts = torch.zeros(len(weight), dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.int32))
    ends = counts.cumsum(0, dtype=torch.int32)
    found = F.grouped_mm(rows[order], weight.transpose(1, 2), offs=ends)
    back = torch.empty_like(found).index_copy(0, order, found)
    return back.view(*x.shape[:-1], -1)


def _ceilings() -> tuple[float, float]:
    """Copy bandwidth in GB/s, a big bf16 product in TFLOP/s."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _milliseconds(lambda: target.copy_(source)) / 1e6
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return copy, 2 * 8192**3 / _milliseconds(lambda: a @ b) / 1e9


def _vllm_runs() -> bool:
    try:
        _Case(_Shape("small", 4, 2, 64, 64), 3).by_vllm()
    except Exception as error:  # whatever keeps it from running here: its column stays empty
        print(f"vLLM's fused_experts does not run: {error!r}")
        return False
    return True


def _check(shape: _Shape) -> None:
    for tokens in (1, 64, 4096):
        case = _Case(shape, tokens)
        expected = case.reference()
        ways = {"ours": case.by(expert_linear), "grouped_mm": case.by(_grouped_mm)}
        if _vllm_runs():
            ways["vllm"] = case.by_vllm()
        for name, found in ways.items():
            off = ((found[:64].double() - expected).norm() / expected.norm()).item()
            print(f"{shape.name}, {tokens} tokens, {name}: off float64 by {off:.1e}", flush=True)


def _forward(shape: _Shape, ceilings: tuple[float, float]) -> None:
    rows, vllm = [], _vllm_runs()
    for tokens in _TOKENS:
        case = _Case(shape, tokens)
        ours = _milliseconds(lambda case=case: case.by(expert_linear))  # type: ignore[misc]
        torchs = _milliseconds(lambda case=case: case.by(_grouped_mm))  # type: ignore[misc]
        theirs = _milliseconds(case.by_vllm) if vllm else float("nan")
        floor = case.floor_ms(*ceilings)
        rows.append([shape.name, tokens, ours, torchs, theirs, floor, theirs / ours, floor / ours])
    heads = ["shape", "tokens", "ours ms", "grouped_mm", "vllm", "read", "of vllm", "of the floor"]
    print(tabulate(rows, heads, tablefmt="github", floatfmt=".3f"), flush=True)


def _backward(shape: _Shape, ceilings: tuple[float, float]) -> None:
    rows = []
    for tokens in (512, 4096, 16384):
        case = _Case(shape, tokens)
        leaves = [t.requires_grad_() for t in (case.x, case.gate_up, case.down)]
        up = torch.randn_like(case.x)

        def step(linear: _Linear, case: _Case = case, leaves: list[Tensor] = leaves) -> object:
            return torch.autograd.grad(case.by(linear), leaves, up)  # noqa: B023

        ours = _milliseconds(lambda: step(expert_linear), 2)
        try:
            torchs = _milliseconds(lambda: step(_grouped_mm), 2)
        except RuntimeError as error:
            print(f"grouped_mm has no backward here: {error}")
            torchs = float("nan")
        flops = 3 * 2 * case.expert.numel() * 3 * shape.hidden * shape.width
        rate = flops / ours / 1e9
        rows.append([shape.name, tokens, ours, torchs, torchs / ours, rate, rate / ceilings[1]])
    heads = ["shape", "tokens", "ours ms, both ways", "grouped_mm", "of it", "TFLOP/s"]
    heads += ["of the matrix product"]
    print(tabulate(rows, heads, tablefmt="github", floatfmt=".3f"), flush=True)


_SWEPT = {
    1: [(16, 64, 128, 4, 4), (16, 32, 128, 4, 4), (16, 64, 256, 4, 3), (16, 128, 64, 4, 4)],
    64: [(16, 64, 128, 4, 4), (16, 128, 128, 4, 3), (16, 128, 64, 4, 4), (16, 64, 256, 4, 3)],
    512: [(16, 64, 128, 4, 4), (32, 128, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 128, 4, 3)],
    4096: [(64, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3)],
    16384: [(128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (128, 128, 64, 8, 4)],
}


def _sweep(shape: _Shape) -> None:
    for tokens, shapes in _SWEPT.items():
        case = _Case(shape, tokens)
        chosen = case.expert.flatten()
        wide = case.x.repeat_interleave(shape.chosen, 0)
        narrow = torch.randn(len(wide), shape.hidden, device="cuda", dtype=torch.bfloat16)
        for x, weight in ((wide, case.gate_up), (narrow, case.down)):
            times = [
                f"{b}: {_milliseconds(lambda b=b: product(x, weight, chosen, _Blocks(*b))):.4f}"  # type: ignore[misc]  # noqa: B023
                for b in shapes
            ]
            print(shape.name, tokens, list(weight.shape), ", ".join(times), flush=True)


def main() -> None:
    """Prints what the words on the command line ask for."""
    asked = sys.argv[1:] or ["check", "forward", "backward"]
    ceilings = _ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    print(f"copy {ceilings[0]:.0f} GB/s, product {ceilings[1]:.0f} TFLOP/s", flush=True)
    for shape in _SHAPES[: 1 if "one" in asked else None]:
        if "check" in asked:
            _check(shape)
        if "sweep" in asked:
            _sweep(shape)
        if "forward" in asked:
            _forward(shape, ceilings)
        if "backward" in asked:
            _backward(shape, ceilings)


if __name__ == "__main__":
    main()
