"""Two ranks of the real engine, each a process: the tokens of the original, half the weights."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fxport
from tests.backends.engine import assert_same, engine, generate, recompute, sharpened
from tests.zoo.gemma import Gemma
from tests.zoo.gpt import GPT
from tests.zoo.llama import Llama
from tests.zoo.mpt import MPT
from tests.zoo.oss import OSS
from tests.zoo.styles import STYLES

pytestmark = pytest.mark.engine

COUNT = 12
LENGTHS = (1, 4, 19, 33, 70)


@dataclass(frozen=True)
class Case:
    """A model, a seed at which greedy decoding is unambiguous, and what its engine is made of.

    Attributes:
        layers: vLLM's layers on a rank, by class.
        share: at most this part of the weights on a rank.
    """

    build: Callable[[], torch.nn.Module]
    layers: dict[str, int]
    share: float = 0.55
    seed: int = 1


# Packed qkv and a tied head; grouped heads and rotary; one kv head; ALiBi.
QUICK = {
    "gpt": Case(
        lambda: GPT(n_head=4),
        {
            "MergedColumnParallelLinear": 4,
            "ColumnParallelLinear": 4,
            "RowParallelLinear": 8,
            "VocabParallelEmbedding": 1,
            "ParallelLMHead": 1,
        },
    ),
    "llama": Case(
        partial(Llama, complex_rope=False),
        {
            "ColumnParallelLinear": 20,
            "RowParallelLinear": 8,
            "VocabParallelEmbedding": 1,
            "ParallelLMHead": 1,
        },
    ),
    "falcon": Case(STYLES["falcon"], {"QKVParallelLinear": 4, "RowParallelLinear": 8}),
    "mpt": Case(
        lambda: MPT(heads=4), {"MergedColumnParallelLinear": 4, "RowParallelLinear": 8}, seed=2
    ),
}
LONG = {
    # 177 and 176 hidden units: vLLM's layers, padded and filled by the port's own loader
    "uneven": Case(partial(Llama, complex_rope=False, hidden=353), {"RowParallelLinear": 8}),
    # the experts' three-dimensional weights too
    "sinks, experts": Case(OSS, {"RowParallelLinear": 4}),
    "gemma": Case(Gemma, {"RowParallelLinear": 8}),
    "qwen3": Case(STYLES["qwen3"], {"RowParallelLinear": 8}),
    "olmo2": Case(STYLES["olmo2"], {"RowParallelLinear": 8}),
    "beside": Case(STYLES["weights beside modules"], {}),
}


@contextlib.contextmanager
def two_ranks(directory: Path, patch: pytest.MonkeyPatch, **options: Any) -> Iterator[Any]:
    """An engine of two worker processes, one CPU core each."""
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    settings = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", **options}
    with engine(directory, max_num_batched_tokens=48, max_num_seqs=8, **settings) as llm:
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


def facts(worker: Any) -> tuple[int, Counter[str], Any]:
    """Of one rank: bytes of its parameters as made, its vLLM layers by class, the plan."""
    model = worker.get_model()
    layers = Counter(
        type(m).__name__ for m in model.modules() if type(m).__module__.startswith("vllm.model")
    )
    return model.model.weight_bytes, layers, model.model.plan


def check(case: Case, directory: Path, patch: pytest.MonkeyPatch, **options: Any) -> None:
    model = sharpened(case.build, case.seed)
    port = fxport.port(model).save(directory)
    generator = torch.Generator().manual_seed(5)
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    most = min([97, *tables])
    prompts = [torch.randint(0, most, (n,), generator=generator).tolist() for n in LENGTHS]
    expected = [recompute(model, p, COUNT) for p in prompts]
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    with two_ranks(port, patch, **options) as llm:
        assert_same(generate(llm, prompts, COUNT), expected)
        ranks = llm.collective_rpc(facts)
    assert len(ranks) == 2
    for size, layers, plan in ranks:
        print(f"{size:,} of {whole:,} bytes; {plan.count('forward')} all-reduces; {dict(layers)}")
        assert size < case.share * whole
        assert {name: layers[name] for name in case.layers} == case.layers


@pytest.mark.parametrize("name", QUICK)
def test_tokens_are_exact(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(QUICK[name], tmp_path / "port", monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_further_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(LONG[name], tmp_path / "port", monkeypatch)


@pytest.mark.long
def test_under_vllms_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(QUICK["llama"], tmp_path / "port", monkeypatch, enforce_eager=False)
