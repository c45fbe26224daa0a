"""Real processes over gloo: outputs and every gradient over three accumulated steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fxport
from fxport.passes.tensor_parallel.boxes import select
from tests.parallel.models import MODELS, VOCAB
from tests.parallel.simulation import randomised

STEPS, BATCH, LENGTH = 3, 2, 7


def build(name: str) -> torch.nn.Module:
    """The same weights in every process."""
    torch.manual_seed(7)
    return randomised(MODELS[name]())


def steps() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    ids = torch.randint(0, VOCAB, (STEPS, BATCH, LENGTH))
    return ids, torch.randn(STEPS, BATCH, LENGTH, VOCAB, dtype=torch.float64)


def train(module: torch.nn.Module) -> list[torch.Tensor]:
    ids, weights = steps()
    outputs = []
    for step in range(STEPS):
        y = module(ids[step])
        (y * weights[step]).sum().backward()
        outputs.append(y.detach())
    return outputs


def worker(rank: int, world_size: int, name: str, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size
    )
    try:
        model = build(name)
        module = fxport.parallelize(model, fxport.ParallelContext.from_distributed())
        outputs = train(module)
        grads = {n: p.grad for n, p in module.named_parameters()}
        torch.save((outputs, grads, module.state_dict()), f"{directory}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("world_size", "name"), [(2, "unbind, packed GLU"), (4, "grouped, few kv heads")]
)
def test_processes_equal_the_unsharded_model(world_size: int, name: str, tmp_path: Path) -> None:
    mp.spawn(worker, args=(world_size, name, str(tmp_path)), nprocs=world_size)
    model = build(name)
    wanted = train(model)
    plan = fxport.plan(model, world_size)
    states = []
    for rank in range(world_size):
        outputs, grads, state = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        states.append(state)
        for found, expected in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        for shard in plan.parameters:
            expected = select(model.get_parameter(shard.name).grad, shard.indices[rank])
            torch.testing.assert_close(grads[shard.name], expected, rtol=1e-10, atol=1e-11)
    full = fxport.gather_state_dict(plan, states)
    for parameter, value in model.state_dict().items():
        assert torch.equal(full[parameter], value), parameter
