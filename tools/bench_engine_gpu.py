"""A port of a plain Llama in vLLM on GPUs, against vLLM's own class and Transformers'.

    python -m fxport.tools.bench_engine_gpu [--size 1b] [--variants ...] [--ranks 1]
                                            [--profile DIR] [--json FILE]

Random weights, bf16, CUDA graphs, torch.compile, vLLM's defaults but for the options in `_OPTIONS`
(the same for all). Variants:

* port: `fxport.tools.bench_llama.Llama`, attention and rotary embedding by hand, q, k and v, gate
  and up as layers of their own, ported and saved by fxport;
* native: `LlamaForCausalLM` of vLLM, which joins q, k and v, and gate and up;
* transformers: the same class of Transformers through vLLM's Transformers backend.

Measured: start-up of a process with empty compile caches; 512 prompts of 512 tokens with 128
tokens out; one prompt alone. Every variant runs in a process of its own, with the engine inside it;
with `--ranks 2` the model is divided over two GPUs (tensor parallel), each with a process.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate

from fxport.tools.bench_llama import SIZES, Llama, Size

__all__ = ["main"]

VARIANTS = ("port", "native", "transformers")
_BOUND = "native"
_PROMPT, _OUTPUT = 512, 128
_SELF = [sys.executable, "-m", "fxport.tools.bench_engine_gpu"]
_OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "max_num_seqs": 512,
    "gpu_memory_utilization": 0.85,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
    "load_format": "dummy",
}


@dataclass(frozen=True)
class Measured:
    """One variant of one size.

    Attributes:
        start_s: from before `import vllm` until the engine answers, compile caches empty.
        output_per_s: tokens made a second with all prompts at once, the better of two runs.
        spread: between the two runs, as a part of the better one.
        first_ms: time to the first token of one prompt alone (median of 7).
        token_ms: time of each further token (median of 5 runs).
    """

    variant: str
    size: str
    ranks: int
    start_s: float
    output_per_s: float
    spread: float
    first_ms: float
    token_ms: float


def write_config(size: Size, directory: Path) -> None:
    """Writes ``hf/``, which needs no weights, into `directory`."""
    (directory / "hf").mkdir()
    (directory / "hf" / "config.json").write_text(json.dumps(size.hugging_face()))


def prepare(size: Size, directory: Path) -> float:
    """Writes ``port/`` (no weights) into `directory`; seconds that `port` took."""
    import fxport

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Llama(size)
    torch.set_default_dtype(default)
    model.cos, model.sin = model.cos.to(device), model.sin.to(device)
    start = time.perf_counter()
    port = fxport.port(model)
    seconds = time.perf_counter() - start
    port.save(directory / "port")
    for weights in (directory / "port").glob("*.safetensors"):
        weights.unlink()  # load_format="dummy" makes its own
    return seconds


def _engine(variant: str, directory: Path, ranks: int) -> Any:
    from vllm import LLM

    executor = "uni" if ranks == 1 else "mp"
    parallel = {"tensor_parallel_size": ranks, "distributed_executor_backend": executor}
    options = {**_OPTIONS, **parallel}
    if variant == "port":
        llm = LLM(str(directory / "port"), **options)
        llm.apply_model(_fill_tables)
        return llm
    implementation = "transformers" if variant == "transformers" else "vllm"
    return LLM(str(directory / "hf"), model_impl=implementation, **options)


def _fill_tables(model: torch.nn.Module) -> None:
    """Dummy weights leave out buffers, and unset memory may hold NaN."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(-1, 1)


def _generate(llm: Any, prompts: int, output: int, seed: int) -> float:
    """Seconds for `prompts` random prompts of 512 tokens."""
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(seed)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    ids = torch.randint(0, vocabulary, (prompts, _PROMPT), generator=generator).tolist()
    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": p} for p in ids], sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert all(len(o.outputs[0].token_ids) == output for o in outputs)
    return seconds


def measure(variant: str, size: str, directory: Path, profile: Path | None, ranks: int) -> Measured:
    """Starts the engine in this process and measures it."""
    start = time.perf_counter()
    llm = _engine(variant, directory, ranks)
    _generate(llm, 1, 1, seed=0)
    start_s = time.perf_counter() - start
    _generate(llm, 8, 8, seed=1)  # kernels that the first requests compile
    runs = [512 * _OUTPUT / _generate(llm, 512, _OUTPUT, seed=s) for s in (2, 3)]
    first = statistics.median(_generate(llm, 1, 1, seed=s) for s in range(10, 17))
    whole = statistics.median(_generate(llm, 1, _OUTPUT, seed=s) for s in range(20, 25))
    if profile is not None:
        lines = [f"{variant}, {size}"]
        lines += _profiled("one prompt of 512, 33 out", lambda: _generate(llm, 1, 33, seed=30))
        lines += _profiled("256 prompts of 512, 16 out", lambda: _generate(llm, 256, 16, seed=31))
        profile.write_text("\n".join(lines) + "\n")
    return Measured(
        variant,
        size,
        ranks,
        start_s,
        max(runs),
        1 - min(runs) / max(runs),
        first * 1e3,
        (whole - first) * 1e3 / (_OUTPUT - 1),
    )


