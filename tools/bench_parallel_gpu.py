"""Tensor-parallel training over NCCL: gradients against one GPU, and the time of a step.

    torchrun --nproc-per-node 2 -m fxport.tools.bench_parallel_gpu [--sizes 1b,gpt] [--length 2048]
                                                                   [--variants ...]

Correctness: a Llama of 4 layers and a GPT of 4 layers, attention by hand, in float64 and float32;
loss and every gradient of the divided model on all ranks against the undivided model on rank 0's
GPU, with the loss on gathered logits, with `fxport.parallel.TokenLoss`, and with that compiled,
without and with CUDA graphs.
Speed: forward and backward in bf16 of a Llama or, ``gpt``, of the 350M GPT of
`bench_training_gpu`, the same tokens:

* alone: the undivided model on one GPU; divided: over all, its logits gathered;
* divided-loss: with `TokenLoss`, which leaves them divided;
* each with ``-compiled``: through torch.compile with `vllm_generic`; with ``-graphs``: also with
  ``mode="reduce-overhead"``, which launches a step's kernels and collectives as CUDA graphs;
* divided-loss-overlapped: also Inductor's reordering of collectives.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import TypeAlias

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, fx, nn

import fxport
from fxport.parallel import TokenLoss
from fxport.passes.tensor_parallel.boxes import select
from fxport.tools.bench_llama import SIZES, Llama
from fxport.tools.bench_training_gpu import GPT, VOCABULARY

__all__ = ["main"]

VARIANTS = (
    "alone",
    "alone-compiled",
    "alone-graphs",
    "divided",
    "divided-compiled",
    "divided-loss",
    "divided-loss-compiled",
    "divided-loss-graphs",
    "divided-loss-overlapped",
)
_GPT = {"gpt-tiny": 4, "gpt": 24}  # layers
_VOCABULARY = dict.fromkeys(_GPT, VOCABULARY) | {k: v.vocabulary for k, v in SIZES.items()}
# what Inductor's config recommends
_OVERLAP = (
    "reorder_communication_preserving_peak_memory",
    "sink_waits_iterative",
    "reorder_communication_preserving_peak_memory",
)


def _model(size: str, length: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The same random weights on every rank."""
    torch.manual_seed(11)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    model: nn.Module
    with torch.device(device):
        if size in _GPT:
            model = GPT(length, layers=_GPT[size])
        else:
            model = Llama(SIZES[size])
            table = torch.float64 if dtype == torch.float64 else torch.float32
            model.cos, model.sin = model.cos.to(device, table), model.sin.to(device, table)
    torch.set_default_dtype(default)
    return model.eval()


class _Gathered(nn.Module):
    """The loss on the whole logits of each rank."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(ids).flatten(0, 1)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets.flatten())


def _compiled(loss: nn.Module, graphs: bool) -> nn.Module:
    from fxport.backends.dynamo import vllm_generic

    mode = "reduce-overhead" if graphs else None
    compiled = torch.compile(loss, backend=vllm_generic, mode=mode, dynamic=False)
    assert isinstance(compiled, nn.Module)
    return compiled


_Say: TypeAlias = Callable[[str], None]

_WRAPS: dict[str, Callable[[fx.GraphModule], nn.Module]] = {
    "gathered logits": _Gathered,
    "divided logits": TokenLoss,
    "divided logits, compiled": lambda m: _compiled(TokenLoss(m), False),
    "divided logits, CUDA graphs": lambda m: _compiled(TokenLoss(m), True),
}
_RUNS = 4  # Inductor runs a graph before it records it, and records before it replays


def _batch(size: str, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same token ids and next tokens on every rank; none follows the last."""
    generator = torch.Generator().manual_seed(13)
    ids = torch.randint(0, _VOCABULARY[size], (batch, length), generator=generator)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    return ids.to(device), targets.to(device)


def _step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss: Tensor = model(*batch)
    loss.backward()
    return loss.detach()


def compare(
    size: str, dtype: torch.dtype, device: torch.device, wrap: Callable[[fx.GraphModule], nn.Module]
) -> tuple[float, float, int]:
    """Worst relative errors of the loss and of a gradient over all ranks, and how many gradients.

    The error of a gradient is ``|found - expected| / |expected|`` in the Frobenius norm.
    """
    model = _model(size, 256, dtype, device)
    module = fxport.parallelize(model, fxport.ParallelContext.from_distributed()).to(device)
    batch = _batch(size, 3, 129, device)
    expected = _step(_Gathered(model), batch)
    loss = wrap(module)
    for _ in range(_RUNS):
        module.zero_grad()
        found = _step(loss, batch)
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


