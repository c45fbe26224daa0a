"""`fxport.verify`: the original, the saved graph, the trainable module and the engine, compared.

model, my_model/  ->  Verification(one line per way to run it, the first operation that differs)
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxport.capture.clone import uncompiled
from fxport.capture.conventions import adaptations
from fxport.capture.extra_arguments import ExampleInputs, token_ids_alone
from fxport.capture.sample import device_of
from fxport.errors import FxportError
from fxport.loading import Loaded, load
from fxport.passes.dtypes import coarsest
from fxport.verify_prompts import prompts_for
from fxport.verify_records import Comparison, FirstDifference, Verification
from fxport.verify_trace import first_in_engine, first_in_graph, first_in_weights

__all__ = ["verify"]

# Largest difference of a log-probability that counts as rounding. Half precision rounds every
# operation, in another order in each of the runs.
_BOUNDS = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 0.1, torch.bfloat16: 0.5}


def verify(
    model: nn.Module,
    directory: str | Path,
    *,
    example_inputs: ExampleInputs | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    new_tokens: int = 8,
    seed: int = 0,
    engine: bool = True,
) -> Verification:
    """Compares a saved port with the model that it was made from, in every way it can be run.

    The weights one by one; the saved graph in PyTorch, a mixed batch; the trainable module
    (``vllm_generic``); and the real engine, in a process of its own: prefill, decode step by step,
    one request at a time, with a filled prefix cache, and with prompts prefilled in chunks. Greedy
    tokens must be the original's best ones, and every log-probability equal within rounding.

    Args:
        model: the original; not changed.
        directory: from `Port.save`.
        example_inputs: those that the port was made with.
        prompts: token ids; by default random and adversarial ones (`verify_prompts`).
        new_tokens: how many tokens are generated for each prompt.
        seed: of the random prompts.
        engine: False leaves the engine out.

    Raises:
        FxportError: vLLM is not installed, does not start, or a prompt does not fit.
        SavedPortError: the directory is damaged.
    """
    loaded = load(directory)
    model, _ = token_ids_alone(uncompiled(model), example_inputs)
    model, _ = adaptations(model)
    if engine and importlib.util.find_spec("vllm") is None:
        raise FxportError("vLLM is not installed; verify(..., engine=False) leaves the engine out")
    serving = loaded.serving
    asked = _checked(prompts, loaded, new_tokens) or prompts_for(
        serving.known_ids, serving.max_position_embeddings, new_tokens, seed
    )
    original = _Original(model, serving.vocab_size, _BOUNDS[coarsest(serving)])
    weights = first_in_weights(loaded, dict(model.named_parameters()))
    comparisons = [_weights(loaded, weights), _graph(loaded, original, asked)]
    comparisons.append(_trainable(model, original, asked))
    first = weights
    if first is None and not comparisons[1].equal:
        first = _other_graph(model, loaded)
    if engine:
        found = _in_engine(directory, loaded, original, asked, new_tokens)
        comparisons += found.comparisons
        first = first or found.first
    return Verification(tuple(comparisons), first)


def _checked(
    prompts: Sequence[Sequence[int]] | None, loaded: Loaded, new_tokens: int
) -> list[list[int]]:
    limit, vocabulary = loaded.serving.max_position_embeddings, loaded.serving.known_ids
    if not 0 < new_tokens < limit:
        raise FxportError(f"new_tokens must be between 1 and {limit - 1}, not {new_tokens}")
    for prompt in prompts or ():
        if not 0 < len(prompt) <= limit - new_tokens:
            raise FxportError(
                f"{len(prompt)} tokens and {new_tokens} new ones; this port takes {limit}"
            )
        if not all(0 <= token < vocabulary for token in prompt):
            raise FxportError(f"a prompt holds a token outside the vocabulary of {vocabulary}")
    return [list(p) for p in prompts or ()]


class _Original:
    """The model in eval mode, recomputed in full for every question."""

    def __init__(self, model: nn.Module, vocab_size: int, bound: float) -> None:
        from fxport.capture.clone import clone_to_run
        from fxport.original import logits_function

        self._logits = logits_function(clone_to_run(model), vocab_size)
        self._device = device_of(model)
        self.vocab_size, self.bound = vocab_size, bound

    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """Float64 ``[T, V]``: what the model predicts after each of the tokens."""
        return all_logprobs(self._logits, torch.tensor([list(ids)], device=self._device))


def all_logprobs(logits: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """``[T, V]`` float64, also of a model that gives the last position's logits only."""
    found = logits(ids)
    if found.dim() == 1:
        ends = range(1, ids.shape[1] + 1)
        found = torch.stack([logits(ids[:, :n]).reshape(-1, len(found))[-1] for n in ends])
    return found.detach().cpu().double().log_softmax(-1)


def _weights(loaded: Loaded, first: FirstDifference | None) -> Comparison:
    compared = f"{len(loaded.parameters)} tensors"
    return Comparison("weights", compared, None, None, first is None, str(first or ""))


