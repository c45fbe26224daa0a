"""A port of a plain Llama in vLLM on GPUs, against vLLM's own class and Transformers'.

    python -m fxport.tools.bench_engine_gpu [--size 1b] [--variants ...] [--ranks 1] [--devices 0]
        [--together] [--weights] [--directory DIR] [--profile DIR] [--json FILE]

bf16, CUDA graphs, torch.compile, vLLM's defaults but for `_options` (the same for all), random
weights. Variants:

* port: `fxport.tools.bench_llama.Llama`, attention and rotary embedding by hand, q, k and v, gate
  and up as layers of their own, experts looked up, ported and saved by fxport;
* native: `LlamaForCausalLM` or `MixtralForCausalLM` of vLLM, which joins q, k and v, gate and up;
* transformers: the same class of Transformers through vLLM's Transformers backend.

Measured: start-up of a process with empty compile caches; 512 prompts of 512 tokens with 128
tokens out; one prompt alone. Every variant runs in a process of its own, with the engine inside it;
with `--ranks 2` the model is divided over two GPUs (tensor parallel), each with a process.

`--together` starts all variants at once and measures them in turns, so that what else the host does
hits all alike; ratios are then medians of the ratios of single rounds. `--weights` gives all the
same weights and compares the log-probabilities of 4,064 tokens with those of the plain module in
float32; with `--directory`, also with those of earlier runs there.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate

from fxport.tools.bench_engine_child import PROMPT, scored_prompts
from fxport.tools.bench_llama import SIZES, Llama, Size

__all__ = ["main"]

VARIANTS = ("port", "native", "transformers")
_BOUND = "native"
_PROMPTS, _OUTPUT = 512, 128
_SELF = [sys.executable, "-m", "fxport.tools.bench_engine_gpu"]


@dataclass
class Measured:
    """One variant of one size.

    Attributes:
        start_s: from before `import vllm` until the engine answers, compile caches empty.
        all_s: seconds for all prompts at once, each round.
        first_ms: time to the first token of one prompt alone, median of 3, each round.
        token_ms: time of each further token, median of 2, each round.
    """

    variant: str
    size: str
    ranks: int
    start_s: float
    all_s: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    token_ms: list[float] = field(default_factory=list)


def _options(variant: str, size: Size, directory: Path, ranks: int) -> dict[str, Any]:
    """Of `LLM`: a cache that holds all prompts to their ends, and nothing of memory that varies."""
    blocks = _PROMPTS * -(-(PROMPT + _OUTPUT + 16) // 16)
    token = 2 * size.layers * size.kv_heads * size.head_size * torch.bfloat16.itemsize
    return {
        "model": str(directory / ("port" if variant == "port" else "hf")),
        "model_impl": "transformers" if variant == "transformers" else "auto",
        "tensor_parallel_size": ranks,
        "distributed_executor_backend": "uni" if ranks == 1 else "mp",
        "load_format": "auto" if _has_weights(directory) else "dummy",
        "kv_cache_memory_bytes": blocks * 16 * token // ranks,
        "gpu_memory_utilization": 0.05,  # not looked at where the cache has a size
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_seqs": _PROMPTS,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }


def _has_weights(directory: Path) -> bool:
    return any((directory / "hf").glob("*.safetensors"))


class _Engine:
    """A process of `bench_engine_child`."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log

    def ask(self, **asked: Any) -> dict[str, Any]:
        """Sends a question, unless there is none, and waits for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if asked:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException(f"the engine ended:\n{self.log.read_text()[-6000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def seconds(self, prompts: int, output: int, seed: int) -> float:
        """Of one generation."""
        answer = self.ask(do="generate", prompts=prompts, output=output, seed=seed)
        return float(answer["seconds"])


@contextmanager
def _started(options: dict[str, Any], devices: str) -> Iterator[_Engine]:
    with tempfile.TemporaryDirectory() as cache:  # nobody compiles less because another did
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": devices,
            "VLLM_CACHE_ROOT": f"{cache}/vllm",
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "fxport.tools.bench_engine_child", json.dumps(options)]
        log = Path(cache) / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
            try:
                yield _Engine(process, log)
            finally:
                assert process.stdin is not None
                process.stdin.close()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()


def _round(engine: _Engine, found: Measured, seed: int) -> None:
    found.all_s.append(engine.seconds(_PROMPTS, _OUTPUT, seed))
    seeds = range(100 * seed, 100 * seed + 3)
    first = statistics.median(engine.seconds(1, 1, s) for s in seeds)
    whole = statistics.median(engine.seconds(1, _OUTPUT, s) for s in seeds[:2])
    found.first_ms.append(first * 1e3)
    found.token_ms.append((whole - first) * 1e3 / (_OUTPUT - 1))


def _measure(
    names: list[str], size: str, directory: Path, ranks: int, devices: list[str], rounds: int,
    profile: Path | None,
) -> list[Measured]:  # fmt: skip
    """Starts the engines all at once and measures them in turns."""
    with ExitStack() as stack:
        of = cycle([",".join(devices)] if ranks > 1 else devices)
        engines = [
            stack.enter_context(_started(_options(v, SIZES[size], directory, ranks), d))
            for v, d in zip(names, of, strict=False)
        ]
        found = [
            Measured(v, size, ranks, e.ask()["start_s"])
            for v, e in zip(names, engines, strict=True)
        ]
        pairs = list(zip(engines, found, strict=True))
        for engine in engines:  # kernels that the first requests compile
            engine.seconds(8, 8, seed=1)
            engine.seconds(_PROMPTS, 2, seed=1)
        for number in range(rounds):
            for engine, one in pairs if number % 2 == 0 else reversed(pairs):
                _round(engine, one, seed=2 + number)
        for engine, one in pairs:
            name = f"{size}-{one.variant}-{ranks}"
            if _has_weights(directory):
                _write_scores(directory, name, engine.ask(do="score")["logprobs"])
            if profile is not None:
                (profile / f"{name}.txt").write_text(engine.ask(do="profile")["text"])
    return found


# -- the models --------------------------------------------------------------------------------


def prepare(size: str, directory: Path, *, port: bool, weights: bool) -> float:
    """Writes ``hf/`` and ``port/`` into `directory`; seconds that `port` took."""
    import fxport

    (directory / "hf").mkdir(parents=True)
    (directory / "hf" / "config.json").write_text(json.dumps(SIZES[size].hugging_face()))
    if not port and not weights:
        return 0.0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Llama(SIZES[size]).eval()
    torch.set_default_dtype(default)
    model.cos, model.sin = model.cos.to(device), model.sin.to(device)
    start = time.perf_counter()
    if port:
        fxport.port(model).save(directory / "port")
    seconds = time.perf_counter() - start
    if weights:
        from safetensors.torch import save_file

        save_file(model.hugging_face(), directory / "hf" / "model.safetensors")
        _write_scores(directory, f"{size}-float32", _reference(model, SIZES[size].vocabulary))
    else:
        for file in (directory / "port").glob("*.safetensors"):
            file.unlink()  # load_format="dummy" makes its own
    return seconds


@torch.no_grad()
def _reference(model: Llama, vocabulary: int) -> list[float]:
    """As `bench_engine_child` scores, by the plain module with the same weights in float32."""
    model = model.float()
    gc.collect()
    prompts = scored_prompts(vocabulary).to(model.embed.weight.device)
    found: list[float] = []
    for prompt in prompts:
        logprobs = model(prompt.unsqueeze(0))[0, :-1].log_softmax(-1)
        found += logprobs.gather(1, prompt[1:, None]).flatten().tolist()
    return found


def _write_scores(directory: Path, name: str, logprobs: list[float]) -> None:
    (directory / f"{name}.scores").write_text(json.dumps(logprobs))


def scores(directory: Path, size: str) -> str:
    """How far every run's log-probabilities are from those in float32."""
    files = sorted(directory.glob(f"{size}-*.scores"))
    values = {f.stem: torch.tensor(json.loads(f.read_text())).double() for f in files}
    reference = values.pop(f"{size}-float32")
    rows = []
    for name, found in values.items():
        off = (found - reference).abs()
        rms = off.square().mean().sqrt().item()
        rows.append([name, len(off), f"{rms:.2e}", f"{off.max().item():.2e}"])
    headers = ["log-probabilities", "tokens", "root mean square off float32", "at most"]
    return tabulate(rows, headers, tablefmt="github")