def _timed(
    variant: str, model: nn.Module, divided: fx.GraphModule, batch: tuple[Tensor, Tensor]
) -> list[object]:
    """Name, time, median, loss, peak, seconds of the first step."""
    kind, *how = variant.split("-")
    loss: nn.Module = _Gathered(model if kind == "alone" else divided)
    if "loss" in how:
        loss = TokenLoss(divided)
    if not {"compiled", "overlapped", "graphs"}.isdisjoint(how):
        torch._dynamo.reset()
        torch._inductor.config.reorder_for_compute_comm_overlap = "overlapped" in how
        torch._inductor.config.reorder_for_compute_comm_overlap_passes = list(_OVERLAP)
        loss = _compiled(loss, "graphs" in how)

    def step() -> Tensor:
        found = _step(loss, batch)
        for parameter in loss.parameters():
            parameter.grad = None
        return found

    dist.barrier()
    start = time.perf_counter()
    step().item()
    first = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    median, spread = _milliseconds(step)
    value = step().item()  # the last: with graphs, of a replay
    peak = torch.cuda.max_memory_allocated() / 2**30
    time_ms = f"{median:.1f} (+-{spread / 2:.1f})"
    return [variant, time_ms, median, f"{value:.4f}", f"{peak:.1f}", f"{first:.0f}"]


def _forget_graphs() -> None:
    """NCCL gives up a communicator only after the CUDA graphs that hold its kernels."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    torch._dynamo.reset()
    reset_cudagraph_trees()
    gc.collect()
    torch.cuda.synchronize()


def _all_reduce_gbs(device: torch.device) -> float:
    """Bus bandwidth of an all-reduce of 256 MiB, GB/s."""
    value = torch.ones(2**27, dtype=torch.bfloat16, device=device)
    ranks = dist.get_world_size()
    median, _ = _milliseconds(lambda: dist.all_reduce(value))
    return value.nbytes * 2 * (ranks - 1) / ranks / median / 1e6


def _speeds(size: str, batch: int, length: int, variants: list[str], say: _Say) -> None:
    """Prints the table of one size."""
    device = torch.device("cuda", torch.cuda.current_device())
    ids = _batch(size, batch, length, device)
    model = _model(size, length, torch.bfloat16, device)
    context = fxport.ParallelContext.from_distributed()
    divided = fxport.parallelize(model, context).to(device)
    rows: list[list[object]] = []
    for variant in variants:
        rows.append(_timed(variant, model, divided, ids))
        say(f"{rows[-1]}")  # what has been measured survives a cut
        gc.collect()
        torch.cuda.empty_cache()
    alone = rows[0][2]
    for row in rows:
        row[2] = f"{alone / row[2]:.2f}"  # type: ignore[operator]
    headers = [f"{dist.get_world_size()} GPUs", "forward + backward ms", "speed", "loss"]
    headers += ["peak GiB", "first s"]
    say(f"{size}, {batch} x {length}\n" + tabulate(rows, headers, tablefmt="github"))


@click.command()
@click.option("--sizes", default="1b,gpt", show_default=True)
@click.option("--batch", default=4, show_default=True)
@click.option("--length", default=2048, show_default=True)
@click.option("--variants", default=",".join(VARIANTS), show_default=True)
@click.option("--compare/--no-compare", "check", default=True)
def main(sizes: str, batch: int, length: int, variants: str, check: bool) -> None:
    """Prints errors, then a table of times for each size; run under torchrun."""
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    torch.set_float32_matmul_precision("highest")
    say: _Say = click.echo if rank == 0 else lambda _: None
    for size in ("tiny", "gpt-tiny") if check else ():
        for dtype in (torch.float64, torch.float32):
            for name, wrap in _WRAPS.items():
                loss, gradient, count = compare(size, dtype, device, wrap)
                worst = f"loss {loss:.1e}, worst of {count} gradients {gradient:.1e}"
                say(f"{size}, {dtype}, {name}: {worst}")
    say(f"all-reduce of 256 MiB: {_all_reduce_gbs(device):.0f} GB/s (bus)")
    ranks = dist.get_world_size()
    say(f"{ranks} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for size in filter(None, sizes.split(",")):
        _speeds(size, batch, length, variants.split(","), say)
    _forget_graphs()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
