"""One training step of a 350M GPT on one GPU: time, peak memory, compile time.

    python -m fxport.tools.bench_training_gpu [--lengths 2048,8192] [--variants ...] [--json FILE]

24 layers, width 1024, 16 heads, 50,304 tokens, tied head; float32 weights, bf16 autocast, fused
AdamW; 16,384 tokens a step whatever the length. Variants:

* eager, inductor, vllm_generic: attention by hand (``softmax(q @ k.T / sqrt(d) + mask) @ v``)
  without a compiler, under Inductor, and with our backend;
* sdpa: the same model with ``F.scaled_dot_product_attention`` written by hand, under Inductor;
* sdpa-cudnn: likewise, with every SDPA kernel but cuDNN's switched off.

Every configuration runs in a process of its own with an empty compile cache, one after another.
Steps are timed by CUDA events; the medians of ``--steps`` steps after 5 that are not counted.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

__all__ = ["GPT", "VOCABULARY", "main"]

VARIANTS = ("eager", "inductor", "sdpa", "sdpa-cudnn", "vllm_generic")
_BOUND = "sdpa"
_TOKENS = 16384
VOCABULARY = 50304


@dataclass(frozen=True)
class Measured:
    """One variant at one length.

    Attributes:
        step_ms: median of forward, backward and optimiser step; None: out of memory.
        spread_ms: between the first and the third quartile.
        peak_gib: the most memory that tensors held during a step.
        compile_s: seconds of the first step beyond a later one.
        loss: of the first step, before any update.
        ran: how often each attention implementation of ours ran in one step.
    """

    variant: str
    length: int
    step_ms: float | None
    spread_ms: float = 0.0
    peak_gib: float = 0.0
    compile_s: float = 0.0
    loss: float = 0.0
    ran: str = ""


class _Attention(nn.Module):
    mask: Tensor

    def __init__(self, width: int, heads: int, limit: int, by_hand: bool) -> None:
        super().__init__()
        self.heads, self.by_hand = heads, by_hand
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        if by_hand:
            mask = torch.ones(limit, limit, dtype=torch.bool).tril()
            self.register_buffer("mask", mask.view(1, 1, limit, limit))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in (q, k, v))
        if self.by_hand:
            att = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))
            att = att.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
            y = F.softmax(att, dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, limit: int, by_hand: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Attention(width, heads, limit, by_hand)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """``[B, T]`` token ids -> logits ``[B, T, V]``, or the mean loss where there are targets."""

    def __init__(
        self, limit: int, by_hand: bool = True, layers: int = 24, width: int = 1024, heads: int = 16
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, width)
        self.wpe = nn.Embedding(limit, width)
        self.h = nn.ModuleList(_Block(width, heads, limit, by_hand) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.h:
            x = block(x)
        logits: Tensor = self.head(self.ln_f(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _compiled(model: nn.Module, variant: str) -> nn.Module:
    if variant == "eager":
        return model
    if variant == "sdpa-cudnn":
        for other in ("flash", "mem_efficient", "math"):
            getattr(torch.backends.cuda, f"enable_{other}_sdp")(False)
    if variant == "vllm_generic":
        from fxport.backends.dynamo import vllm_generic

        options: dict[str, Any] = {"strict": True}
        compiled = torch.compile(model, backend=vllm_generic, dynamic=False, options=options)
    else:
        compiled = torch.compile(model, dynamic=False)
    assert isinstance(compiled, nn.Module)
    return compiled


def measure(variant: str, length: int, *, steps: int, layers: int) -> Measured:
    """Runs training steps in this process and measures them."""
    from fxport.ops import dispatch

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    with torch.device("cuda"):
        model = GPT(length, not variant.startswith("sdpa"), layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    call = _compiled(model, variant)
    batch = _TOKENS // length
    data = torch.randint(0, VOCABULARY, (batch, length + 1), device="cuda")

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss: Tensor = call(data[:, :-1], data[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    start = time.perf_counter()
    loss = step().item()
    first = time.perf_counter() - start
    for _ in range(5):
        step()
    torch.cuda.reset_peak_memory_stats()
    before = dispatch.calls.copy()
    step()
    ran = dispatch.calls - before
    times = []
    for _ in range(steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    lower, median, upper = statistics.quantiles([a.elapsed_time(b) for a, b in times], n=4)
    return Measured(
        variant,
        length,
        median,
        upper - lower,
        torch.cuda.max_memory_allocated() / 2**30,
        first - median / 1e3,
        loss,
        ", ".join(f"{name} {count}" for name, count in sorted(ran.items())),
    )


def _in_own_process(variant: str, length: int, steps: int, layers: int) -> Measured:
    options = {"variant": variant, "length": length, "steps": steps, "layers": layers}
    arguments = [f"--{k}={v}" for k, v in options.items()]
    command = [sys.executable, "-m", "fxport.tools.bench_training_gpu", "one", *arguments]
    with tempfile.TemporaryDirectory() as cache:  # nobody compiles less because another did
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
        }
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if run.returncode and "OutOfMemoryError" in run.stderr:
        return Measured(variant, length, None)
    if run.returncode:
        raise click.ClickException(f"{variant} at T={length} failed:\n{run.stderr}")
    return Measured(**json.loads(run.stdout.splitlines()[-1]))


def table(results: list[Measured]) -> str:
    """One line per length and variant; "speed": steps a second against SDPA's at that length."""
    bounds = {m.length: m.step_ms for m in results if m.variant == _BOUND}
    rows: list[list[object]] = []
    for m in results:
        if m.step_ms is None:
            rows.append([m.length, m.variant, "out of memory"])
            continue
        bound = bounds.get(m.length)
        rows.append(
            [
                m.length,
                m.variant,
                f"{m.step_ms:.1f} (+-{m.spread_ms / 2:.1f})",
                f"{bound / m.step_ms:.3f}" if bound else "",
                f"{m.peak_gib:.1f}",
                f"{m.compile_s:.0f}",
                f"{m.loss:.4f}",
                m.ran,
            ]
        )
    headers = ["T", "variant", "step ms", "speed", "peak GiB", "compile s", "loss", "ran"]
    return tabulate(rows, headers, tablefmt="github")