# -- the program -------------------------------------------------------------------------------


def table(results: list[Measured]) -> str:
    """One line per size and variant; ratios against vLLM's own class, round by round."""
    rows: list[list[object]] = []
    for m in results:
        bound = next((r for r in results if r.size == m.size and r.variant == _BOUND), m)
        best = _PROMPTS * _OUTPUT / min(m.all_s)
        rows.append(
            [
                m.size,
                m.variant,
                m.ranks,
                f"{best:.0f} (-{1 - min(m.all_s) / max(m.all_s):.1%})",
                _ratio(bound.all_s, m.all_s),
                f"{statistics.median(m.first_ms):.2f}",
                _ratio(bound.first_ms, m.first_ms),
                f"{statistics.median(m.token_ms):.3f}",
                _ratio(bound.token_ms, m.token_ms),
                f"{m.start_s:.0f}",
            ]
        )
    headers = ["size", "variant", "GPUs", "tokens out / s", "of native", "first token ms"]
    headers += ["of native", "further token ms", "of native", "start-up s"]
    return tabulate(rows, headers, tablefmt="github")


def _ratio(bound: list[float], own: list[float]) -> str:
    """The median over rounds, and its extremes."""
    each = [b / o for b, o in zip(bound, own, strict=True)]
    return f"{statistics.median(each):.3f} ({min(each):.2f} to {max(each):.2f})"


