"""Generate from a saved port with vLLM: nothing here imports fxport, nor the model's source.

python examples/serve.py out/model "Mara the baker kept nine pears in"
"""

import json
import os
import time

import click

# What makes a first run on a laptop pleasant; none of it is needed.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.argument("prompts", nargs=-1, required=True)
@click.option("--max-tokens", default=64, show_default=True)
@click.option("--json", "result", type=click.File("w"), help="Write tokens and timing here.")
def main(directory, prompts, max_tokens, result):
    from vllm import LLM, SamplingParams

    # Without a dtype vLLM would take bfloat16 for a float32 model: fast, but other numbers.
    llm = LLM(directory, dtype="float32", enforce_eager=True)
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=1)
    llm.generate(prompts[:1], greedy, use_tqdm=False)  # the first call warms up
    started = time.perf_counter()
    outputs = llm.generate(list(prompts), greedy, use_tqdm=False)
    seconds = time.perf_counter() - started

    completions = [output.outputs[0] for output in outputs]
    for prompt, completion in zip(prompts, completions, strict=True):
        click.echo(f"\n  {prompt}" + click.style(completion.text, fg="green"))
    if result:
        entries = [
            {
                "tokens": list(completion.token_ids),
                "logprobs": [
                    step[token].logprob
                    for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
                ],
            }
            for completion in completions
        ]
        json.dump({"seconds": seconds, "completions": entries}, result)


if __name__ == "__main__":
    main()
