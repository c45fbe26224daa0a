"""Models of public libraries, as they come: exact greedy tokens in the engine, or a true reason.

x-transformers comes with the test extra. litgpt pins packages that vLLM needs in other versions:
``pip install --no-deps litgpt lightning jsonargparse`` beside the rest to run its part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxport
from fxport.errors import PortError, ReasonCode
from tests.backends.engine import assert_same, engine, generate, recompute, sharpened

pytestmark = pytest.mark.engine

VOCAB, LIMIT = 61, 96


def x_transformers(wrapper: dict[str, Any] | None = None, **layers: Any) -> nn.Module:
    library = pytest.importorskip("x_transformers")
    return library.TransformerWrapper(
        num_tokens=VOCAB,
        max_seq_len=LIMIT,
        attn_layers=library.Decoder(dim=64, depth=4, heads=2, attn_dim_head=32, **layers),
        **(wrapper or {}),
    )


def litgpt(name: str, **given: Any) -> nn.Module:
    library = pytest.importorskip("litgpt")
    sizes = {
        "block_size": LIMIT, "n_layer": 4, "n_embd": 64, "n_head": 2, "head_size": 32,
        "vocab_size": VOCAB, "padded_vocab_size": VOCAB, "intermediate_size": 112,
    }  # fmt: skip
    return library.GPT(library.Config.from_name(name, **{**sizes, **given}))


EXACT = {
    "x: absolute positions": lambda: x_transformers(),
    "x: rotary, one kv head, GLU, rms": lambda: x_transformers(
        rotary_pos_emb=True, use_rmsnorm=True, ff_glu=True, ff_swish=True, attn_kv_heads=1
    ),
    "x: rotary, sdpa": lambda: x_transformers(rotary_pos_emb=True, attn_flash=True),
    "x: QK-norm": lambda: x_transformers(attn_qk_norm=True),
    "x: ALiBi": lambda: x_transformers(alibi_pos_bias=True, alibi_num_heads=2),
    "x: softcap": lambda: x_transformers(attn_softclamp_logits=True),
    "litgpt: pythia": lambda: litgpt("pythia-14m"),
    "litgpt: Llama 3.2": lambda: litgpt("Llama-3.2-1B", n_query_groups=1),
    "litgpt: Mixtral": lambda: litgpt(
        "Mixtral-8x7B-v0.1", n_query_groups=1, n_expert=4, n_expert_per_token=2
    ),
    "litgpt: Gemma 2": lambda: litgpt("Gemma-2-2b", n_query_groups=1, sliding_window_size=16),
}
REFUSED = {
    "x: learned relative positions": (
        lambda: x_transformers(rel_pos_bias=True), ReasonCode.UNSUPPORTED_FEATURE,
    ),
    "x: token shift": (lambda: x_transformers(shift_tokens=1), ReasonCode.MIXES_TOKENS),
    "x: memory tokens": (
        lambda: x_transformers({"num_memory_tokens": 3}), ReasonCode.MIXES_TOKENS,
    ),
    "x: talking heads": (
        lambda: x_transformers(attn_pre_talking_heads=True), ReasonCode.WEIGHTS_USED_ELSEWHERE,
    ),
}  # fmt: skip
ENGINE = ("x: rotary, one kv head, GLU, rms", "litgpt: Mixtral")


@pytest.mark.parametrize("name", EXACT)
def test_it_is_ported(name: str) -> None:
    """`fxport.port` compares with the original itself."""
    torch.manual_seed(0)
    reasons = [d.reason for d in fxport.port(EXACT[name]().eval()).report.decisions if d.reason]
    assert {r.code for r in reasons} <= {ReasonCode.NOT_ATTENTION, ReasonCode.EVERY_TOKEN}


@pytest.mark.parametrize("name", ENGINE)
def test_greedy_tokens_are_exact(name: str, tmp_path: Path) -> None:
    model = sharpened(EXACT[name], 1)
    directory = fxport.port(model).save(tmp_path / "port")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (1, 4, 33, 70)]
    expected = [recompute(model, p, 12) for p in prompts]
    with engine(directory, max_num_batched_tokens=48, max_num_seqs=8) as llm:
        assert_same(generate(llm, prompts, 12), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str) -> None:
    build, code = REFUSED[name]
    with pytest.raises(PortError) as caught:
        fxport.port(build().eval())
    reason = caught.value.reasons[0]
    assert reason.code is code
    assert reason.location is not None and "x_transformers" in reason.location.file
