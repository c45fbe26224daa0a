"""bfloat16 on ranks is as far from the exact model as bfloat16 on one rank."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fxport.passes.tensor_parallel.boxes import select
from tests.parallel.models import MODELS, VOCAB
from tests.parallel.simulation import make, randomised

IDS = torch.randint(0, VOCAB, (3, 11), generator=torch.Generator().manual_seed(2))


def step(module: nn.Module) -> Tensor:
    y = module(IDS)
    nn.functional.cross_entropy(y.double().flatten(0, 1), IDS.flatten()).backward()
    return y.detach()


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", ["norm over all heads", "unbind, packed GLU"])
def test_bfloat16(name: str) -> None:
    narrow = randomised(MODELS[name]()).bfloat16()
    exact = copy.deepcopy(narrow).double()
    ranks = make(narrow, 4)
    wanted, one = step(exact), step(narrow)
    outputs = ranks.contexts[0].group.run(lambda rank: step(ranks.modules[rank]))
    assert all(torch.equal(outputs[0], y) and y.dtype == torch.bfloat16 for y in outputs)
    assert distance(outputs[0], wanted) < 1.5 * distance(one, wanted)
    total, reference = 0.0, 0.0
    for shard in ranks.modules[0].plan.parameters:
        whole = exact.get_parameter(shard.name).grad
        reference += float((narrow.get_parameter(shard.name).grad.double() - whole).square().sum())
        found = torch.zeros_like(whole)
        for rank, module in enumerate(ranks.modules):
            grad = module.get_parameter(shard.name).grad
            assert grad.dtype == torch.bfloat16
            error = (grad.double() - select(whole, shard.indices[rank])).square()
            grid = [
                torch.arange(n) if index is None else torch.tensor(index)
                for n, index in zip(shard.shape, shard.indices[rank], strict=True)
            ]
            found[torch.meshgrid(*grid, indexing="ij")] = error
        total += float(found.sum())
    assert total**0.5 < 1.5 * reference**0.5
