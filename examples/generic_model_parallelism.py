"""Tensor parallelism by hand, in three steps; no step needs a GPU.

python examples/generic_model_parallelism.py mlp         # 2 ranks against 1
python examples/generic_model_parallelism.py attention   # batch and packed, 2 ranks against 1
python examples/generic_model_parallelism.py model       # train on 2 ranks, save, serve with vLLM
python examples/generic_model_parallelism.py model --tensor-parallel-size 2

The first two run their ranks as threads of this process; with torch.distributed the only change
is `ParallelContext.from_distributed()`. Exit 1 if ranks, or model and vLLM, disagree.
"""

import os
import sys
import tempfile
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import nn

import fxport
from fxport import ParallelContext
from fxport.nn import (
    ColumnParallelLinear,
    GenericTransformerForCausalLM,
    RowParallelLinear,
    VLLMFlashAttention,
    load_model,
    save_model,
)

NAME = "ParallelExample"
CONFIG = {
    "fxport_builder": NAME,  # the name that is registered below; no code goes into config.json
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


class MLP(nn.Module):
    """One all-reduce forward (in `down`), one backward (in `up`)."""

    def __init__(self, parallel_context):
        super().__init__()
        self.up = ColumnParallelLinear(48, 192, parallel_context=parallel_context)
        self.down = RowParallelLinear(192, 48, parallel_context=parallel_context)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def on_ranks(world_size, make, compute):
    """`compute(module)` on every rank; the same seed draws the same model on any number of them."""
    contexts = ParallelContext.simulated(world_size)
    modules = []
    for context in contexts:
        torch.manual_seed(0)
        modules.append(make(context).double())
    if world_size == 1:
        return [compute(modules[0])]
    return contexts[0].group.run(lambda rank: compute(modules[rank]))


def compare(label, make, compute):
    (expected,), found = on_ranks(1, make, compute), on_ranks(2, make, compute)
    worst = max(
        float((a - b).detach().abs().max())
        for rank in found
        for a, b in zip(rank, expected, strict=True)
    )
    click.echo(f"{label}: 2 ranks differ from 1 by at most {worst:.1e}")
    if worst > 1e-10:
        sys.exit(1)


def forward_and_backward(inputs, *arguments):
    def compute(module):
        x = inputs.clone().requires_grad_()
        y = module(x, *arguments)
        y.square().sum().backward()
        return y, x.grad

    return compute


@click.group()
def main():
    """See the top of the file."""


@main.command()
def mlp():
    """A tensor-parallel MLP."""
    compare("MLP, output and gradient", MLP, forward_and_backward(torch.randn(2, 7, 48).double()))


@main.command()
def attention():
    """Flash attention over a batch and over packed sequences."""

    def make(context):
        return VLLMFlashAttention(48, 6, 2, rope_base=10000.0, parallel_context=context)

    batch, packed = torch.randn(2, 7, 48).double(), torch.randn(12, 48).double()
    bounds = torch.tensor([0, 4, 5, 12], dtype=torch.int32)
    compare("batch [2, 7, 48]", make, forward_and_backward(batch))
    compare("packed [12, 48]", make, forward_and_backward(packed, None, bounds))


# -- the whole model ---------------------------------------------------------------------------


class Settings:
    """CONFIG with attributes, as `build` gets it from vLLM."""

    def __init__(self, entries):
        self.__dict__.update(entries)


def build(config, parallel_context):
    """vLLM calls this in every worker, after it has set up its groups."""
    return GenericTransformerForCausalLM(config, parallel_context)


fxport.register_model(NAME, build)


def train(model, steps):
    """The usual loop, on every rank with the same data: count up by threes."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        starts = torch.randint(61, (8, 1), generator=generator)
        ids = (starts + 3 * torch.arange(25)) % 61
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@main.command()
@click.option("--tensor-parallel-size", default=1, show_default=True, help="Ranks in vLLM.")
@click.option("--steps", default=60, show_default=True, help="Training steps.")
def model(tensor_parallel_size, steps):
    """Train on 2 ranks, save, load on 1, serve with vLLM."""
    contexts = ParallelContext.simulated(2)
    parts = []
    for context in contexts:
        torch.manual_seed(0)
        parts.append(build(Settings(CONFIG), context))
    directory = Path(tempfile.mkdtemp()) / "my_model"

    def work(rank):
        losses = train(parts[rank], steps)
        save_model(parts[rank], directory, CONFIG, contexts[rank])
        return losses

    losses = contexts[0].group.run(work)[0]
    click.echo(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} on 2 ranks; saved to {directory}")

    whole = build(Settings(CONFIG), ParallelContext(0, 1))
    load_model(whole, directory)
    prompts = [[0, 3, 6], [10, 13], [40, 43, 46, 49]]
    own = [continued(whole, prompt, 8) for prompt in prompts]
    served = generated(directory, prompts, 8, tensor_parallel_size)
    for prompt, tokens in zip(prompts, served, strict=True):
        click.echo(f"  {prompt} -> {tokens}")
    click.echo(f"vLLM on {tensor_parallel_size} rank(s) agrees: {own == served}")
    sys.exit(0 if own == served else 1)


@torch.no_grad()
def continued(model, ids, count):
    """Greedy, the whole sequence again for every token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


def generated(directory, prompts, count, tensor_parallel_size):
    """Greedy, by vLLM, in one batch."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if tensor_parallel_size == 2:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    # Workers that are spawned instead of forked import this module, and so register the model.
    os.environ["FXPORT_MODELS"] = Path(__file__).stem
    folder = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(directory),
        dtype="float32",
        skip_tokenizer_init=True,
        tensor_parallel_size=tensor_parallel_size,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    main()