@click.group(invoke_without_command=True)
@click.option("--lengths", default="2048,8192", show_default=True)
@click.option("--variants", default=",".join(VARIANTS), show_default=True)
@click.option("--steps", default=30, show_default=True, help="Measured steps per configuration.")
@click.option("--layers", default=24, show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path), help="One line per result too.")
@click.pass_context
def main(
    context: click.Context, lengths: str, variants: str, steps: int, layers: int, path: Path | None
) -> None:
    """Measures every variant at every length; prints a table."""
    if context.invoked_subcommand is not None:
        return
    chosen = variants.split(",")
    if unknown := set(chosen) - set(VARIANTS):
        raise click.UsageError(f"unknown variants: {', '.join(sorted(unknown))}")
    results: list[Measured] = []
    for length in map(int, lengths.split(",")):
        for variant in chosen:
            results.append(_in_own_process(variant, length, steps, layers))
            if path is not None:  # what has been measured survives a run that is cut short
                with path.open("a") as lines:
                    lines.write(json.dumps(asdict(results[-1])) + "\n")
    name = torch.cuda.get_device_name()
    click.echo(f"{name}, torch {torch.__version__}; {_TOKENS} tokens a step, {layers} layers\n")
    click.echo(table(results))


@main.command(hidden=True)
@click.option("--variant", required=True)
@click.option("--length", type=int, required=True)
@click.option("--steps", type=int, required=True)
@click.option("--layers", type=int, required=True)
def one(variant: str, length: int, steps: int, layers: int) -> None:
    """One configuration in this process; one line of JSON."""
    click.echo(json.dumps(asdict(measure(variant, length, steps=steps, layers=layers))))


if __name__ == "__main__":
    main()
