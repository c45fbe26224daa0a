"""The real vLLM engine on the CPU, in this process; and the original model, recomputed in full."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxport.tools.zoo_configs import sharpen

# Before vLLM is imported: in process, a small cache, no hub.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextlib.contextmanager
def engine(directory: Path, **options: Any) -> Iterator[Any]:
    """A bare `LLM(directory)` in float32 without a tokenizer."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "distributed_executor_backend": "uni",
        **options,
    }
    # An engine that is collected late takes its successor's process groups with it.
    gc.collect()
    try:
        llm = LLM(str(directory), **settings)
        yield llm
    finally:
        llm = None
        cleanup_dist_env_and_memory()


@dataclass(frozen=True)
class Generated:
    """Token ids and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


def generate(llm: Any, prompts: Sequence[Sequence[int]], count: int) -> list[Generated]:
    """Greedy continuation of each prompt by exactly `count` tokens, one batch."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=1
    )
    inputs = [{"prompt_token_ids": list(p)} for p in prompts]
    results = []
    for output in llm.generate(inputs, sampling, use_tqdm=False):
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        chosen = [p[t].logprob for p, t in zip(completion.logprobs, tokens, strict=True)]
        results.append(Generated(tokens, chosen))
    return results


@torch.no_grad()
def recompute(model: torch.nn.Module, prompt: Sequence[int], count: int) -> Generated:
    """Greedy continuation by the original, the whole sequence again for every token.

    Raises:
        AssertionError: the two best tokens are closer than float noise, so that "greedy" would
            not be defined: the test's seed is badly chosen.
    """
    model.eval()
    ids, tokens, logprobs = list(prompt), [], []
    for _ in range(count):
        output = model(torch.tensor([ids]))
        output = output["logits"] if isinstance(output, dict) else output
        logits = output[0] if isinstance(output, tuple) else output
        row = logits[0, -1].double().log_softmax(-1)
        best = row.topk(2)
        assert best.values[0] - best.values[1] > 1e-3, "ambiguous top-1: choose another seed"
        tokens.append(int(best.indices[0]))
        logprobs.append(float(best.values[0]))
        ids.append(tokens[-1])
    return Generated(tokens, logprobs)


def assert_same(found: Sequence[Generated], expected: Sequence[Generated]) -> None:
    """The same tokens, and log-probabilities within 1e-4."""
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        worst = max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True))
        assert worst < 1e-4, f"log-probabilities differ by {worst:.1e}"


def sharpened(build: Callable[[], torch.nn.Module], seed: int) -> torch.nn.Module:
    """Random weights large enough that the best token is clear and depends on the context."""
    torch.manual_seed(seed)
    return sharpen(build(), seed, spread=2.5)
