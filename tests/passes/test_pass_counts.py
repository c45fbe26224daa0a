"""Every pass on one model: operations before and after, the numbers, and a graph to leave alone."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxport.capture.inputs import GraphInput
from fxport.capture.symbolic import trace_symbolically
from fxport.capture.traced import Traced
from fxport.errors import PortError, ReasonCode
from fxport.fx_text import graph_text
from fxport.passes.attention.rewrite import rewrite_attention
from fxport.passes.axes import Symbols
from fxport.passes.functional import functionalise
from fxport.passes.head import find_head
from fxport.passes.inplace import without_inplace
from fxport.passes.limits import longest_sequence
from fxport.passes.positions import gather_by_position
from fxport.passes.split import Splitter, attention_layers, token_embedding
from fxport.passes.tokens.locality import analyse
from fxport.serving import Part
from fxport.testing import assert_rewrites, assert_same

aten = torch.ops.aten
ATTENTION = torch.ops.fxport.attention.default
VOCAB, WIDTH, HEADS, LAYERS, LIMIT = 31, 24, 3, 4, 41


class Attention(nn.Module):
    def __init__(self, inplace: bool, sinks: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.sinks = nn.Parameter(torch.randn(HEADS)) if sinks else None
        self.register_buffer("mask", torch.ones(LIMIT, LIMIT).tril() == 0)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            t.view(B, T, HEADS, C // HEADS).transpose(1, 2) for t in self.qkv(x).split(C, dim=2)
        )
        s = q @ k.transpose(-2, -1) / math.sqrt(C // HEADS)
        fill = s.masked_fill_ if self.inplace else s.masked_fill
        s = fill(self.mask[:T, :T], float("-inf"))
        if self.sinks is None:
            p = s.softmax(-1)
        else:
            column = self.sinks.view(1, HEADS, 1, 1).expand(B, HEADS, T, 1)
            p = torch.cat([s, column], dim=-1).softmax(-1)[..., :-1]
        return self.out((p @ v).transpose(1, 2).reshape(B, T, C))


class Model(nn.Module):
    def __init__(
        self, inplace: bool = False, sinks: bool = False, last: bool = False, table: bool = True
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last, self.inplace = last, inplace
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.wpe = nn.Embedding(LIMIT, WIDTH) if table else None
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.attentions = nn.ModuleList(Attention(inplace, sinks) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(ids.shape[1]))
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            h = attention(norm(x))
            if self.inplace:
                h += x
                x = h
            else:
                x = x + h
        if self.last:
            x = x[:, [-1], :]
        return self.head(x)


@cache
def _captured(options: tuple[tuple[str, bool], ...]) -> tuple[Model, Traced]:
    model = Model(**dict(options)).double().eval()
    return model, trace_symbolically(model)


def captured(**options: bool) -> tuple[Model, fx.GraphModule, fx.Node, Traced]:
    """The model, a graph of its own, the tokens' node in it, and what the capture said."""
    model, traced = _captured(tuple(sorted(options.items())))
    gm = copy.deepcopy(traced.graph)
    tokens = next(n for n in gm.graph.nodes if n.name == traced.tokens.name)
    return model, gm, tokens, traced


