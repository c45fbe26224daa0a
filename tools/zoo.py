"""Every Hugging Face family with a causal language model: ported, served, compared.

    python -m fxport.tools.zoo                       all families, in the engine
    python -m fxport.tools.zoo --families llama,mpt  some
    python -m fxport.tools.zoo --port-only           port and its own check with numbers
    python -m fxport.tools.zoo --ranks               on 2 and 3 ranks, outputs and every gradient
    python -m fxport.tools.zoo --families a..m       those from a up to the last that starts with m
    python -m fxport.tools.zoo --peer                vLLM's Transformers backend instead
    python -m fxport.tools.zoo --results FILE        JSON lines; finished ones are not run again
    python -m fxport.tools.zoo --results FILE --page docs/zoo.md     the page, from the lines alone

A tiny random model per family; each in a process of its own. ``exact``: greedy tokens are the
original's, log-probabilities within 1e-3. ``refused``: with the reason and the line in the way.
``wrong``: served, but different. ``failed``: something that is neither, a bug.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate
from tqdm import tqdm

from fxport.tools.zoo_configs import families as all_families
from fxport.tools.zoo_configs import tiny_model
from fxport.tools.zoo_records import Result, Run, append, one_reason, read, write_page

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_LENGTHS, _NEW_TOKENS = (1, 3, 17, 41), 8
_BOUND = 1e-3


def judge_port(family: str, implementation: str) -> Result:
    """Ports a family; the port compares itself with the original."""
    _, port, problem = _ported(family, implementation)
    return problem or Result(family, "exact", _check(port))


def judge_engine(family: str, implementation: str) -> Result:
    """Ports a family, serves it, and compares tokens and log-probabilities."""
    model, port, problem = _ported(family, implementation)
    if problem is not None:
        return problem
    with tempfile.TemporaryDirectory() as work:
        directory = port.save(Path(work) / "port")
        return _compared(family, model, directory)


def judge_ranks(family: str, implementation: str) -> Result:
    """Divides a family over simulated ranks and compares outputs and gradients."""
    from fxport.tools import zoo_ranks

    model, problem = _built(family, implementation)
    return problem or zoo_ranks.judge_ranks(family, model)


def judge_peer(family: str, implementation: str) -> Result:
    """The same model through vLLM's own Transformers backend."""
    model, problem = _built(family, implementation)
    if problem is not None:
        return problem
    with tempfile.TemporaryDirectory() as work:
        model.save_pretrained(work)
        try:
            return _compared(family, model, Path(work), model_impl="transformers")
        except Exception as error:  # whatever vLLM raises is its refusal
            return Result(family, "refused", _one_line(error))


def _built(family: str, implementation: str) -> tuple[Any, Result | None]:
    """The model, or why there is none: one that cannot run itself is none."""
    import torch

    try:
        model = tiny_model(family, implementation)
        with torch.no_grad():
            model(torch.zeros(2, 5, dtype=torch.long))
    except Exception as error:  # not every family can be shrunk generically
        return None, Result(family, "not built", _one_line(error))
    return model, None


def _ported(family: str, implementation: str) -> tuple[Any, Any, Result | None]:
    """The model and its port, or why there is none."""
    import fxport

    model, problem = _built(family, implementation)
    if problem is not None:
        return None, None, problem
    try:
        return model, fxport.port(model), None
    except fxport.PortError as error:
        return None, None, Result(family, "refused", one_reason(error))


def _check(port: Any) -> str:
    found = [d.detail for d in port.report.decisions if d.pass_name == "self-check"]
    left = [f"{d.pass_name}: {d.reason}" for d in port.report.left()]
    return "; ".join([*found, *left])


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def _compared(family: str, model: Any, directory: Path, **options: Any) -> Result:
    import torch
    from vllm import LLM, SamplingParams

    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in _LENGTHS]
    llm = LLM(
        str(directory), dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
        distributed_executor_backend="uni", max_model_len=128, **options,
    )  # fmt: skip
    sampling = SamplingParams(
        temperature=0.0, max_tokens=_NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=1
    )
    asked: list[Any] = [{"prompt_token_ids": p} for p in prompts]
    worst = 0.0
    answers: list[Any] = llm.generate(asked, sampling, use_tqdm=False)
    for prompt, output in zip(prompts, answers, strict=True):
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *tokens[:-1]]])
            rows = model(ids, use_cache=False).logits[0, len(prompt) - 1 :].double().log_softmax(-1)
        for row, token, found in zip(rows, tokens, completion.logprobs, strict=True):
            worst = max(worst, abs(float(row[token]) - found[token].logprob))
            if float(row.max() - row[token]) > _BOUND:
                detail = f"token {token} instead of {int(row.argmax())}"
                return Result(family, "wrong", detail)
    outcome = "exact" if worst <= _BOUND else "wrong"
    return Result(family, outcome, f"log-probabilities within {worst:.1e}")


