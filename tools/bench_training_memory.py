"""Time, peak memory and compile time of a training step and of inference, side by side.

    python -m fxport.tools.bench_training_memory --lengths 1024,2048 --mode train,infer

A 6-layer GPT with hand-written attention: eager, Inductor, vllm_generic; and the same model with
``F.scaled_dot_product_attention`` written by hand under Inductor, which is the upper bound.

Times: all variants in one process, in turns (A B C D A B C D ...), so that whoever else uses the
machine disturbs all alike; a ratio is the median of the ratios of single rounds. Beside the wall's
time the process's CPU time is taken, which waits for nobody.

Memory and compile time: every variant in a process of its own, since the peak of a process never
falls, with an empty cache and without parallel compilation, so that CPU seconds (those of the C++
compiler included) are comparable.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from fxport.backends.dynamo import vllm_generic

VARIANTS = ("eager", "inductor", "sdpa+inductor", "vllm_generic")
MODES = ("train", "infer")
_BOUND = "sdpa+inductor"
_SMALL = 32  # tokens


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        mode: ``"train"``: forward, backward and optimiser step; ``"infer"``: logits.
    """

    mode: str
    length: int
    batch: int
    layers: int


@dataclass(frozen=True)
class Alone:
    """One variant in a process of its own; memory in MiB, above what it held before compiling.

    Attributes:
        peak_mib: the peak of a step, once compiled.
        kept_mib: what compilation leaves behind, in `peak_mib` too: code, guards, arenas.
        tensors_mib: the peak of a step's tensors alone, by PyTorch's own count.
        whole_mib: the peak of everything, compilation included.
        compile_s: CPU seconds of the first step beyond a later one.
    """

    peak_mib: float
    kept_mib: float
    tensors_mib: float
    whole_mib: float
    compile_s: float