def run(gm: fx.GraphModule, model: nn.Module, **given: Tensor) -> Any:
    """Runs a graph on the model's tensors; the token ids are `ids`."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers()), **given}
    values = []
    for node in gm.graph.find_nodes(op="placeholder"):
        known = node.meta.get("input")
        name = known.name if isinstance(known, GraphInput) else node.name
        value = held.get(name)
        values.append(known.value if value is None else value)
    return gm(*values)


def counts(gm: fx.GraphModule) -> Counter[Any]:
    return Counter(n.target for n in gm.graph.nodes if n.op == "call_function")


def tokens_of(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# 7 is no other size; at 3 the batch, the heads and the length are equal.
SHAPES = [(2, 7), (3, 3)]


@pytest.mark.parametrize("rewrite", [functionalise, without_inplace])
def test_in_place_operations(rewrite: Any) -> None:
    model, gm, _, _ = captured(inplace=True)
    before = counts(gm)
    assert before[aten.masked_fill_.Scalar] == LAYERS and before[aten.add_.Tensor] == LAYERS
    rewrite(gm)
    after = counts(gm)
    assert after[aten.masked_fill.Scalar] == LAYERS and not after[aten.masked_fill_.Scalar]
    assert after[aten.add.Tensor] == before[aten.add.Tensor] + LAYERS
    assert not after[aten.add_.Tensor]
    gm.recompile()
    for shape in SHAPES:
        ids = tokens_of(*shape)
        assert_close(run(gm, model, ids=ids), model(ids))


@pytest.mark.parametrize("rewrite", [functionalise, without_inplace])
def test_nothing_in_place_is_left_alone(rewrite: Any) -> None:
    _, gm, _, _ = captured()
    before = graph_text(gm)
    rewrite(gm)
    assert graph_text(gm) == before


def seen_through_a_view() -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.mul.Tensor, (x, 2.0))
    row = graph.call_function(aten.select.int, (y, 0, 0))
    graph.call_function(aten.add_.Tensor, (row, 1.0))
    graph.output(y)
    for node, size in ((x, (3, 5)), (y, (3, 5)), (row, (5,))):
        node.meta["val"] = torch.empty(size, device="meta")
    for node in graph.nodes:
        node.meta.setdefault("val", torch.empty(5, device="meta"))
    return fx.GraphModule(nn.Module(), graph)


def test_a_write_through_a_view_is_left_alone() -> None:
    gm = seen_through_a_view()
    before = graph_text(gm)
    without_inplace(gm)
    assert graph_text(gm) == before
    with pytest.raises(PortError) as caught:
        functionalise(gm)
    assert [r.code for r in caught.value.reasons] == [ReasonCode.MUTATED_IN_PLACE]


def test_limits_reads_only() -> None:
    _, gm, _, traced = captured()
    before = graph_text(gm)
    assert longest_sequence(gm, traced.length, None) == LIMIT
    assert longest_sequence(gm, traced.length, 5) == 5
    assert graph_text(gm) == before
    _, gm, _, traced = captured(table=False)
    assert longest_sequence(gm, traced.length, None) is None


def test_head() -> None:
    model, gm, _, traced = captured(last=True)
    before = counts(gm)
    assert before[aten.index.Tensor] == 1
    head = find_head(gm, traced.length)
    assert counts(gm)[aten.index.Tensor] == 0
    assert counts(gm)[aten.linear.default] == before[aten.linear.default] == 2 * LAYERS + 1
    assert head.logits.meta["val"].dim() == 3 and len(head.decisions) == 2
    gm.recompile()
    for shape in SHAPES:
        ids = tokens_of(*shape)
        logits = run(gm, model, ids=ids)
        assert logits.shape == (*shape, VOCAB)
        assert_close(logits[:, -1:], model(ids))


def test_a_head_of_every_position_is_left_alone() -> None:
    _, gm, _, traced = captured()
    before = graph_text(gm)
    head = find_head(gm, traced.length)
    assert graph_text(gm) == before and len(head.decisions) == 1
    assert head.projection.target is aten.linear.default


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_attention(sinks: bool, inplace: bool) -> None:
    model, gm, _, _ = captured(sinks=sinks, inplace=inplace)
    before = counts(gm)
    assert before[aten.softmax.int] == LAYERS and before[aten.matmul.default] == 2 * LAYERS
    assert before[aten.cat.default] == LAYERS * sinks
    result = rewrite_attention(gm)
    after = counts(gm)
    assert after[ATTENTION] == len(result.sites) == LAYERS
    gone = (aten.softmax.int, aten.matmul.default, aten.cat.default, aten.masked_fill.Scalar)
    assert not any(after[target] for target in gone)
    assert [site.sinks for site in result.sites] == [sinks] * LAYERS
    assert after[aten.linear.default] == before[aten.linear.default]
    for shape in SHAPES:
        ids = tokens_of(*shape)
        assert_close(run(gm, model, ids=ids), model(ids))


class Router(nn.Module):
    """A softmax that is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.gate(x).softmax(-1) * self.up(x)).sum(-1)


def test_attention_in_training_with_the_helpers() -> None:
    for sinks in (False, True):
        model = Model(sinks=sinks).double()
        assert_rewrites(model, [tokens_of(2, 7)], attention=LAYERS)
        compiled = torch.compile(model, backend=_rewritten_eagerly)
        assert_same(model, compiled, [tokens_of(2, 7)])
    assert_rewrites(Router(), [torch.randn(2, 3, 5)], attention=0)


def _rewritten_eagerly(gm: fx.GraphModule, example_inputs: Any) -> Any:
    from fxport.capture.dynamo import lower
    from fxport.passes.pipeline import training_pipeline

    lowered = lower(gm).graph
    assert len(training_pipeline(lowered).sites) == LAYERS
    return lowered.forward