def _graph(loaded: Loaded, original: _Original, prompts: list[list[int]]) -> Comparison:
    from fxport.backends.torch import PackedModel

    packed = PackedModel(loaded.serving, loaded.parameters)
    found = packed([torch.tensor(p) for p in prompts])
    pairs = (
        (f"prompt {i}", original.logprobs(p), logits.double().log_softmax(-1))
        for i, (p, logits) in enumerate(zip(prompts, found, strict=True))
    )
    return _compared("graph, mixed batch", prompts, pairs, original.bound)


def _trainable(model: nn.Module, original: _Original, prompts: list[list[int]]) -> Comparison:
    from fxport.api import trainable
    from fxport.original import logits_function

    module = trainable(model).eval()
    device = device_of(model)
    asked = sorted(prompts, key=len)[-2:]  # each new length may compile again
    vocabulary = original.vocab_size
    logits = logits_function(module, vocabulary)
    pairs = (
        (
            f"a prompt of {len(p)} tokens",
            original.logprobs(p)[-1:],
            logits(torch.tensor([p], device=device)).reshape(-1, vocabulary)[-1:]
            .cpu().double().log_softmax(-1),
        )
        for p in asked
    )  # fmt: skip
    return _compared("trainable module", asked, pairs, original.bound)


def _compared(what: str, prompts: list[list[int]], pairs: Any, bound: float) -> Comparison:
    worst, detail = 0.0, ""
    for name, expected, found in pairs:
        error = (expected - found).abs().nan_to_num(float("inf")).amax(-1)
        beyond = (error > bound).nonzero().flatten()
        if len(beyond) and not detail:
            detail = f"{name}, position {int(beyond[0])}: by {float(error[beyond[0]]):.1e}"
        worst = max(worst, float(error.max()))
    count = sum(map(len, prompts))
    compared = f"{len(prompts)} prompts, {count} positions"
    return Comparison(what, compared, worst, bound, not detail, detail)


def _other_graph(model: nn.Module, loaded: Loaded) -> FirstDifference | None:
    from fxport.capture.export import capture
    from fxport.passes.serving import lower_for_serving

    limit = loaded.serving.max_position_embeddings
    return first_in_graph(loaded, lower_for_serving(capture(model), limit).serving)


# --- the engine -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    comparisons: list[Comparison]
    first: FirstDifference | None


def _in_engine(
    directory: str | Path,
    loaded: Loaded,
    original: _Original,
    prompts: list[list[int]],
    new_tokens: int,
) -> _Asked:
    request = {
        "directory": str(directory),
        "dtype": str(loaded.serving.dtype).removeprefix("torch."),
        "prompts": prompts,
        "new_tokens": new_tokens,
        "trace": None,
    }
    with tempfile.TemporaryDirectory() as work:
        answer = _probe(request, Path(work))
        runs = json.loads(answer.read_text(encoding="utf-8"))["runs"]
        judged = [_judge(what, run, prompts, original) for what, run in runs.items()]
        comparisons = [j.comparison for j in judged]
        wrong = next((j.tokens for j in judged if j.tokens is not None), None)
        first = None
        if wrong is not None:
            answer = _probe({**request, "trace": wrong}, Path(work))
            first = first_in_engine(loaded, wrong, answer.with_suffix(".safetensors"))
    return _Asked(comparisons, first)


def _probe(request: Mapping[str, Any], work: Path) -> Path:
    """Runs the probe.

    Raises:
        FxportError: the engine did not start or failed; with the end of what it printed.
    """
    (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
    answer = work / "answer.json"
    command = [sys.executable, "-m", "fxport.backends.vllm.probe"]
    done = subprocess.run(
        [*command, str(work / "request.json"), str(answer)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise FxportError(f"the engine failed:\n{said}")
    return answer


@dataclass(frozen=True)
class _Judged:
    comparison: Comparison
    tokens: list[int] | None  # the first sequence after which another token is predicted


def _judge(what: str, run: list[Any], prompts: list[list[int]], original: _Original) -> _Judged:
    """Greedy tokens and log-probabilities of one scenario against the original, token by token."""
    worst, detail, count = 0.0, "", 0
    wrong: list[int] | None = None
    for number, (prompt, (own, tokens, chosen)) in enumerate(zip(prompts, run, strict=True)):
        rows = original.logprobs([*prompt, *tokens[:-1]])
        after = range(len(prompt) - 1, len(prompt) - 1 + len(tokens))
        steps = [(r, t, p, True) for r, t, p in zip(after, tokens, chosen, strict=True)]
        if own is not None:
            steps += [(r, prompt[r + 1], p, False) for r, p in enumerate(own)]
        for row, token, logprob, greedy in steps:
            error = abs(float(rows[row, token]) - logprob)
            short = float(rows[row].max() - rows[row, token]) if greedy else 0.0
            count += 1
            worst = max(worst, error)
            if (error > original.bound or short > original.bound) and wrong is None:
                wrong = [*prompt, *tokens][: row + 1]
                better = f"; the original's best token is {int(rows[row].argmax())}"
                detail = (
                    f"prompt {number} ({len(prompt)} tokens), position {row}: token {token} by "
                    f"{error:.1e}{better if short > original.bound else ''}"
                )
    compared = f"{len(prompts)} prompts, {count} tokens"
    return _Judged(Comparison(what, compared, worst, original.bound, wrong is None, detail), wrong)