def _profiled(title: str, run: Callable[[], object]) -> list[str]:
    """The kernels that took the most time on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.time_range.elapsed_us()
            calls[event.name] += 1
    rows = [[f"{us / 1e3:.2f}", calls[n], n[:110]] for n, us in times.most_common(25)]
    total = sum(times.values()) / 1e3
    return [
        "",
        f"{title}: {total:.1f} ms on the GPU, {sum(calls.values())} kernels",
        tabulate(rows, ["ms", "calls", "kernel"], tablefmt="plain"),
    ]


def _in_own_process(
    variant: str, size: str, directory: Path, profile: Path | None, ranks: int
) -> Measured | str:
    arguments = [f"--variant={variant}", f"--size={size}", f"--directory={directory}"]
    arguments.append(f"--ranks={ranks}")
    if profile is not None:
        arguments.append(f"--profile={profile}")
    command = [*_SELF, "one", *arguments]
    with tempfile.TemporaryDirectory() as cache:  # nobody compiles less because another did
        environment = {
            **os.environ,
            "VLLM_CACHE_ROOT": f"{cache}/vllm",
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if profile is not None:
        log = profile.with_suffix(".log")
        log.write_text(run.stdout[-200_000:] + run.stderr[-200_000:])
    if run.returncode:
        return f"{variant} at {size} failed:\n{run.stdout[-1500:]}\n{run.stderr[-2500:]}"
    line = next(x for x in reversed(run.stdout.splitlines()) if x.startswith("{"))
    return Measured(**json.loads(line))


def table(results: list[Measured]) -> str:
    """One line per size and variant; ratios against vLLM's own class."""
    rows: list[list[object]] = []
    for m in results:
        bound = next((r for r in results if r.size == m.size and r.variant == _BOUND), None)
        rows.append(
            [
                m.size,
                m.variant,
                m.ranks,
                f"{m.output_per_s:.0f} (-{m.spread:.1%})",
                f"{m.output_per_s / bound.output_per_s:.3f}" if bound else "",
                f"{m.first_ms:.1f}",
                f"{m.token_ms:.3f}",
                f"{bound.token_ms / m.token_ms:.3f}" if bound else "",
                f"{m.start_s:.0f}",
            ]
        )
    headers = ["size", "variant", "GPUs", "tokens out / s", "of native", "first token ms"]
    headers += ["further token ms", "of native", "start-up s"]
    return tabulate(rows, headers, tablefmt="github")


@click.group(invoke_without_command=True)
@click.option("--size", "sizes", default="1b", show_default=True, help="Comma-separated.")
@click.option("--variants", default=",".join(VARIANTS), show_default=True)
@click.option("--ranks", default=1, show_default=True, help="GPUs to divide the model over.")
@click.option("--profile", type=click.Path(path_type=Path), help="Directory for kernel times.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="One line per result too.")
@click.pass_context
def main(
    context: click.Context,
    sizes: str,
    variants: str,
    ranks: int,
    profile: Path | None,
    path: Path | None,
) -> None:
    """Measures every variant of every size; prints a table."""
    if context.invoked_subcommand is not None:
        return
    results: list[Measured] = []
    for size in sizes.split(","):
        directory = Path(tempfile.mkdtemp())
        try:
            # In a process of its own: its memory on the GPU would be missing later.
            prepared = [f"--size={size}", f"--directory={directory}"]
            prepared += [] if "port" in variants.split(",") else ["--no-port"]
            subprocess.run([*_SELF, "prepare-only", *prepared], check=True)
            for variant in variants.split(","):
                file = None if profile is None else profile / f"{variant}-{size}.txt"
                found = _in_own_process(variant, size, directory, file, ranks)
                click.echo(found)
                if isinstance(found, Measured):
                    results.append(found)
                    if path is not None:  # what has been measured survives a cut
                        with path.open("a") as lines:
                            lines.write(json.dumps(asdict(found)) + "\n")
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    click.echo("\n" + table(results))
    if len(results) < len(sizes.split(",")) * len(variants.split(",")):
        sys.exit(1)


@main.command(hidden=True)
@click.option("--size", required=True)
@click.option("--directory", type=click.Path(path_type=Path), required=True)
@click.option("--port/--no-port", default=True)
def prepare_only(size: str, directory: Path, port: bool) -> None:
    """Ports and saves."""
    write_config(SIZES[size], directory)
    if port:
        click.echo(f"{size}: ported in {prepare(SIZES[size], directory):.1f} s")


@main.command(hidden=True)
@click.option("--variant", required=True)
@click.option("--size", required=True)
@click.option("--directory", type=click.Path(path_type=Path), required=True)
@click.option("--profile", type=click.Path(path_type=Path))
@click.option("--ranks", type=int, required=True)
def one(variant: str, size: str, directory: Path, profile: Path | None, ranks: int) -> None:
    """One variant in this process; one line of JSON."""
    click.echo("\n" + json.dumps(asdict(measure(variant, size, directory, profile, ranks))))


if __name__ == "__main__":
    main()
