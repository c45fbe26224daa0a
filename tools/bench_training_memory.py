"""Time, peak memory and compile time of one training step, side by side.

    python -m fxport.tools.bench_training_memory --lengths 512,1024,2048,4096

A 6-layer GPT with hand-written attention: eager, Inductor, vllm_generic; and the same model with
``F.scaled_dot_product_attention`` written by hand under Inductor, which is the upper bound. Every
configuration runs in a process of its own, since the peak of a process never falls.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

import click
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

VARIANTS = ("eager", "inductor", "sdpa+inductor", "vllm_generic")
_BOUND = "sdpa+inductor"


@dataclass(frozen=True)
class Measured:
    """One variant at one length.

    Attributes:
        step_s: median seconds of forward, backward and optimiser step.
        peak_mib: how far the resident set rose above what the model alone needs, in MiB.
        compile_s: seconds of the first step beyond a later one.
    """

    variant: str
    length: int
    step_s: float
    peak_mib: float
    compile_s: float


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


class _GPT(nn.Module):
    def __init__(self, limit: int, by_hand: bool, layers: int = 6, width: int = 192) -> None:
        super().__init__()
        self.wte = nn.Embedding(1024, width)
        self.wpe = nn.Embedding(limit, width)
        self.h = nn.ModuleList(_Block(width, 6, limit, by_hand) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1024, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.h:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def measure(variant: str, length: int, *, batch: int, steps: int, layers: int) -> Measured:
    """Runs `steps` training steps in this process and measures them."""
    torch.manual_seed(0)
    model = _GPT(length, by_hand=variant != _BOUND, layers=layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, 1024, (batch, length))
    call: nn.Module = model
    if variant != "eager":
        backend = "vllm_generic" if variant == "vllm_generic" else "inductor"
        # One small step first, so that the compiler's own memory counts for nobody.
        small = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4))
        torch.compile(small, backend=backend)(torch.ones(2, 4)).sum().backward()
        call = torch.compile(model, backend=backend, dynamic=False)  # type: ignore[assignment]
    before = _peak_mib()
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        call(tokens, tokens).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[1:])
    return Measured(variant, length, step, _peak_mib() - before, seconds[0] - step)


def _peak_mib() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


def _in_own_process(variant: str, length: int, batch: int, steps: int, layers: int) -> Measured:
    options = {"variant": variant, "length": length, "batch": batch, "steps": steps}
    arguments = [f"--{k}={v}" for k, v in {**options, "layers": layers}.items()]
    command = [sys.executable, "-m", "fxport.tools.bench_training_memory", "one", *arguments]
    with tempfile.TemporaryDirectory() as cache:  # nobody compiles less because another did
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if run.returncode:
        raise click.ClickException(f"{variant} at T={length} failed:\n{run.stderr}")
    return Measured(**json.loads(run.stdout.splitlines()[-1]))


def table(results: list[Measured]) -> str:
    """One line per length and variant; ratios against the upper bound at the same length."""
    bounds = {m.length: m for m in results if m.variant == _BOUND}
    rows = []
    for m in results:
        bound = bounds.get(m.length, m)
        rows.append(
            (
                m.length,
                m.variant,
                round(m.step_s * 1e3, 1),
                round(m.step_s / bound.step_s, 2),
                round(m.peak_mib),
                round(m.peak_mib / max(bound.peak_mib, 1), 2),
                round(m.compile_s, 1),
            )
        )
    headers = ("T", "variant", "step ms", "x bound", "peak MiB", "x bound", "compile s")
    return tabulate(rows, headers=headers)


@click.group(invoke_without_command=True)
@click.option("--lengths", default="512,1024,2048,4096", show_default=True)
@click.option("--variants", default=",".join(VARIANTS), show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--steps", default=5, show_default=True, help="Measured steps per configuration.")
@click.option("--layers", default=6, show_default=True)
@click.pass_context
def main(
    context: click.Context, lengths: str, variants: str, batch: int, steps: int, layers: int
) -> None:
    """Measures every variant at every length; prints a table."""
    if context.invoked_subcommand is not None:
        return
    wanted = [(int(n), v) for n in lengths.split(",") for v in variants.split(",")]
    unknown = {v for _, v in wanted} - set(VARIANTS)
    if unknown:
        raise click.UsageError(f"unknown variants: {', '.join(sorted(unknown))}")
    results = [
        _in_own_process(variant, length, batch, steps, layers)
        for length, variant in tqdm(wanted, unit="run")
    ]
    click.echo(table(results))


@main.command(hidden=True)
@click.option("--variant", required=True)
@click.option("--length", type=int, required=True)
@click.option("--batch", type=int, required=True)
@click.option("--steps", type=int, required=True)
@click.option("--layers", type=int, required=True)
def one(variant: str, length: int, batch: int, steps: int, layers: int) -> None:
    """One configuration in this process; one line of JSON."""
    measured = measure(variant, length, batch=batch, steps=steps, layers=layers)
    click.echo(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main()