# --- one process per family -------------------------------------------------------------------


def _child(judge: Callable[..., Result], given: tuple[str, str], pipe: Any) -> None:
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        result = judge(*given)
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({Path(frame.filename).name}:{frame.lineno})"
        result = Result(given[0], "failed", _one_line(error) + where)
    pipe.send(result)
    pipe.close()
    os._exit(0)


def run(judge: Callable[..., Result], family: str, implementation: str, limit: float) -> Result:
    """Forked: what was imported before is there, and nothing is left behind."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(judge, (family, implementation), theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(limit):
            found: Result = ours.recv()
            return found
        return Result(family, "failed", f"took more than {limit:.0f} s")
    except EOFError:
        return Result(family, "failed", "the process died")
    finally:
        process.kill()
        process.join()


def _chosen(families: str) -> list[str]:
    """``"llama,mpt"``: these; ``"a..m"``: from a up to the last that starts with m; ``""``: all."""
    first, dots, last = families.partition("..")
    if dots:
        return [f for f in all_families() if first <= f and f[: len(last)] <= last]
    return families.split(",") if families else all_families()


def _prepare(engine: bool) -> None:
    """Imports what the children share, once."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import transformers  # noqa: F401

    import fxport.api
    import fxport.backends.torch
    import fxport.capture.export
    import fxport.passes.serving  # noqa: F401

    if engine:
        import vllm.entrypoints.llm  # noqa: F401


_JUDGES: dict[str, Callable[[str, str], Result]] = {
    "port": judge_port,
    "engine": judge_engine,
    "ranks": judge_ranks,
    "peer": judge_peer,
}


@click.command(help=(__doc__ or "").replace("\n\n    ", "\n\n\b\n    "))  # lines as they are
@click.option("--families", default="", help="Comma-separated, or a..m; all by default.")
@click.option("--port-only", "what", flag_value="port", help="Without the engine.")
@click.option("--ranks", "what", flag_value="ranks", help="Divided over ranks, with gradients.")
@click.option("--peer", "what", flag_value="peer", help="vLLM's Transformers backend instead.")
@click.option("--attention", type=click.Choice(["eager", "sdpa"]), default="eager")
@click.option("--limit", default=180.0, show_default=True, help="Seconds for each family.")
@click.option("--results", type=click.Path(path_type=Path), help="JSON lines, read and appended.")
@click.option("--page", type=click.Path(path_type=Path), help="Write this page and run nothing.")
def main(
    families: str,
    what: str | None,
    attention: str,
    limit: float,
    results: Path | None,
    page: Path | None,
) -> None:
    kind = what or "engine"
    done = read(results) if results is not None else {}
    if page is not None:
        write_page(page, done)
        return
    _prepare(engine=kind in ("engine", "peer"))
    found: list[Result] = []
    for family in tqdm(_chosen(families), file=sys.stderr, disable=None):
        key = Run(family, kind, attention)
        if key not in done:
            done[key] = run(_JUDGES[kind], family, attention, limit)
            if results is not None:
                append(results, key, done[key])
        found.append(done[key])
    rows = [(r.family, r.outcome, r.detail[:150]) for r in found]
    click.echo(tabulate(rows, ["family", "outcome", "detail"], maxcolwidths=[None, None, 70]))
    counts = Counter(r.outcome for r in found)
    click.echo(", ".join(f"{n} {k}" for k, n in counts.most_common()))
    if any(r.outcome in ("wrong", "failed") for r in found) and kind != "peer":
        sys.exit(1)


if __name__ == "__main__":
    main()
