"""Dropout of a divided model: the same elements on any number of ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxport
from fxport import ParallelContext
from fxport.parallel.dropout import KeyedDropout, StepSeed
from fxport.passes.tensor_parallel.boxes import select
from tests.parallel.models import HEAD, HIDDEN, VOCAB, WIDTH, Decoder
from tests.parallel.simulation import make, randomised

STEPS, RATE = 3, 0.3


class Attention(nn.Module):
    """Drops weights of attention, and results."""

    def __init__(self, heads: int = 6, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q, self.kv = nn.Linear(WIDTH, heads * HEAD), nn.Linear(WIDTH, 2 * kv_heads * HEAD)
        self.out, self.drop = nn.Linear(heads * HEAD, WIDTH), nn.Dropout(RATE)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, HEAD).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, self.kv_heads, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        rate = RATE if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate, enable_gqa=True)
        return self.drop(self.out(y.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """Drops hidden features, which are divided."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.drop = nn.Dropout(RATE)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.drop(F.gelu(self.up(x)))))


def model() -> nn.Module:
    return randomised(Decoder(Attention, Mlp))


def ids(step: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(step))


def run(module: fx.GraphModule) -> list[Tensor]:
    outputs = []
    for step in range(STEPS):
        y = module(ids(step))
        y.square().sum().backward()
        outputs.append(y.detach())
    return outputs


def seed_of(module: nn.Module) -> StepSeed:
    return next(m for m in module.modules() if isinstance(m, StepSeed))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_same_outputs_and_gradients_as_on_one_rank(world_size: int) -> None:
    original = model().train()
    whole = fxport.parallelize(original, ParallelContext(0, 1))
    torch.manual_seed(11)
    wanted = run(whole)
    assert not torch.allclose(wanted[0], original.eval()(ids(0))), "nothing was dropped"
    ranks = make(original.train(), world_size)
    # Ranks that are threads draw from one generator: they are given the numbers of the one rank.
    seeds: list[Tensor] = []
    seed_of(whole).register_forward_hook(lambda *a: seeds.append(a[2]))
    whole.zero_grad()
    torch.manual_seed(11)
    wanted = run(whole)
    for module in ranks.modules:
        step = iter(seeds)
        seed_of(module).register_forward_hook(lambda *_, step=step: next(step))
    for outputs in ranks.contexts[0].group.run(lambda rank: run(ranks.modules[rank])):
        for found, expected in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    for shard in ranks.modules[0].plan.parameters:
        full = whole.get_parameter(shard.name).grad
        for rank, module in enumerate(ranks.modules):
            part = select(full, shard.indices[rank])
            torch.testing.assert_close(
                module.get_parameter(shard.name).grad, part, rtol=1e-9, atol=1e-9, msg=shard.name
            )


def test_every_rank_uses_one_seed_and_every_place_and_step_another() -> None:
    ranks = make(model().train(), 2)
    found: list[list[int]] = [[], []]
    for rank, module in enumerate(ranks.modules):
        for part in module.modules():
            if isinstance(part, KeyedDropout):
                seen = found[rank]
                part.register_forward_hook(lambda _, a, __, seen=seen: seen.append(int(a[1])))
    ranks.contexts[0].group.run(lambda rank: run(ranks.modules[rank]))
    assert found[0] == found[1]
    assert len(found[0]) == len(set(found[0])) == STEPS * 3 * 4


def test_eval_mode_is_the_original_in_eval_mode() -> None:
    original = model().train()
    ranks = make(original, 2)
    wanted = original.eval()(ids(0))
    for y in ranks.contexts[0].group.run(lambda rank: ranks.modules[rank].eval()(ids(0))):
        torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-11)


def test_divided_in_eval_mode_it_refuses_to_train() -> None:
    module = make(model().eval(), 2).modules[0]
    assert not module.training
    with pytest.raises(fxport.FxportError, match=r"divided in eval mode.*model.train\(\)"):
        module.train()


def test_a_part_is_masked_like_the_whole() -> None:
    seed = torch.tensor([5])
    whole = KeyedDropout(RATE, (None, None), (None, None))(torch.ones(200, 90), seed)
    assert abs(float((whole == 0).double().mean()) - RATE) < 0.01
    torch.testing.assert_close(whole.max(), torch.tensor(1 / (1 - RATE)))
    index = (3, 4, 50, 89)
    part = KeyedDropout(RATE, (None, 90), (None, index))(torch.ones(200, 4), seed)
    assert torch.equal(part, whole[:, index])
    other = KeyedDropout(RATE, (None, None), (None, None))(torch.ones(200, 90), seed + 1)
    assert not torch.equal(other, whole)


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return y + torch.rand_like(y) if self.training else y


class OtherPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).tanh() if self.training else self.up(x)


@pytest.mark.parametrize("mlp", [Noise, OtherPath])
def test_more_than_dropout_is_refused(mlp: type[nn.Module]) -> None:
    with pytest.raises(fxport.FxportError, match="more than dropout is different"):
        fxport.parallelize(randomised(Decoder(Attention, mlp)).train(), ParallelContext(0, 2))
