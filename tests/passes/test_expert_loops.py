"""A loop over experts that are alike: one product of all, for the experts that a row chose."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxport.backends.torch import PortedModel
from fxport.capture.export import capture
from fxport.passes.serving import lower_for_serving
from fxport.serving import ServingGraph
from tests.zoo.awkward import LAYERS, VOCAB, WIDTH
from tests.zoo.experts import decoder

OP = torch.ops.fxport.expert_linear.default
EXPERTS, CHOSEN, INNER = 4, 2, 24
Mix = Callable[["Looped", Tensor], Tensor]


class Expert(nn.Module):
    """Weights of linear layers, one that is none, a scale, and views between them."""

    def __init__(self, inner: int = INNER) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(WIDTH, inner), nn.Linear(WIDTH, inner, bias=False)
        self.scale = nn.Parameter(torch.rand(inner))
        self.down = nn.Parameter(torch.randn(inner, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.up(x), approximate="tanh") * self.gate(x)
        y = torch.cat(y.view(-1, 2, y.shape[-1] // 2).chunk(2, dim=1)[::-1], dim=1)
        return (y.reshape(x.shape[0], -1) * self.scale) @ self.down


class Looped(nn.Module):
    """Top-2 of 4; every expert on every row here, as what a loop over rows becomes."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.mix = mix
        self.router, self.other = (nn.Linear(WIDTH, EXPERTS) for _ in range(2))
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.uneven = nn.ModuleList(Expert(2 * n) for n in range(5, 5 + EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self, x.reshape(-1, WIDTH)).view_as(x)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.router(x).softmax(-1).topk(CHOSEN, dim=-1)  # type: ignore[return-value]


def indices(m: Looped, x: Tensor) -> Tensor:
    weights, chosen = m.choose(x)
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        hit = chosen == e
        gate = torch.where(hit, weights, 0).sum(-1, keepdim=True)
        y = torch.where(hit.any(-1, keepdim=True), y + expert(x) * gate, y)
    return y


def one_hot(m: Looped, x: Tensor) -> Tensor:
    weights, chosen = m.choose(x)
    masks = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
    y = x * 0.5
    for e in reversed(range(EXPERTS)):
        hit = masks[e] != 0
        gate = torch.where(hit.t(), weights, 0).sum(-1)[:, None]
        y = y + torch.where(hit.any(0)[:, None], m.experts[e](x) * gate, 0)
    return y


def compared(m: Looped, x: Tensor) -> Tensor:
    """Gates of all experts, of which a column is taken; a shared part in each expert."""
    scores = m.router(x).sigmoid()
    chosen = scores.topk(CHOSEN).indices
    masks = (chosen[..., None] == torch.arange(EXPERTS)).permute(2, 0, 1).unbind(0)
    y = m.other(x).sum(-1, keepdim=True) + x
    for e, expert in enumerate(m.experts):
        added = (m.experts[0].gate(x).sum(-1, keepdim=True) + expert(x)) * scores[:, e, None]
        y = y + torch.where(masks[e].any(1).unsqueeze(1), added, 0)
    return y


def written(m: Looped, x: Tensor) -> Tensor:
    best, chosen = m.router(x).max(-1)
    y = x
    for e, expert in enumerate(m.experts):
        y = torch.where((chosen == e)[:, None], expert(x), y)
    return y * best[:, None]


def slots(m: Looped, x: Tensor) -> Tensor:
    """A row for each slot of a token, with one expert: its number needs no second axis."""
    weights, chosen = m.choose(x)
    own, rows = chosen.view(-1), x.repeat_interleave(CHOSEN, 0)
    y = torch.zeros_like(rows)
    for e, expert in enumerate(m.experts):
        y = torch.where((own == e)[:, None], expert(rows), y)
    return (y.view(-1, CHOSEN, WIDTH) * weights[..., None]).sum(1)


# --- twins -----------------------------------------------------------------------------------


def twice(m: Looped, x: Tensor) -> Tensor:
    """A row may choose one expert twice."""
    chosen = torch.stack([m.router(x).argmax(-1), m.other(x).argmax(-1)], -1)
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        y = y + torch.where((chosen == e).any(-1, keepdim=True), expert(x), 0)
    return y


def left_out(m: Looped, x: Tensor) -> Tensor:
    """Rows that chose the last expert get nothing for it."""
    _, chosen = m.choose(x)
    y = torch.zeros_like(x)
    for e in range(EXPERTS - 1):
        y = y + torch.where((chosen == e).any(-1, keepdim=True), m.experts[e](x), 0)
    return y


def read_between(m: Looped, x: Tensor) -> Tensor:
    """Experts read what the earlier ones gave."""
    _, chosen = m.choose(x)
    y = x
    for e, expert in enumerate(m.experts):
        y = y + torch.where((chosen == e).any(-1, keepdim=True), expert(y), 0)
    return y


def swapped_gates(m: Looped, x: Tensor) -> Tensor:
    weights, chosen = m.choose(x)
    y = torch.zeros_like(x)
    for e, other in enumerate((1, 0, 2, 3)):
        gate = torch.where(chosen == other, weights, 0).sum(-1, keepdim=True)
        y = y + torch.where((chosen == e).any(-1, keepdim=True), m.experts[e](x) * gate, 0)
    return y


def one_unlike(m: Looped, x: Tensor) -> Tensor:
    _, chosen = m.choose(x)
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        z = expert(x).relu() if e == 2 else expert(x).tanh()
        y = y + torch.where((chosen == e).any(-1, keepdim=True), z, 0)
    return y


def of_other_sizes(m: Looped, x: Tensor) -> Tensor:
    _, chosen = m.choose(x)
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.uneven):
        y = y + torch.where((chosen == e).any(-1, keepdim=True), expert(x), 0)
    return y


