"""Four processes: all on one model, then two pairs of them beside DDP and FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fxport
from fxport import ParallelContext
from fxport.parallel import clip_grad_norm_
from tests.parallel.models import MODELS, VOCAB
from tests.parallel.simulation import randomised

# Two key/value heads: on 4 ranks two ranks hold each, on 2 ranks one.
NAME, STEPS, LIMIT = "grouped, few kv heads", 2, 0.5
State = dict[str, Tensor]


def original() -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(7)
    return randomised(MODELS[NAME]())


def batch(step: int, half: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(2 * step + half))


def train(module: nn.Module, halves: list[int], clip: Callable[[], Tensor]) -> list[Tensor]:
    """Clipped AdamW on the mean over `halves` of the batch; the norms before clipping."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    norms = []
    for step in range(STEPS):
        for half in halves:
            ids = batch(step, half)
            loss = nn.functional.cross_entropy(module(ids).flatten(0, 1), ids.flatten())
            (loss / len(halves)).backward()
        norms.append(clip())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


# -- the processes -----------------------------------------------------------------------------


def beside_ddp(module: fx.GraphModule, group: dist.ProcessGroup) -> nn.Module:
    return DistributedDataParallel(module, process_group=group)


def beside_fsdp(module: fx.GraphModule, group: dist.ProcessGroup) -> nn.Module:
    sharded: nn.Module = fully_shard(module, mesh=dist.DeviceMesh.from_group(group, "cpu"))
    return sharded


BESIDE = {"ddp": beside_ddp, "fsdp2": beside_fsdp}


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=4
    )
    try:
        alone(rank, directory)
        dist.barrier()
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        for name in BESIDE:
            pairs(name, mesh, directory)
    finally:
        dist.destroy_process_group()


def alone(rank: int, directory: str) -> None:
    context = ParallelContext.from_distributed()
    module = fxport.parallelize(original(), context)
    norms = train(module, [0, 1], lambda: clip_grad_norm_(module, LIMIT, context))
    torch.save((norms, module.state_dict()), f"{directory}/alone{rank}.pt")


def saved(directory: str) -> list[tuple[list[Tensor], State]]:
    return [torch.load(f"{directory}/alone{rank}.pt", weights_only=True) for rank in range(4)]


def pairs(name: str, mesh: dist.DeviceMesh, directory: str) -> None:
    """Goes on from what four ranks saved."""
    model = original()
    states = [state for _, state in saved(directory)]
    whole = fxport.gather_state_dict(fxport.plan(model, 4), states)
    context = ParallelContext.from_distributed(mesh["tensor"].get_group())
    module = fxport.parallelize(model, context)
    plan = module.plan
    module.load_state_dict(fxport.shard_state_dict(plan, whole, context.rank))
    wrapped = BESIDE[name](module, mesh["data"].get_group())
    half = mesh["data"].get_local_rank()
    norms = train(wrapped, [half], lambda: clip_grad_norm_(wrapped, LIMIT, context))
    state = {n: full(v.detach()) for n, v in module.state_dict().items()}
    torch.save(([full(n) for n in norms], state), f"{directory}/{name}{half}{context.rank}.pt")


# -- what one process computes -------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(path),), nprocs=4)
    return path


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[Tensor], State]]:
    """Norms and weights after the steps on four ranks, and after those on pairs."""
    model, result = original(), []
    for _ in range(2):
        norms = train(
            model, [0, 1], lambda: nn.utils.clip_grad_norm_(model.parameters(), LIMIT).detach()
        )
        result.append((norms, {n: v.clone() for n, v in model.state_dict().items()}))
    return result


def same(found: tuple[list[Tensor], State], wanted: tuple[list[Tensor], State]) -> None:
    assert all(norm > LIMIT for norm in wanted[0]), "nothing would be clipped"
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-9, atol=0)
    for name, value in wanted[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-8, atol=1e-9, msg=name)


def test_four_ranks(directory: Path, expected: list[tuple[list[Tensor], State]]) -> None:
    found = saved(str(directory))
    whole = fxport.gather_state_dict(fxport.plan(original(), 4), [state for _, state in found])
    for norms, _ in found:
        same((norms, whole), expected[0])
    model = original()
    model.load_state_dict(whole)  # on one rank


@pytest.mark.parametrize("name", BESIDE)
def test_pairs_of_ranks_go_on_from_what_four_saved(
    name: str, directory: Path, expected: list[tuple[list[Tensor], State]]
) -> None:
    plan = fxport.plan(original(), 2)
    for half in range(2):
        found = [
            torch.load(directory / f"{name}{half}{rank}.pt", weights_only=True) for rank in range(2)
        ]
        whole = fxport.gather_state_dict(plan, [state for _, state in found])
        for norms, _ in found:
            same((norms, whole), expected[1])