@click.group(invoke_without_command=True)
@click.option("--size", "sizes", default="1b", show_default=True, help="Comma-separated.")
@click.option("--variants", default=",".join(VARIANTS), show_default=True)
@click.option("--ranks", default=1, show_default=True, help="GPUs to divide the model over.")
@click.option("--devices", default="0,1", show_default=True, help="With one rank: in turns.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--together", is_flag=True, help="All variants at once, measured in turns.")
@click.option("--weights", is_flag=True, help="The same for all; log-probabilities compared.")
@click.option("--directory", "given", type=click.Path(path_type=Path), help="Keeps the models.")
@click.option("--profile", type=click.Path(path_type=Path), help="Directory for kernel times.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="One line per result too.")
@click.pass_context
def main(
    context: click.Context,
    sizes: str,
    variants: str,
    ranks: int,
    devices: str,
    rounds: int,
    together: bool,
    weights: bool,
    given: Path | None,
    profile: Path | None,
    path: Path | None,
) -> None:
    """Measures every variant of every size; prints a table."""
    if context.invoked_subcommand is not None:
        return
    results: list[Measured] = []
    names = variants.split(",")
    for size in sizes.split(","):
        directory = (given or Path(tempfile.mkdtemp())) / size
        if not directory.exists():
            # In a process of its own: its memory on the GPU would be missing later.
            prepared = [f"--size={size}", f"--directory={directory}"]
            prepared += ["--port"] * ("port" in names) + ["--weights"] * weights
            subprocess.run([*_SELF, "prepare-only", *prepared], check=True)
        for group in [names] if together else [[name] for name in names]:
            try:
                found = _measure(group, size, directory, ranks, devices.split(","), rounds, profile)
            except click.ClickException as failure:
                click.echo(f"{group} at {size} failed: {failure.message}")
                continue
            results += found
            for one in found:
                click.echo(one)
                if path is not None:  # what has been measured survives a cut
                    with path.open("a") as lines:
                        lines.write(json.dumps(asdict(one)) + "\n")
        if _has_weights(directory):
            click.echo("\n" + scores(directory, size))
        if given is None:
            shutil.rmtree(directory.parent, ignore_errors=True)
    click.echo("\n" + table(results))
    if len(results) < len(sizes.split(",")) * len(names):
        sys.exit(1)


@main.command(hidden=True)
@click.option("--size", required=True)
@click.option("--directory", type=click.Path(path_type=Path), required=True)
@click.option("--port/--no-port", default=False)
@click.option("--weights/--no-weights", default=False)
def prepare_only(size: str, directory: Path, port: bool, weights: bool) -> None:
    """Ports and saves."""
    seconds = prepare(size, directory, port=port, weights=weights)
    click.echo(f"{size}: ported and saved in {seconds:.1f} s")


if __name__ == "__main__":
    main()
