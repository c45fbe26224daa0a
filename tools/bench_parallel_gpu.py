"""Tensor-parallel training over NCCL: gradients against one GPU, and the time of a step.

    torchrun --nproc-per-node 2 -m fxport.tools.bench_parallel_gpu [--size 1b] [--length 2048]

Correctness: a Llama of 4 layers in float64 and float32; loss and every gradient of the divided
model on all ranks against the undivided model on rank 0's GPU. Speed: forward and backward of a
bf16 Llama, the undivided model on one GPU and the divided one, the same tokens; both eager, the
undivided one with and without fxport's attention (its graph divided over one rank).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import fxport
from fxport.passes.tensor_parallel.boxes import select
from fxport.tools.bench_llama import SIZES, Llama

__all__ = ["main"]


def _model(size: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The same random weights on every rank."""
    torch.manual_seed(11)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Llama(SIZES[size])
    torch.set_default_dtype(default)
    table = torch.float64 if dtype == torch.float64 else torch.float32
    model.cos, model.sin = model.cos.to(device, table), model.sin.to(device, table)
    return model.eval()


def _step(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    if logits.dtype == torch.float64:
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def compare(dtype: torch.dtype, device: torch.device) -> tuple[float, float, int]:
    """Worst relative errors of the loss and of a gradient over all ranks, and how many gradients.

    The error of a gradient is ``|found - expected| / |expected|`` in the Frobenius norm.
    """
    model = _model("tiny", dtype, device)
    module = fxport.parallelize(model, fxport.ParallelContext.from_distributed()).to(device)
    torch.manual_seed(13)
    ids = torch.randint(0, SIZES["tiny"].vocabulary, (3, 129), device=device)
    expected, found = _step(model, ids), _step(module, ids)
    errors = []
    for shard in module.plan.parameters:  # type: ignore[union-attr]
        whole = model.get_parameter(shard.name).grad
        own = module.get_parameter(shard.name).grad
        assert whole is not None and own is not None
        wanted = select(whole, shard.indices[dist.get_rank()])
        errors.append(((own - wanted).norm() / wanted.norm()).item())
    worst = torch.tensor(
        [((found - expected).abs() / expected.abs()).item(), max(errors)], device=device
    )
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst[0].item(), worst[1].item(), len(errors)


def _milliseconds(step: Callable[[], object], count: int = 12) -> tuple[float, float]:
    """Median time of a step and its quartile range, after 3 that are not counted."""
    for _ in range(3):
        step()
    times = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    lower, median, upper = statistics.quantiles([a.elapsed_time(b) for a, b in times], n=4)
    return median, upper - lower


def _timed(name: str, model: nn.Module, ids: Tensor) -> list[object]:
    def step() -> None:
        _step(model, ids)
        for parameter in model.parameters():
            parameter.grad = None

    torch.cuda.reset_peak_memory_stats()
    median, spread = _milliseconds(step)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return [name, f"{median:.1f} (+-{spread / 2:.1f})", median, f"{peak:.1f}"]


def _all_reduce_gbs(device: torch.device) -> float:
    """Bus bandwidth of an all-reduce of 256 MiB, GB/s."""
    value = torch.ones(2**27, dtype=torch.bfloat16, device=device)
    ranks = dist.get_world_size()
    median, _ = _milliseconds(lambda: dist.all_reduce(value))
    return value.nbytes * 2 * (ranks - 1) / ranks / median / 1e6


@click.command()
@click.option("--size", default="1b", show_default=True, type=click.Choice(sorted(SIZES)))
@click.option("--batch", default=4, show_default=True)
@click.option("--length", default=2048, show_default=True)
def main(size: str, batch: int, length: int) -> None:
    """Prints errors, then a table of times; run under torchrun."""
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("highest")
    say = click.echo if rank == 0 else lambda _: None
    for dtype in (torch.float64, torch.float32):
        loss, gradient, count = compare(dtype, device)
        say(f"{dtype}: loss {loss:.1e}, worst of {count} gradients {gradient:.1e}")
    bandwidth = _all_reduce_gbs(device)
    say(f"all-reduce of 256 MiB: {bandwidth:.0f} GB/s (bus)")
    torch.manual_seed(13)
    ids = torch.randint(0, SIZES[size].vocabulary, (batch, length), device=device)
    model = _model(size, torch.bfloat16, device)
    rows = [_timed("1 GPU, as written", model, ids)]
    module = fxport.parallelize(model, fxport.ParallelContext(0, 1)).to(device)
    rows.append(_timed("1 GPU, fxport's graph", module, ids))
    del module
    divided = fxport.parallelize(model, fxport.ParallelContext.from_distributed()).to(device)
    del model
    torch.cuda.empty_cache()
    dist.barrier()
    rows.append(_timed(f"{dist.get_world_size()} GPUs, fxport's graph", divided, ids))
    alone = rows[0][2]
    for row in rows:
        row[2] = f"{alone / row[2]:.2f}"  # type: ignore[operator]
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {size}, {batch} x {length}")
    say(tabulate(rows, ["", "forward + backward ms", "speed", "peak GiB"], tablefmt="github"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
