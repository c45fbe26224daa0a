"""Hugging Face models, tiny and random, in the real engine: exact tokens through `tools/zoo.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import fxport
from fxport.api import _stated_length
from fxport.tools.zoo_configs import families, tiny_model
from fxport.tools.zoo_records import read

# Learned positions and a tied head; rotary GQA; QK-norm; softcaps, windows and scaled embeddings;
# ALiBi by column and fused qkv per head; parallel blocks with partial rotary; latent attention.
EXACT = ("gpt2", "llama", "qwen3", "gemma2", "bloom", "gpt_neox", "minicpm3")


@pytest.mark.engine
def test_tokens_are_the_originals(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "fxport.tools.zoo", "--families", ",".join(EXACT)]
    done = subprocess.run(
        [*command, "--results", str(file)], capture_output=True, text=True, check=False
    )
    results = {run.family: result.outcome for run, result in read(file).items()}
    assert results == dict.fromkeys(EXACT, "exact"), done.stdout
    assert done.returncode == 0


def test_the_config_names_the_length_where_the_code_bounds_none() -> None:
    port = fxport.port(tiny_model("llama", "sdpa"))
    assert port.serving.max_position_embeddings == 160
    (decision,) = [d for d in port.report.decisions if d.pass_name == "length"]
    assert "config" in decision.detail
    assert fxport.port(tiny_model("llama"), max_seq_len=300).serving.max_position_embeddings == 300


def test_the_generation_config_goes_with_the_model(tmp_path: Path) -> None:
    model = tiny_model("opt")  # counts its positions in floating point
    model.generation_config.update(temperature=0.25, eos_token_id=[2, 7])
    directory = fxport.port(model).save(tmp_path / "port")
    found = json.loads((directory / "generation_config.json").read_text())
    assert found["temperature"] == 0.25 and found["eos_token_id"] == [2, 7]
    assert model.config.use_cache  # off in the port; the model is as it was


def test_a_model_that_was_trained_and_has_generated(tmp_path: Path) -> None:
    """A bfloat16 checkpoint in training mode, with a tied head, after a call with a cache."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)
    port = fxport.port(model.train())
    assert model.training and model.config.use_cache
    assert port.serving.dtype == torch.bfloat16 and port.half is None
    assert port.serving.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert [d for d in port.report.decisions if d.pass_name == "self-check" and d.detail]


def test_the_length_of_a_model_that_also_takes_images() -> None:
    config = transformers.Gemma3Config(text_config={"max_position_embeddings": 96})
    model = torch.nn.Module()
    model.config = config
    assert _stated_length(model) == 96


def test_positions_counted_by_what_the_tokens_are_is_refused() -> None:
    """RoBERTa counts only tokens that are no padding: not a function of the position."""
    with pytest.raises(fxport.PortError) as refused:
        fxport.port(tiny_model("roberta"))
    assert any("cumsum" in r.message for r in refused.value.reasons)


def test_a_mixture_of_experts_runs_by_expert() -> None:
    """The default sorts tokens by expert; the original's configuration stays as it was."""
    model = tiny_model("mixtral")
    chosen = model.config._experts_implementation
    port = fxport.port(model)
    (decision,) = [d for d in port.report.decisions if d.subject == "experts"]
    assert chosen in decision.detail and chosen != "batched_mm"
    assert model.config._experts_implementation == chosen
    assert [d.subject for d in port.report.decisions if d.pass_name == "self-check"]
    assert len([d for d in port.report.decisions if d.pass_name == "experts"]) == 4 * 2
    assert not port.report.left()


def test_tiny_models_are_small_and_repeatable() -> None:
    assert {"llama", "gpt2", "mixtral"} <= set(families())
    one, other = tiny_model("llama"), tiny_model("llama")
    assert sum(p.numel() for p in one.parameters()) < 2e6
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
