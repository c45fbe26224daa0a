"""Weights looked up by expert: one product for each expert instead of a copy for each row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxport.capture.export import capture
from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.experts.products import multiply_by_expert
from fxport.passes.functional import functionalise
from tests.zoo.awkward import LAYERS, VOCAB
from tests.zoo.chosen_experts import LEFT, LOOK_UPS, Mix, of_styles

aten = torch.ops.aten
OP = torch.ops.fxport.expert_linear.default


def prepared(mixes: dict[str, Mix]) -> tuple[nn.Module, torch.fx.GraphModule]:
    """A decoder whose layers mix in turn as these do."""
    torch.manual_seed(5)
    model = of_styles(mixes).double().eval()
    captured = capture(model)
    functionalise(captured.graph)
    return model, captured.graph


def count(gm: torch.fx.GraphModule, target: object) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=target))


def results(model: nn.Module, gm: torch.fx.GraphModule, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the gradients of every parameter in their order."""
    inputs = [graph_input(n) for n in gm.graph.nodes if n.op == "placeholder"]
    named = dict(model.named_parameters())
    given = [
        ids if i.kind is InputKind.DATA
        else named[i.name] if i.kind is InputKind.PARAMETER
        else i.value
        for i in inputs
    ]  # fmt: skip
    output = gm(*given)
    logits = output[0] if isinstance(output, tuple | list) else output
    loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
    return logits, list(torch.autograd.grad(loss, list(named.values())))


def test_counts_and_numbers() -> None:
    model, gm = prepared(LOOK_UPS)
    ids = torch.randint(0, VOCAB, (3, 17))
    before = results(model, gm, ids)
    assert len(LOOK_UPS) == LAYERS
    products, biases = 2 * LAYERS, LAYERS
    assert count(gm, aten.index.Tensor) == products + biases
    embeddings = count(gm, aten.embedding.default)
    assert len(multiply_by_expert(gm)) == products
    assert count(gm, OP) == products
    assert count(gm, aten.index.Tensor) == 0
    assert count(gm, aten.embedding.default) == embeddings + biases
    after = results(model, gm, ids)
    for one, other in zip((before[0], *before[1]), (after[0], *after[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-11)
    torch.testing.assert_close(after[0], model(ids), rtol=0.0, atol=1e-11)


def test_others_are_left() -> None:
    _, gm = prepared(LEFT)
    before = [(n.target, n.args) for n in gm.graph.nodes]
    assert multiply_by_expert(gm) == ()
    assert [(n.target, n.args) for n in gm.graph.nodes] == before
