"""Training on ranks: clipping by the whole norm, checkpointing, torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxport
from fxport import ParallelContext
from fxport.nn import GenericTransformerForCausalLM, TransformerConfig
from fxport.nn.checkpoint import fill_model
from fxport.parallel import clip_grad_norm_
from fxport.passes.tensor_parallel.boxes import select
from tests.parallel.models import MODELS, VOCAB, Decoder
from tests.parallel.simulation import make, randomised
from tests.parallel.test_dropout import Attention, Mlp

NORMS = (2.0, 1.0, float("inf"))
Run = Callable[[Tensor], Tensor]


def batch(step: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(step))


def backward(run: Run, steps: int = 1) -> None:
    for step in range(steps):
        ids = batch(step)
        nn.functional.cross_entropy(run(ids).flatten(0, 1), ids.flatten()).backward()


# -- clipping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize(
    ("world_size", "name"),
    [(2, "split, tied"), (3, "chunk"), (4, "grouped, few kv heads"), (3, "multi-query")],
)
def test_clipping_counts_every_position_once(world_size: int, name: str, norm_type: float) -> None:
    """Uneven shards, key/value heads on several ranks, replicated norms and tied tables."""
    model = randomised(MODELS[name]())
    ranks = make(model, world_size)
    backward(model, 2)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type)
    assert norm > 0.11, "nothing would be clipped"

    def work(rank: int) -> Tensor:
        module = ranks.modules[rank]
        backward(module, 2)
        return clip_grad_norm_(module, 0.1, ranks.contexts[rank], norm_type)

    for found in ranks.contexts[0].group.run(work):
        torch.testing.assert_close(found, norm, rtol=1e-10, atol=0)
    for shard in ranks.modules[0].plan.parameters:
        whole = model.get_parameter(shard.name).grad
        for rank, module in enumerate(ranks.modules):
            part = select(whole, shard.indices[rank])
            torch.testing.assert_close(
                module.get_parameter(shard.name).grad, part, rtol=1e-9, atol=1e-11
            )


@pytest.mark.parametrize("norm_type", NORMS)
def test_clipping_the_building_blocks(norm_type: float) -> None:
    """Two ranks hold each key/value head; the table is padded; a module stands around it."""
    sizes = TransformerConfig(VOCAB, 24, 44, 4, 4, 2, tie_word_embeddings=True)
    whole = GenericTransformerForCausalLM(sizes).double()
    contexts = ParallelContext.simulated(4)
    parts = [GenericTransformerForCausalLM(sizes, context).double() for context in contexts]
    for part in parts:
        fill_model(part, {n: v.detach() for n, v in whole.state_dict().items()}.items())
    backward(whole)
    expected = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()], norm_type)

    def work(rank: int) -> tuple[Tensor, Tensor]:
        backward(parts[rank])
        outer = nn.ModuleDict({"inner": parts[rank]})
        before = clip_grad_norm_(outer, 1e9, contexts[rank], norm_type)
        clip_grad_norm_(outer, 0.25 * float(expected), contexts[rank], norm_type)
        return before, clip_grad_norm_(outer, 1e9, contexts[rank], norm_type)

    for before, after in contexts[0].group.run(work):
        torch.testing.assert_close(before, expected)
        torch.testing.assert_close(after, 0.25 * expected, rtol=1e-5, atol=0)


def test_clipping_refuses_another_number_of_ranks() -> None:
    ranks = make(randomised(MODELS["separate"]()), 2)
    with pytest.raises(fxport.FxportError, match="divided over 2 ranks, the context has 1"):
        clip_grad_norm_(ranks.modules[0], 1.0, ParallelContext(0, 1))


# -- two processes -----------------------------------------------------------------------------


def checkpointed(module: nn.Module) -> Run:
    """Backward runs every collective of forward a second time, in the same order on all ranks."""
    return lambda ids: checkpoint(module, ids, use_reentrant=False)


def reentrant(module: nn.Module) -> Run:
    """This kind needs an input with a gradient; without one torch computes none, and warns."""
    started = torch.zeros((), requires_grad=True)
    return lambda ids: checkpoint(lambda ids, _: module(ids), ids, started, use_reentrant=True)


def compiled(module: nn.Module) -> Run:
    """One graph with the collectives in it: a break would be an error.

    Inductor draws other random numbers than eager mode, unless it is told not to.
    """
    torch._inductor.config.fallback_random = True  # this process is the test's own
    return torch.compile(module, backend="vllm_generic", fullgraph=True)


MODES = {"checkpointed": checkpointed, "re-entrant": reentrant, "compiled": compiled}
STEPS = 3


def original() -> nn.Module:
    """The same weights in every process; dropout of attention weights and of all results."""
    torch.manual_seed(7)
    return randomised(Decoder(Attention, Mlp)).train()


def train(module: nn.Module, run: Run, clip: Callable[[], Tensor]) -> tuple[list[Tensor], Tensor]:
    """`STEPS` steps of clipped AdamW, two accumulated batches each: norms and last logits."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    norms = []
    for _ in range(STEPS):
        backward(run, 2)
        norms.append(clip())
        optimizer.step()
        optimizer.zero_grad()
    return norms, run(batch(0)).detach()


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2
    )
    try:
        context = ParallelContext.from_distributed()
        for mode in MODES:
            module = fxport.parallelize(original(), context)
            run = MODES[mode](module)
            torch.manual_seed(11)
            clip = functools.partial(clip_grad_norm_, module, 1.0, context)
            result = train(module, run, clip)
            torch.save((*result, module.state_dict()), f"{directory}/{mode}{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(path),), nprocs=2)
    return path


@pytest.fixture(scope="module")
def expected() -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """One rank, with its dropout; in eager mode, nothing computed twice."""
    model = fxport.parallelize(original(), ParallelContext(0, 1))
    torch.manual_seed(11)
    norms, logits = train(
        model, model, lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    )
    return norms, logits, dict(model.state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_steps_on_two_processes(
    mode: str, directory: Path, expected: tuple[list[Tensor], Tensor, dict[str, Tensor]]
) -> None:
    plan = fxport.plan(original(), 2)
    norms, logits, state = expected
    states = []
    for rank in range(2):
        found = torch.load(directory / f"{mode}{rank}.pt", weights_only=True)
        torch.testing.assert_close(found[0], norms, rtol=1e-9, atol=0)
        torch.testing.assert_close(found[1], logits, rtol=1e-8, atol=1e-9)
        states.append(found[2])
    full = fxport.gather_state_dict(plan, states)
    for name, value in state.items():
        torch.testing.assert_close(full[name], value, rtol=1e-8, atol=1e-8, msg=name)
