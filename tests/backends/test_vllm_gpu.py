"""Serving on a GPU is exact: float32 greedy tokens of the engine against the original, recomputed.

float32 leaves vLLM two attention backends there. FlexAttention multiplies in float32. Triton's
multiplies in tf32, which keeps three bits more than bfloat16: its bound is the zoo's bound for
bfloat16 (`test_vllm_zoo.py`: 1/2) less three bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxport
from tests.backends.engine import Generated, assert_same, engine, generate, recompute, sharpened
from tests.zoo.gpt import GPT
from tests.zoo.llama import Llama

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

COUNT = 20
LENGTHS = (1, 3, 8, 21, 40, 67)
# vLLM divides whole heads only: 4 of them, not 3
MODELS = {
    "gpt": lambda: GPT(n_embd=128, n_head=4),
    "llama": lambda: Llama(complex_rope=False),
    "llama_complex": Llama,
}
EAGER: dict[str, Any] = {"enforce_eager": True, "max_num_batched_tokens": 32, "max_num_seqs": 8}
TF32 = 0.5 / 2**3
GRAPHS: dict[str, Any] = {"enforce_eager": False, "max_num_batched_tokens": 32, "max_num_seqs": 8}


@pytest.fixture(scope="module", params=sorted(MODELS))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]], list[Generated]]:
    """A saved port, prompts, and what the original says to them on the CPU."""
    model = sharpened(MODELS[request.param], seed=1)
    directory = fxport.port(model).save(tmp_path_factory.mktemp("ports") / request.param)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 97, (n,), generator=generator).tolist() for n in LENGTHS]
    return directory, prompts, [recompute(model, p, COUNT) for p in prompts]


@pytest.mark.parametrize(
    ("backend", "options", "bound"),
    [
        ("FLEX_ATTENTION", EAGER, 1e-4),
        ("TRITON_ATTN", EAGER, TF32),
        ("TRITON_ATTN", GRAPHS, TF32),
    ],
    ids=["flex-eager", "triton-eager", "triton-graphs"],
)
def test_greedy_tokens_with_chunked_prefill(
    case: tuple[Path, list[list[int]], list[Generated]],
    backend: str,
    options: dict[str, Any],
    bound: float,
) -> None:
    """The longest prompts come in several chunks, beside the decoding of the others."""
    directory, prompts, expected = case
    settings = {"attention_backend": backend, "gpu_memory_utilization": 0.3, **options}
    with engine(directory, **settings) as llm:
        found = generate(llm, prompts, COUNT)
    worst = max(
        abs(a - b)
        for one, other in zip(found, expected, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
    )
    print(f"log-probabilities differ by {worst:.1e}")
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert worst < bound


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", [EAGER, GRAPHS], ids=["eager", "graphs"])
def test_two_gpus(
    case: tuple[Path, list[list[int]], list[Generated]],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model divided over two GPUs: the tokens of the original, as closely as on one."""
    # this process has used CUDA, which a forked worker cannot use again
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    directory, prompts, expected = case
    settings = {"attention_backend": "FLEX_ATTENTION", "gpu_memory_utilization": 0.2, **options}
    settings |= {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(directory, **settings) as llm:
        try:
            found = generate(llm, prompts, COUNT)
        finally:
            llm.llm_engine.engine_core.shutdown()
    assert_same(found, expected)