def test_positions() -> None:
    model, gm, tokens, traced = captured()
    rewrite_attention(gm)
    assert counts(gm)[aten.arange.default] + counts(gm)[aten.arange.start] == 1
    locality = analyse(gm, Symbols(traced.batch, traced.length), LIMIT)
    assert not locality.reasons
    positions, decisions = gather_by_position(gm, locality, tokens)
    after = counts(gm)
    assert not after[aten.arange.default] and not after[aten.arange.start]
    assert len(decisions) == 1 and positions.op == "placeholder" and positions.users
    ids = tokens_of(1, 7)
    assert_close(run(gm, model, ids=ids, positions=torch.arange(7)), model(ids))
    # The positions decide, not the place in the batch.
    shifted = run(gm, model, ids=ids, positions=torch.arange(7) + 3)
    padded = torch.cat([tokens_of(1, 3), ids], dim=1)
    table = model.wpe(torch.arange(3, 10))
    assert not torch.allclose(shifted, model(ids)) and padded.shape[1] == 10
    with torch.no_grad():
        moved = copy.deepcopy(model)
        moved.wpe.weight[:7] = table
        assert_close(shifted, moved(ids))


def test_a_model_without_positions_is_left_alone() -> None:
    _, gm, tokens, traced = captured(table=False)
    rewrite_attention(gm)
    before = counts(gm)
    locality = analyse(gm, Symbols(traced.batch, traced.length), LIMIT)
    positions, decisions = gather_by_position(gm, locality, tokens)
    assert not decisions and not positions.users and counts(gm) == before


def part_module(part: Part) -> fx.GraphModule:
    return fx.GraphModule(nn.Module(), part.graph)


def test_split() -> None:
    model, gm, tokens, traced = captured()
    head = find_head(gm, traced.length)
    rewrite_attention(gm)
    embedding = token_embedding(tokens)
    locality = analyse(gm, Symbols(traced.batch, traced.length), LIMIT)
    positions, _ = gather_by_position(gm, locality, tokens)
    before, text = counts(gm), graph_text(gm)
    assert len(attention_layers(gm)) == LAYERS
    split = Splitter(gm, tokens, lambda node: str(node.target))
    parts = {
        "embed": split.part([("input_ids", tokens)], embedding, ("input_ids", 1)),
        "body": split.part(
            [("embeddings", embedding), ("positions", positions)], head.hidden, ("positions", 0)
        ),
        "head": split.part([("hidden", head.hidden)], head.logits, ("hidden", 1)),
    }
    assert graph_text(gm) == text  # the whole graph is read only
    found = {name: counts(part_module(part)) for name, part in parts.items()}
    for target in (aten.embedding.default, aten.linear.default, aten.layer_norm.default, ATTENTION):
        assert sum(c[target] for c in found.values()) == before[target]
    assert found["embed"] == Counter({aten.embedding.default: 1})
    assert found["head"] == Counter({aten.linear.default: 1})
    ids = tokens_of(1, 7)
    held = dict(model.named_parameters())
    given: dict[str, Tensor] = {"input_ids": ids, "positions": torch.arange(7)}
    outputs = {"embed": "embeddings", "body": "hidden", "head": "logits"}
    for name, part in parts.items():
        module = part_module(part)
        inputs = [
            given[n.name] if n.name in part.inputs else held[part.weights[n.name]]
            for n in module.graph.find_nodes(op="placeholder")
        ]
        given[outputs[name]] = module(*inputs)
    assert_close(given["logits"], model(ids))


@pytest.mark.parametrize(
    "passed",
    [
        lambda ids: ids.unsqueeze(-1).split(1, dim=-1)[0].squeeze(-1),
        lambda ids: ids.t().transpose(0, 1).chunk(1, 1)[0],
    ],
)
def test_ids_that_are_passed_on(passed: Callable[[Tensor], Tensor]) -> None:
    class Passed(Model):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(passed(ids))

    traced = trace_symbolically(Passed().eval())
    assert token_embedding(traced.tokens).target is aten.embedding.default


def test_ids_that_are_not_looked_up_are_not_split() -> None:
    graph = fx.Graph()
    tokens = graph.placeholder("ids")
    tokens.meta["val"] = torch.empty(2, 7, device="meta")
    scaled = graph.call_function(aten.mul.Tensor, (tokens, 2.0))
    scaled.meta["val"] = torch.empty(2, 7, device="meta")
    graph.output(scaled)
    with pytest.raises(PortError) as caught:
        token_embedding(tokens)
    assert [r.code for r in caught.value.reasons] == [ReasonCode.NO_VOCABULARY]


def test_the_counts_see_a_missing_rewrite() -> None:
    """A mask that depends on the data beyond repair: this layer must not be counted."""
    torch.manual_seed(0)
    model = Model()

    class Tapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            p = (x @ x.transpose(-2, -1)).softmax(-1)
            return p @ x + p.sum()

    model.attentions[2] = Tapped()
    with pytest.raises(AssertionError, match="attention: 3, expected 4"):
        assert_rewrites(model, [tokens_of(2, 7)], attention=LAYERS)
