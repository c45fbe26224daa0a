"""The main job: train a plain GPT with flash attention, port it, generate with vLLM.

python examples/train_then_serve.py --out out

The model (models/gpt.py) and the server (serve.py) know nothing of fxport. Exit 1 if a single
token that vLLM generates differs from what the model itself would say.
"""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import torch
from models.gpt import GPT
from tales import tales
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import fxport

END = "<|end|>"
PROMPTS = [
    "Mara",
    "At noon Bram brought six walnuts to",
    "Tove the weaver was looking for Jonas. Jonas was not at the mill.",
    "Frost lay on the roofs until midday. On the way to the harbour Lotte found three eggs,",
    "Odo the miller kept nine pears in a blue jar. At dawn Ilse came by and asked for four of"
    " them.",
    "In the evening Wren brought five ribbons to the chapel, and Edda brought eight spoons."
    " They agreed to trade.",
]
MAX_TOKENS = 48


def make_tokenizer(texts):
    """A byte-level BPE trained on the spot."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def train(model, ids, steps, batch=8, peak=4e-3):
    """The usual loop; `backend="vllm_generic"` is the only line that differs. Returns losses."""
    length = model.block_size
    compiled = torch.compile(model.train(), backend="vllm_generic")
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.1)
    losses = []
    with tqdm(range(steps), desc="training (first step compiles)", unit="step") as progress:
        for step in progress:
            for group in optimizer.param_groups:
                warm = min(1.0, (step + 1) / 20)
                group["lr"] = peak * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            starts = torch.randint(len(ids) - length - 1, (batch,)).tolist()
            x = torch.stack([ids[i : i + length] for i in starts])
            y = torch.stack([ids[i + 1 : i + 1 + length] for i in starts])
            _, loss = compiled(x, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            progress.set_description("training")
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def draw(losses, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(losses)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title='backend="vllm_generic"')
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def serve(saved, out):
    """Runs serve.py; its warnings go to a file. Returns tokens, log-probabilities and time."""
    result, log = out / "served.json", out / "serve.log"
    command = [sys.executable, Path(__file__).parent / "serve.py", saved, *PROMPTS]
    command += ["--max-tokens", str(MAX_TOKENS), "--json", result]
    with log.open("w") as errors:
        status = subprocess.run(command, stderr=errors).returncode
    if status:
        sys.exit(f"vLLM failed (status {status}); the end of {log}:\n{log.read_text()[-2000:]}")
    return json.loads(result.read_text())


@torch.no_grad()
def recompute(model, ids, end):
    """What the model itself says: greedy, the whole sequence again for every token."""
    ids, tokens, logprobs = list(ids), [], []
    while len(tokens) < MAX_TOKENS and tokens[-1:] != [end]:
        logits, _ = model(torch.tensor([ids]))
        row = logits[0, -1].log_softmax(-1)
        tokens.append(int(row.argmax()))
        logprobs.append(float(row[tokens[-1]]))
        ids.append(tokens[-1])
    return tokens, logprobs


def compare(model, tokenizer, served):
    """Prints both speeds and whether the tokens agree; returns that."""
    started = time.perf_counter()
    own = [recompute(model, tokenizer.encode(p), tokenizer.eos_token_id) for p in PROMPTS]
    seconds = time.perf_counter() - started
    total = sum(len(tokens) for tokens, _ in own)
    equal, worst = 0, 0.0
    for prompt, (tokens, logprobs), got in zip(PROMPTS, own, served["completions"], strict=True):
        if tokens == got["tokens"]:
            equal += 1
            pairs = zip(logprobs, got["logprobs"], strict=True)
            worst = max(worst, *(abs(a - b) for a, b in pairs))
        else:
            click.echo(
                f"  differs after {prompt!r}:\n    model {tokens}\n    vLLM  {got['tokens']}"
            )
    click.echo(
        f"\nGreedy tokens equal the model's own, recomputed in full: {equal} of {len(PROMPTS)} "
        f"prompts ({total} tokens); log-probabilities differ by at most {worst:.1e}."
        f"\n{total / served['seconds']:.0f} tokens/s in vLLM, all prompts in one batch; "
        f"{total / seconds:.0f} tokens/s recomputed by the model, prompt by prompt."
    )
    return equal == len(PROMPTS)


def heading(text):
    click.secho(f"\n{text}", bold=True)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True)
@click.option("--steps", default=300, show_default=True, help="Training steps.")
def main(out, steps):
    torch.manual_seed(0)
    saved = out / "model"
    if (saved / "port_report.json").exists():  # of an earlier run
        shutil.rmtree(saved)
    out.mkdir(parents=True, exist_ok=True)

    heading("1. Train a plain GPT through torch.compile(model, backend='vllm_generic')")
    stories = tales(4000)
    tokenizer = make_tokenizer(stories)
    ids = torch.tensor(tokenizer.encode(END.join(stories)))
    model = GPT(vocab_size=len(tokenizer))
    size = sum(p.numel() for p in model.parameters())
    click.echo(f"{size / 1e6:.1f} million parameters, {len(ids):,} tokens of tales")
    losses = train(model, ids, steps)
    draw(losses, out / "loss.png")
    click.echo(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

    heading("2. Port it: fxport.port(model).save(...)")
    port = fxport.port(model)
    port.save(saved, tokenizer=tokenizer)
    port.report.to_html(out / "report.html")
    port.report.to_json(out / "report.json")
    click.echo(str(port.report))

    heading("3. Generate with vLLM: LLM(directory), in a program that never imports fxport")
    served = serve(saved, out)

    heading("4. Compare")
    same = compare(model.eval(), tokenizer, served)
    click.echo(f"\nIn {out}/: model/ (serve it again: python examples/serve.py {saved} 'Mara')")
    click.echo("  loss.png, report.html, report.json")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
