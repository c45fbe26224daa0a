"""Long sequences with a hand-written window on one GPU: time and peak memory of a step.

    python -m fxport.tools.bench_windows_gpu [--lengths 8192,131072] [--window 4096] [--layers 4]

Layers of attention alone (width 1024, 8 heads of 128), one sequence, bf16 autocast, forward and
backward; every layer makes the mask ``(j <= i) & (i - j < window)`` from ``arange``. Variants:

* eager, inductor, vllm_generic: written out, without a compiler, under Inductor, with our backend;
* flex: ``flex_attention`` with a block mask made once by hand, under Inductor.

Variants run one after another in this process; a length at which one is out of memory is its last.
Steps are timed by CUDA events; the medians of ``--steps`` steps after 3 that are not counted.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

__all__ = ["main"]

VARIANTS = ("eager", "inductor", "flex", "vllm_generic")
_WIDTH, _HEADS, _VOCABULARY = 1024, 8, 1000


class _Attention(nn.Module):
    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor, blocks: BlockMask | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y.view(B, T, _HEADS, -1).transpose(1, 2) for y in self.qkv(x).split(C, 2))
        y = flex_attention(q, k, v, block_mask=blocks) if blocks else self._written_out(q, k, v)
        assert isinstance(y, Tensor)
        found: Tensor = self.out(y.transpose(1, 2).reshape(B, T, C))
        return found

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = torch.arange(q.size(2), device=q.device)
        seen = (t[None, :] <= t[:, None]) & (t[:, None] - t[None, :] < self.window)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


class _Model(nn.Module):
    def __init__(self, layers: int, window: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(_VOCABULARY, _WIDTH), nn.Linear(_WIDTH, _VOCABULARY)
        self.norms = nn.ModuleList(nn.LayerNorm(_WIDTH) for _ in range(layers))
        self.layers = nn.ModuleList(_Attention(window) for _ in range(layers))

    def forward(self, tokens: Tensor, blocks: BlockMask | None) -> Tensor:
        x = self.table(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), blocks)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), tokens.flatten())


@dataclass(frozen=True)
class Measured:
    """One variant at one length; `step_ms` None: out of memory."""

    variant: str
    length: int
    step_ms: float | None
    peak_gib: float = 0.0
    loss: float = 0.0


def _blocks(length: int, window: int) -> BlockMask:
    def seen(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < window)

    return create_block_mask(seen, None, None, length, length, "cuda", _compile=True)


def _compiled(model: nn.Module, variant: str) -> Callable[..., Any]:
    if variant == "eager":
        return model
    if variant != "vllm_generic":
        return torch.compile(model, dynamic=False)
    from fxport.backends.dynamo import vllm_generic

    options: dict[str, Any] = {"strict": True}
    return torch.compile(model, backend=vllm_generic, dynamic=False, options=options)


def measure(variant: str, length: int, window: int, layers: int, steps: int) -> Measured:
    """Runs training steps of one sequence of `length` tokens."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = _Model(layers, window)
        tokens = torch.randint(0, _VOCABULARY, (1, length))
    call = _compiled(model, variant)
    blocks = _blocks(length, window) if variant == "flex" else None

    def step() -> Tensor:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss: Tensor = call(tokens, blocks)
        loss.backward()
        return loss

    for _ in range(3):
        loss = step().item()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30
    median = statistics.median(a.elapsed_time(b) for a, b in times)
    return Measured(variant, length, median, peak, loss)


@click.command()
@click.option("--lengths", default="8192,16384,32768,131072", show_default=True)
@click.option("--variants", default=",".join(VARIANTS), show_default=True)
@click.option("--window", default=4096, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--steps", default=10, show_default=True, help="Measured steps.")
def main(lengths: str, variants: str, window: int, layers: int, steps: int) -> None:
    """Measures every variant at every length; prints a table."""
    chosen = variants.split(",")
    if unknown := set(chosen) - set(VARIANTS):
        raise click.UsageError(f"unknown variants: {', '.join(sorted(unknown))}")
    results: list[Measured] = []
    for length in map(int, lengths.split(",")):
        for variant in list(chosen):
            try:
                results.append(measure(variant, length, window, layers, steps))
            except torch.OutOfMemoryError:
                results.append(Measured(variant, length, None))
                chosen.remove(variant)
            gc.collect()
            torch.cuda.empty_cache()
    click.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, window {window}\n")
    rows = [
        [m.length, m.variant, f"{m.step_ms:.1f}", f"{m.peak_gib:.1f}", f"{m.loss:.5f}"]
        if m.step_ms is not None
        else [m.length, m.variant, "out of memory"]
        for m in results
    ]
    headers = ["T", "variant", "step ms", "peak GiB", "loss"]
    click.echo(tabulate(rows, headers, tablefmt="github"))


if __name__ == "__main__":
    main()
