"""One vLLM engine in a process of its own, for `bench_engine_gpu`.

Each line of input asks for one thing, each line of output answers; all in JSON:

    {"start_s": 61.2}                                       once the engine has made a token
    {"do": "generate", "prompts": 512, "output": 128, "seed": 2}    ->  {"seconds": 2.1}
    {"do": "score"}                                         ->  {"logprobs": [...]}
    {"do": "profile"}                                       ->  {"text": "..."}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate

__all__ = ["PROMPT", "main", "scored_prompts"]

PROMPT = 512


def scored_prompts(vocabulary: int) -> torch.Tensor:
    """The tokens whose log-probabilities are compared, one prompt a row."""
    return torch.randint(0, vocabulary, (32, 128), generator=torch.Generator().manual_seed(5))


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
    ids = torch.randint(0, vocabulary, (prompts, PROMPT), generator=generator).tolist()
    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": p} for p in ids], sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert all(len(o.outputs[0].token_ids) == output for o in outputs)
    return seconds


def _score(llm: Any) -> list[float]:
    """Log-probability of every token of the scored prompts but the first."""
    from vllm import SamplingParams

    prompts = scored_prompts(llm.llm_engine.model_config.get_vocab_size()).tolist()
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [
        place[token].logprob
        for output, prompt in zip(outputs, prompts, strict=True)
        for place, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    ]


def _profiled(title: str, run: Callable[[], object]) -> str:
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
    head = f"\n{title}: {total:.1f} ms on the GPU, {sum(calls.values())} kernels\n"
    return head + tabulate(rows, ["ms", "calls", "kernel"], tablefmt="plain")


def _answer(llm: Any, asked: dict[str, Any]) -> dict[str, Any]:
    do = asked.pop("do")
    if do == "generate":
        return {"seconds": _generate(llm, **asked)}
    if do == "score":
        return {"logprobs": _score(llm)}
    assert do == "profile", do
    texts = [
        _profiled("one prompt of 512, 33 out", lambda: _generate(llm, 1, 33, seed=30)),
        _profiled("256 prompts of 512, 16 out", lambda: _generate(llm, 256, 16, seed=31)),
    ]
    return {"text": "\n".join(texts)}


def main() -> None:
    """The engine of the options in the first argument, until input ends."""
    options = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # vLLM logs there, workers too
    start = time.perf_counter()
    from vllm import LLM

    llm = LLM(**options)
    if options["load_format"] == "dummy":
        llm.apply_model(_fill_tables)
    _generate(llm, 1, 1, seed=0)
    print(json.dumps({"start_s": time.perf_counter() - start}), file=answers)
    for line in sys.stdin:
        print(json.dumps(_answer(llm, json.loads(line))), file=answers)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