def not_chosen(m: Looped, x: Tensor) -> Tensor:
    """The experts that a row did not choose."""
    _, chosen = m.choose(x)
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        y = y + torch.where((chosen != e).all(-1, keepdim=True), expert(x), 0)
    return y


def written_twice(m: Looped, x: Tensor) -> Tensor:
    """Of two chosen experts the last one is kept."""
    _, chosen = m.choose(x)
    y = x
    for e, expert in enumerate(m.experts):
        y = torch.where((chosen == e).any(-1, keepdim=True), expert(x), y)
    return y


LOOPS: tuple[Mix, ...] = (indices, one_hot, compared, written)
TWINS: tuple[Mix, ...] = (
    twice, left_out, read_between, swapped_gates, one_unlike, of_other_sizes, not_chosen,
    written_twice,
)  # fmt: skip


def ported(mixes: tuple[Mix, ...]) -> tuple[nn.Module, PortedModel, ServingGraph, int]:
    """A decoder whose layers mix in turn as these do, its port, and how many loops were taken."""
    torch.manual_seed(3)
    styles = itertools.cycle(mixes)
    model = decoder(lambda: Looped(next(styles)), LAYERS).double().eval()
    captured = capture(model)
    found = lower_for_serving(captured, None)
    made = [d for d in found.decisions if d.pass_name == "experts"]
    port = PortedModel(found.serving, captured.parameters)
    return model, port, found.serving, len(made)


@pytest.mark.parametrize("mixes", [LOOPS, (slots,)])
def test_the_chosen_experts_alone_run(mixes: tuple[Mix, ...]) -> None:
    assert len(LOOPS) == LAYERS
    model, port, serving, loops = ported(mixes)
    graph = serving.body.graph
    assert loops == LAYERS
    assert len(graph.find_nodes(op="call_function", target=OP)) == 3 * LAYERS
    stacked = graph.find_nodes(op="call_function", target=torch.ops.aten.stack.default)
    assert len(stacked) == 5 * LAYERS
    named, own = dict(model.named_parameters()), dict(port.named_parameters())
    for length in (1, 2, 19):
        ids = torch.randint(0, VOCAB, (2, length))
        results = []
        for one, parameters in ((model, named), (port, own)):
            logits = one(ids)
            loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
            grads = torch.autograd.grad(
                loss, [parameters[n] for n in own], allow_unused=True, materialize_grads=True
            )
            results.append((logits, *grads))
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-11)


def test_twins_are_left() -> None:
    for mixes in (TWINS[:LAYERS], TWINS[LAYERS:]):
        model, port, serving, loops = ported(mixes)
        assert loops == 0
        assert not serving.body.graph.find_nodes(op="call_function", target=OP)
        ids = torch.randint(0, VOCAB, (2, 19))
        torch.testing.assert_close(port(ids), model(ids), rtol=0.0, atol=1e-12)
