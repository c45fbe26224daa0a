"""One family divided over simulated ranks, outputs and every gradient against the whole model.

In float64, `STEPS` accumulated steps; what a family computes in float32 whatever it is given (norms
often) keeps the differences at that rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxport.errors import FxportError, PortError
from fxport.parallel.api import parallelize_all
from fxport.parallel.context import ParallelContext
from fxport.parallel.plan import Plan
from fxport.passes.tensor_parallel.boxes import select
from fxport.tools.zoo_records import Result, one_reason

__all__ = ["judge_ranks"]

_WORLD_SIZES, _STEPS, _BATCH, _LENGTH = (2, 3), 2, 2, 19
_BOUND = 1e-4  # of the largest entry of a tensor; a share that is not summed is off by its half


def judge_ranks(family: str, model: nn.Module) -> Result:
    """``exact`` where all ranks of all numbers of ranks agree with the whole model."""
    model = model.double()
    switch = getattr(model, "set_experts_implementation", None)
    if switch is not None:
        switch("batched_mm")  # its grouped product knows bfloat16 only on the way back
    contexts = [ParallelContext.simulated(n) for n in _WORLD_SIZES]
    try:
        modules = parallelize_all(model, [c for group in contexts for c in group])
    except PortError as error:
        return Result(family, "refused", one_reason(error))
    except FxportError as error:
        return Result(family, "refused", " ".join(str(error).split())[:300])
    vocabulary = model.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr,operator]
    torch.manual_seed(5)
    ids = torch.randint(3, vocabulary, (_STEPS, _BATCH, _LENGTH))
    model.zero_grad(set_to_none=True)
    wanted = [_step(model, row) for row in ids]
    gradients = {n: p.grad for n, p in model.named_parameters()}
    details, outcome = [], "exact"
    for group in contexts:
        ranks, modules = modules[: len(group)], modules[len(group) :]

        def work(rank: int, ranks: list[Any] = ranks) -> list[Tensor]:
            return [_step(ranks[rank], row) for row in ids]

        found = group[0].group.run(work)
        output = max(_error(y, w) for ys in found for y, w in zip(ys, wanted, strict=True))
        gradient, where = _gradients(ranks, gradients)
        plan: Plan = ranks[0].plan  # type: ignore[assignment]  # put there by `parallelize`
        details.append(
            f"{len(group)} ranks: output {output:.0e}, gradients {gradient:.0e} ({where}), "
            f"{plan.count('forward')} + {plan.count('backward')} all-reduces, "
            f"{_share(plan):.0%} of the weights on a rank"
        )
        if not max(output, gradient) <= _BOUND:
            outcome = "wrong"
    return Result(family, outcome, "; ".join(details))


def _step(module: Any, ids: Tensor) -> Tensor:
    found = module(ids)
    logits: Tensor = found if isinstance(found, Tensor) else found.logits
    weights = torch.sin(torch.arange(logits.numel(), dtype=logits.dtype)).view_as(logits)
    (logits * weights).sum().backward()
    return logits.detach()


def _gradients(ranks: list[Any], whole: dict[str, Tensor | None]) -> tuple[float, str]:
    worst, where = 0.0, "none"
    for shard in ranks[0].plan.parameters:
        expected = whole[shard.name]
        for rank, module in enumerate(ranks):
            found = module.get_parameter(shard.name).grad
            if expected is None or found is None:
                if expected is not None and module.get_parameter(shard.name).numel():
                    return float("inf"), f"{shard.name} on rank {rank} has none"
                continue
            part = select(expected, shard.indices[rank])
            if part.numel():
                error = float((found - part).abs().max() / expected.abs().max().clamp(min=0.1))
                if not error <= worst:
                    worst, where = error, f"{shard.name} on rank {rank}"
    return worst, where


def _share(plan: Plan) -> float:
    whole = sum(torch.Size(p.shape).numel() for p in plan.parameters)
    return sum(torch.Size(p.local_shape(0)).numel() for p in plan.parameters) / whole


def _error(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())
