"""Serving is exact: the real engine against the original, recomputed in full each step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxport
from fxport.errors import SavedPortError
from tests.backends.engine import assert_same, engine, generate, recompute, sharpened
from tests.zoo.gpt import GPT
from tests.zoo.llama import Llama

pytestmark = pytest.mark.engine

LENGTHS = (1, 3, 8, 21, 40, 67)
COUNT = 20


def _gpt() -> torch.nn.Module:
    return sharpened(GPT, seed=1)


def _llama_complex() -> torch.nn.Module:
    return sharpened(Llama, seed=1)


def _llama_rotate_half() -> torch.nn.Module:
    return sharpened(lambda: Llama(complex_rope=False), seed=1)


MODELS = {"gpt": _gpt, "llama_complex": _llama_complex, "llama_rotate_half": _llama_rotate_half}
LIMITS = {"gpt": 160, "llama_complex": 144, "llama_rotate_half": 144}


class Case:
    """A model, its saved port, prompts and what the original says to them."""

    def __init__(self, build: Callable[[], torch.nn.Module], directory: Path, limit: int) -> None:
        self.model = build()
        port = fxport.port(self.model)
        self.directory = port.save(directory)
        self.report = port.report
        self.limit = limit
        generator = torch.Generator().manual_seed(5)
        self.prompts = [torch.randint(0, 97, (n,), generator=generator).tolist() for n in LENGTHS]
        self.expected = [recompute(self.model, p, COUNT) for p in self.prompts]


@pytest.fixture(scope="module", params=sorted(MODELS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("ports") / request.param
    return Case(MODELS[request.param], directory, LIMITS[request.param])


def test_context_depends_on_every_token(case: Case) -> None:
    """The comparison has power: another first token changes the continuation."""
    prompt = list(case.prompts[3])
    prompt[0] = (prompt[0] + 1) % 97
    assert recompute(case.model, prompt, COUNT).tokens != case.expected[3].tokens


def test_limit_is_found_in_the_model(case: Case) -> None:
    assert case.report.facts["max_position_embeddings"] == case.limit


def test_one_batch_of_different_lengths(case: Case) -> None:
    with engine(case.directory) as llm:
        assert_same(generate(llm, case.prompts, COUNT), case.expected)


def test_chunked_prefill(case: Case) -> None:
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_chunked_prefill": True}
    with engine(case.directory, **options) as llm:
        assert_same(generate(llm, case.prompts, COUNT), case.expected)


def test_prefix_caching(case: Case) -> None:
    """Two prompts share a prefix longer than a cache block, the second comes in a later batch."""
    generator = torch.Generator().manual_seed(6)
    prefix = torch.randint(0, 97, (80,), generator=generator).tolist()
    prompts = [[*prefix, 5, 6, 7], [*prefix, 11]]
    expected = [recompute(case.model, p, 8) for p in prompts]
    with engine(case.directory, enable_prefix_caching=True, block_size=32) as llm:
        for prompt, wanted in zip(prompts, expected, strict=True):
            assert_same(generate(llm, [prompt], 8), [wanted])
        output = llm.generate([{"prompt_token_ids": prompts[1]}], use_tqdm=False)
        assert output[0].num_cached_tokens >= 64


def test_context_up_to_the_limit(case: Case) -> None:
    """Prompt and answer together fill the context exactly."""
    generator = torch.Generator().manual_seed(7)
    prompt = torch.randint(0, 97, (case.limit - 12,), generator=generator).tolist()
    with engine(case.directory) as llm:
        assert llm.llm_engine.model_config.max_model_len == case.limit
        assert_same(generate(llm, [prompt], 12), [recompute(case.model, prompt, 12)])


def test_under_vllm_torch_compile(case: Case) -> None:
    with engine(case.directory, enforce_eager=False) as llm:
        assert_same(generate(llm, case.prompts, COUNT), case.expected)


_BARE = """
import sys
from vllm import LLM, SamplingParams
options = {"dtype": sys.argv[3]} if sys.argv[3:] else {}
llm = LLM(sys.argv[1], enforce_eager=True, skip_tokenizer_init=True, **options)
prompts = [{"prompt_token_ids": p} for p in eval(sys.argv[2])]
sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
outputs = llm.generate(prompts, sampling, use_tqdm=False)
print("TOKENS", [list(o.outputs[0].token_ids) for o in outputs])
assert "fxport" not in globals()
"""


def _bare(case: Case, *options: str) -> list[list[int]]:
    """Tokens from a program that imports no fxport; its engine runs in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    program = f"if __name__ == '__main__':\n    exec({_BARE!r})"
    done = subprocess.run(
        [sys.executable, "-c", program, str(case.directory), str(case.prompts), *options],
        capture_output=True,
        text=True,
        env=environment,
        cwd=case.directory.parent,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("TOKENS "))


def test_bare_llm_in_a_second_process(tmp_path: Path) -> None:
    case = Case(_gpt, tmp_path / "port", 160)
    assert _bare(case, "float32") == [e.tokens for e in case.expected]


def test_bare_llm_without_any_option(tmp_path: Path) -> None:
    """vLLM takes bfloat16 for a float32 checkpoint; the first token has room for its rounding."""
    case = Case(_llama_complex, tmp_path / "port", 144)
    found = _bare(case)
    assert [len(tokens) for tokens in found] == [COUNT] * len(LENGTHS)
    same = sum(f[0] == e.tokens[0] for f, e in zip(found, case.expected, strict=True))
    assert same >= len(LENGTHS) - 1


@pytest.mark.parametrize("name", ["layers.2.attention.wo.weight", "cos"])
def test_a_checkpoint_without_a_weight_or_a_table_is_refused(name: str, tmp_path: Path) -> None:
    """vLLM alone checks parameters only, and not all of them."""
    directory = fxport.port(_llama_rotate_half()).save(tmp_path / "port")
    (file,) = directory.glob("*.safetensors")
    content = load_file(file)
    del content[name]
    save_file(content, file)
    with (
        pytest.raises(SavedPortError, match=f"holds no values for `{name}`"),
        engine(directory) as llm,
    ):
        generate(llm, [[1, 2]], 1)