@dataclass(frozen=True)
class Times:
    """Seconds of one variant, one number per round."""

    wall: list[float]
    cpu: list[float]


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

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.h:
            x = block(x)
        logits: Tensor = self.head(self.ln_f(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_step(variant: str, setting: Setting) -> Callable[[], object]:
    """One call is one step of the variant; the first one compiles it."""
    torch.manual_seed(0)
    model = _GPT(setting.length, by_hand=variant != _BOUND, layers=setting.layers)
    tokens = torch.randint(0, 1024, (setting.batch, setting.length))
    call: Callable[..., Tensor] = model
    if variant != "eager":
        call = torch.compile(model, backend=_backend(variant), dynamic=False)
    if setting.mode == "infer":
        model.eval()
        return torch.inference_mode()(lambda: call(tokens))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        call(tokens, tokens).backward()
        optimizer.step()

    return step


def _backend(variant: str) -> str | Callable[..., Any]:
    return vllm_generic if variant == "vllm_generic" else "inductor"


def measure_alone(variant: str, setting: Setting, steps: int) -> Alone:
    """Memory and compile time; only in a process that does nothing else."""
    # One small step first, so that the code of PyTorch and of the compiler counts for nobody.
    make_step(variant, replace(setting, length=_SMALL, layers=1))()
    torch.compiler.reset()
    step = make_step(variant, setting)
    before = _held_mib()
    first = _cpu_seconds(step)
    whole = _peak_mib()
    kept = _held_mib() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    later = statistics.median(_cpu_seconds(step) for _ in range(steps))
    peak = _peak_mib()
    return Alone(peak - before, kept, _tensors_mib(step), whole - before, first - later)


def _medians(runs: Sequence[Alone]) -> Alone | None:
    if not runs:
        return None
    fields = zip(*(astuple(run) for run in runs), strict=True)
    return Alone(*(statistics.median(field) for field in fields))


def measure_together(variants: Sequence[str], setting: Setting, rounds: int) -> dict[str, Times]:
    """Times of all variants, in turns."""
    steps = {variant: make_step(variant, setting) for variant in variants}
    times = {variant: Times([], []) for variant in variants}
    for step in steps.values():
        step()  # compiles
        step()
    for _ in range(rounds):
        for variant, step in steps.items():
            start = time.perf_counter()
            times[variant].cpu.append(_cpu_seconds(step))
            times[variant].wall.append(time.perf_counter() - start)
    return times


def _tensors_mib(step: Callable[[], object]) -> float:
    """The most that tensors made in a step take at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(itertools.accumulate(changes, initial=0)) / 2**20


def _cpu_seconds(step: Callable[[], object]) -> float:
    """User and system time of this process and of the compilers that it waits for."""
    start = _cpu_so_far()
    step()
    return _cpu_so_far() - start


def _cpu_so_far() -> float:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def _peak_mib() -> float:
    return _status_mib("VmHWM")


def _held_mib() -> float:
    """What the process cannot do without."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status_mib("VmRSS")


def _status_mib(entry: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry + ":")) / 2**10


def _in_own_process(arguments: Sequence[str]) -> Any:
    """Runs this program with `arguments` and an empty cache; what it printed, as JSON."""
    command = [sys.executable, "-m", "fxport.tools.bench_training_memory", *arguments]
    with tempfile.TemporaryDirectory() as cache:  # nobody compiles less because another did
        own = {
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "131072",  # freed tensors go back to the system
        }
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **own}
        )
    if run.returncode:
        raise click.ClickException(f"{' '.join(arguments)} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def table(results: Sequence[tuple[Setting, str, Alone | None, Times | None]]) -> str:
    """One line per setting and variant; ratios against the upper bound of the same setting."""
    alone = {(s, v): a for s, v, a, _ in results if a is not None}
    times = {(s, v): t for s, v, _, t in results if t is not None}
    rows = []
    for setting, variant, _, _ in results:
        row: list[object] = [setting.mode, setting.length, variant]
        mine, bound = times.get((setting, variant)), times.get((setting, _BOUND))
        if mine is None:
            row += [None] * 4
        else:
            against = bound or Times([], [])
            row += [_ms(mine.wall), _median_ratio(mine.wall, against.wall)]
            row += [_ms(mine.cpu), _median_ratio(mine.cpu, against.cpu)]
        own, least = alone.get((setting, variant)), alone.get((setting, _BOUND))
        if own is not None:
            floor = least or Alone(0.0, 0.0, 0.0, 0.0, 0.0)
            row += [round(own.peak_mib), _ratio(own.peak_mib, floor.peak_mib)]
            row += [round(own.kept_mib, 1), round(own.tensors_mib, 1)]
            row.append(_ratio(own.tensors_mib, floor.tensors_mib))
            row += [round(own.whole_mib), _ratio(own.whole_mib, floor.whole_mib)]
            row.append(round(own.compile_s, 1))
        rows.append(row)
    headers = (
        *("mode", "T", "variant", "wall ms", "x bound", "CPU ms", "x bound"),
        *("peak MiB", "x bound", "of that kept", "tensors MiB", "x bound"),
        *("with compiling", "x bound", "compile CPU s"),
    )
    return tabulate(rows, headers=headers, tablefmt="github")


def _ms(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 1)


def _median_ratio(mine: Sequence[float], bound: Sequence[float]) -> float | None:
    if not bound:
        return None
    return round(statistics.median(a / b for a, b in zip(mine, bound, strict=True)), 3)


def _ratio(mine: float, bound: float) -> float | None:
    return round(mine / bound, 3) if bound else None


@click.group(invoke_without_command=True)
@click.option("--lengths", default="1024,2048", show_default=True)
@click.option("--mode", "modes", default=",".join(MODES), show_default=True)
@click.option("--variants", default=",".join(VARIANTS), show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--layers", default=6, show_default=True)
@click.option("--rounds", default=15, show_default=True, help="Of times; 0: no times.")
@click.option("--steps", default=3, show_default=True, help="Of memory; 0: no memory.")
@click.option("--processes", default=1, show_default=True, help="For memory; medians of them.")
@click.pass_context
def main(
    context: click.Context,
    lengths: str,
    modes: str,
    variants: str,
    batch: int,
    layers: int,
    rounds: int,
    steps: int,
    processes: int,
) -> None:
    """Measures every variant in every setting; prints a table."""
    if context.invoked_subcommand is not None:
        return
    unknown = {*variants.split(","), *modes.split(",")} - {*VARIANTS, *MODES}
    if unknown:
        raise click.UsageError(f"unknown: {', '.join(sorted(unknown))}")
    wanted = [(mode, int(n)) for mode in modes.split(",") for n in lengths.split(",")]
    results: list[tuple[Setting, str, Alone | None, Times | None]] = []
    for setting in tqdm([Setting(*w, batch, layers) for w in wanted], unit="setting"):
        shared = ["--setting", json.dumps(asdict(setting))]
        times = _in_own_process(["together", *shared, variants, str(rounds)]) if rounds else {}
        for v in variants.split(","):
            alone = ["alone", *shared, v, str(steps)]
            own = [Alone(**_in_own_process(alone)) for _ in range(processes if steps else 0)]
            results.append((setting, v, _medians(own), Times(**times[v]) if rounds else None))
    click.echo(table(results))


@main.command(hidden=True)
@click.option("--setting", required=True)
@click.argument("variant")
@click.argument("steps", type=int)
def alone(setting: str, variant: str, steps: int) -> None:
    """`measure_alone` in this process; one line of JSON."""
    click.echo(json.dumps(asdict(measure_alone(variant, Setting(**json.loads(setting)), steps))))


@main.command(hidden=True)
@click.option("--setting", required=True)
@click.argument("variants")
@click.argument("rounds", type=int)
def together(setting: str, variants: str, rounds: int) -> None:
    """`measure_together` in this process; one line of JSON."""
    found = measure_together(variants.split(","), Setting(**json.loads(setting)), rounds)
    click.echo(json.dumps({variant: asdict(times) for variant, times in found.items()}))


if __name__ == "__main__":
    main()
