"""Asks a saved port in the real engine, in a process of its own; `fxport.verify` starts it.

    python -m fxport.backends.vllm.probe REQUEST.json ANSWER.json

REQUEST  {"directory", "dtype", "prompts", "new_tokens", "trace": prompt or null}
ANSWER   {"runs": {scenario: [[prompt log-probabilities or null, tokens, log-probabilities]]}}
         and, for a trace, ANSWER.safetensors: value of every node of the body at the prefill
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["main"]

# Before vLLM is imported: in this process, with a small cache, without a hub.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
_CHUNK = 16  # tokens a step: longer prompts are prefilled in pieces

Answer = list[list[Any]]


def main(request_file: str, answer_file: str) -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    if request["trace"] is not None:
        return _trace(request, Path(answer_file).with_suffix(".safetensors"))
    prompts, count = request["prompts"], request["new_tokens"]

    def at_once(llm: Any) -> dict[str, Answer]:
        together = _ask(llm, prompts, count, of_prompt=True)
        alone = [_ask(llm, [p], count, of_prompt=True)[0] for p in prompts]
        _ask(llm, prompts, 1, of_prompt=False)  # fills the prefix cache
        return {
            "engine: mixed batch": together,
            "engine: one at a time": alone,
            "engine: prefix cache": _ask(llm, prompts, count, of_prompt=False),
        }

    def in_chunks(llm: Any) -> dict[str, Answer]:
        return {"engine: chunked prefill": _ask(llm, prompts, count, of_prompt=False)}

    runs = {
        **_served(request, at_once),
        **_served(request, in_chunks, max_num_batched_tokens=_CHUNK, max_num_seqs=4),
    }
    Path(answer_file).write_text(json.dumps({"runs": runs}), encoding="utf-8")


def _served(request: dict[str, Any], ask: Callable[[Any], Any], **options: Any) -> Any:
    """What `ask` gets from an engine in this process, which is put away afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {
        "dtype": request["dtype"],
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "distributed_executor_backend": "uni",
        "enable_prefix_caching": True,
        **options,
    }
    result = ask(LLM(request["directory"], **settings))
    # An engine that is collected late takes its successor's process groups with it.
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


def _ask(llm: Any, prompts: list[list[int]], count: int, *, of_prompt: bool) -> Answer:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=count,
        ignore_eos=True,
        detokenize=False,
        logprobs=1,
        prompt_logprobs=0 if of_prompt else None,
    )
    inputs = [{"prompt_token_ids": p} for p in prompts]
    answers: Answer = []
    for prompt, output in zip(prompts, llm.generate(inputs, sampling, use_tqdm=False), strict=True):
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        chosen = [p[t].logprob for p, t in zip(completion.logprobs, tokens, strict=True)]
        own = None
        if of_prompt:
            rows = output.prompt_logprobs[1:]  # nothing predicts the first token
            own = [p[t].logprob for p, t in zip(rows, prompt[1:], strict=True)]
        answers.append([own, tokens, chosen])
    return answers


def _trace(request: dict[str, Any], file: Path) -> None:
    """The value of every node of the embedding and the body, at the prefill of one prompt."""
    import torch
    from safetensors.torch import save_file
    from torch import fx

    prompt = request["trace"]
    values: dict[str, torch.Tensor] = {}

    class Recorder(fx.Interpreter):
        def __init__(self, part: Any, label: str) -> None:
            super().__init__(part)
            self.label = label

        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor) and n.op in ("call_function", "call_module"):
                value = result.detach().cpu()
                value = torch.view_as_real(value) if value.is_complex() else value
                name = str(n.target) if n.op == "call_module" else n.name
                values[f"{len(values)}:{self.label}.{name}"] = value.clone().contiguous()
            return result

    def record(model: Any) -> None:
        for name in ("embed", "body"):
            part = getattr(model.model, name)
            setattr(model.model, name, _first_call(Recorder(part, name), part, len(prompt)))

    def ask(llm: Any) -> None:
        llm.apply_model(record)
        _ask(llm, [prompt], 1, of_prompt=False)

    _served(request, ask)
    save_file(values, str(file))


def _first_call(recorder: Any, part: Any, length: int) -> Any:
    """A module: the recorder for the first call with this many tokens, the part for all others."""
    from torch import nn

    class First(nn.Module):
        done = False

        def forward(self, *given: Any) -> Any:
            if self.done or given[0].shape[1] != length:
                return part(*given)
            self.done = True
            return recorder.run(*given)

    return First()


if __name__ == "__main__":
    main(*sys.argv[1:])
