"""The loss on divided logits: the value and the gradients of the undivided model's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxport
from fxport import ParallelContext
from fxport.parallel import TokenLoss
from fxport.parallel.modules import Gather
from fxport.passes.tensor_parallel.boxes import select
from tests.parallel.models import MODELS, VOCAB, WIDTH, Mlp
from tests.parallel.simulation import Ranks, make, randomised


class Small(nn.Module):
    """What the loss sees of a model: a tied head whose vocabulary does not divide by 2 or 3."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.mlp = Mlp()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.mlp(x))


class Capped(Small):
    """Does more with the logits than the head."""

    def forward(self, ids: Tensor) -> Tensor:
        return 2.0 * torch.tanh(super().forward(ids) / 2.0)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids, targets = torch.randint(0, VOCAB, (2, 2, 7), generator=generator)
    targets[0, 2:5] = -100
    return ids, targets


def reference(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.detach()


def losses(ranks: Ranks, ids: Tensor, targets: Tensor) -> list[Tensor]:
    modules = [TokenLoss(m) for m in ranks.modules]

    def work(rank: int) -> Tensor:
        loss = modules[rank](ids, targets)
        loss.backward()
        return loss.detach()

    return ranks.contexts[0].group.run(work)


@pytest.mark.parametrize(
    ("world_size", "build", "gathers"),
    [(2, MODELS["split, tied"], False), (3, Small, False), (2, Capped, True)],
    ids=["decoder", "uneven vocabulary", "logits used further"],
)
def test_loss_and_gradients(world_size: int, build: type[nn.Module], gathers: bool) -> None:
    model = randomised(build())
    ranks = make(model, world_size)
    ids, targets = batch()
    expected = reference(model, ids, targets)
    assert any(isinstance(m, Gather) for m in TokenLoss(ranks.modules[0]).modules()) == gathers
    for found in losses(ranks, ids, targets):
        assert torch.allclose(found, expected, rtol=1e-13, atol=0)
    for shard in ranks.modules[0].plan.parameters:
        whole = model.get_parameter(shard.name).grad
        for rank, module in enumerate(ranks.modules):
            part = select(whole, shard.indices[rank])
            # a key bias shifts all scores of a row: its gradient is exactly 0, in floats noise
            assert torch.allclose(module.get_parameter(shard.name).grad, part, 1e-10, 1e-15)


def test_no_logits_travel() -> None:
    """Two collectives of a number or two a token in place of the gather."""
    ranks = make(randomised(Small()), 2)
    simulator = ranks.contexts[0].group
    ids, targets = batch()
    with torch.no_grad():
        simulator.run(lambda rank: ranks.modules[rank](ids))
    plain = list(simulator.calls)
    simulator.calls.clear()
    modules = [TokenLoss(m) for m in ranks.modules]
    with torch.no_grad():
        simulator.run(lambda rank: modules[rank](ids, targets))
    assert plain[-1][0] == "all_gather"
    tokens = ids.numel() * 8
    added = [("all_reduce max", tokens), ("all_reduce", 2 * tokens)]
    assert simulator.calls == plain[:-1] + added
    assert any(isinstance(m, Gather) for m in ranks.modules[0].modules())  # left as it was
    assert not any(isinstance(m, Gather) for m in modules[0].modules())


def test_bfloat16_logits_are_summed_in_float32() -> None:
    """The loss's own error is float32's, not the logits': against float64 from the same logits."""
    model = Small().bfloat16().eval()
    ids, targets = batch()
    ranks = make(model, 2)
    logits = ranks.contexts[0].group.run(lambda rank: ranks.modules[rank](ids).detach())[0]
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    for found in losses(ranks, ids, targets):
        assert found.dtype == torch.float32
        assert abs(found.double() - expected) < 1e-6 * expected


@pytest.mark.parametrize("build", [Small, Capped])
def test_a_target_outside_the_vocabulary_is_no_number(build: type[nn.Module]) -> None:
    ranks = make(build().eval(), 2)
    for wrong in (VOCAB, -1):
        ids, targets = batch()
        targets[1, 3] = wrong
        assert all(torch.isnan(x) for x in losses(ranks, ids, targets))


def test_one_rank_and_what_is_refused() -> None:
    model = randomised(Small())
    ids, targets = batch()
    module = fxport.parallelize(model, ParallelContext(0, 1))
    expected = reference(model, ids, targets)
    assert torch.allclose(TokenLoss(module)(ids, targets), expected, rtol=1e-13)
    with pytest.raises(fxport.FxportError, match=r"takes what fxport\.parallelize returns"):
        TokenLoss(model)  # type: ignore[arg-type]
    output = module.graph.output_node()
    output.args = ((output.args[0], output.args[0]),)
    with pytest.raises(fxport.FxportError, match="its logits and nothing else"):
        TokenLoss(module)
