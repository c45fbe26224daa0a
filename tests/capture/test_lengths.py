"""Capture at several plain lengths: what it copes with, and what it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, fx, nn

import fxport
from fxport.capture.clone import clone_for_capture
from fxport.capture.emitter import Unified
from fxport.capture.export import Captured, capture
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.longest import longest
from fxport.capture.memory import Memory
from fxport.capture.questions import ask
from fxport.capture.sample import take_sample
from fxport.capture.unify import unify
from fxport.errors import PortError, ReasonCode
from fxport.passes.serving import lower_for_serving
from tests.zoo import awkward
from tests.zoo.awkward import LIMIT, MODELS, VOCAB, Decoder, rotate, tables

WINDOWS = {"mask by rows": [8, -1, 8, -1], "window branch": [23] * 4}
UNIFIED = [name for name in MODELS if "experts" not in name]


def run(captured: Captured, ids: Tensor) -> Tensor:
    """The captured graph on real tensors; symbolic sizes come out of the graph itself."""
    values = []
    for node in captured.graph.graph.find_nodes(op="placeholder"):
        source = graph_input(node)
        if source.kind is InputKind.DATA:
            values.append(ids)
        elif source.kind is InputKind.PARAMETER:
            values.append(captured.parameters[source.name])
        else:
            values.append(source.value)
    with torch.no_grad():
        return fx.Interpreter(captured.graph).run(*values)


def differences(model: nn.Module, captured: Captured, lengths: list[int]) -> list[float]:
    """Of logits, in float32; the model makes each call after all shorter and longer ones."""
    found = []
    for length in lengths:
        ids = torch.randint(0, VOCAB, (1 if length % 2 else 4, length))
        with torch.no_grad():
            found.append((run(captured, ids) - model(ids)).abs().max().item())
    return found


@pytest.mark.parametrize("name", UNIFIED)
def test_the_unified_graph_is_the_model_at_every_length(name):
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    captured = capture(model)
    assert "unified" in captured.way
    longest = min(captured.limit or LIMIT, LIMIT)
    # 9 and 24 are the windows, 16 the first table; 7 and 96 equal nothing on purpose
    lengths = [2, 9, 10, 16, 17, 24, 25, 37, 64, longest, 7]
    assert max(differences(model, captured, lengths)) < 2e-5
    layers = lower_for_serving(captured, None).serving.attention
    assert [layer.params.window_left for layer in layers] == WINDOWS.get(name, [-1] * 4)
    assert all(layer.params.causal for layer in layers)


class LearnedPositions(Decoder):
    """A parameter cut to the length, and not cut at its own."""

    def __init__(self) -> None:
        super().__init__(mask=awkward.CachedMask)
        self.blocks = self.blocks[:1]
        self.positions = nn.Parameter(torch.randn(LIMIT, awkward.WIDTH))
        self.embed.register_forward_hook(self.placed)

    def placed(self, _: nn.Module, ids: tuple[Tensor], x: Tensor) -> Tensor:
        assert x.shape[1] <= LIMIT
        return x + self.positions[: x.shape[1]]


def test_a_learned_table_holds_up_to_its_own_length() -> None:
    torch.manual_seed(3)
    model = LearnedPositions().eval()
    captured = capture(model)
    assert captured.limit == LIMIT and "unified" in captured.way
    assert max(differences(model, captured, [2, 37, LIMIT])) < 2e-5


def test_a_model_that_was_called_gives_the_same_graph_and_keeps_its_state():
    torch.manual_seed(3)
    model = MODELS["cached mask"]().eval()
    fresh = capture(model)
    model(torch.zeros(2, 11, dtype=torch.long))
    kept = model.blocks[1].attention.mask.mask
    called = capture(model)
    assert model.blocks[1].attention.mask.mask is kept
    assert called.limit == fresh.limit == LIMIT
    targets = [
        [n.target for n in c.graph.graph.nodes if n.op == "call_function"] for c in (fresh, called)
    ]
    assert targets[0] == targets[1]


class Quantised(nn.Linear):
    """BitNet's: a scale that is written to, read before as well as after; weights rounded."""

    def scale(self) -> Tensor:
        return self.weight.abs().mean() / 100

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale()
        small = scale + 1
        scale.clamp_(min=0.2)
        rounded = (self.weight / scale).round().clamp_(-1, 1) * scale
        return nn.functional.linear(x, rounded / small, self.bias)


class WeightWritten(Quantised):
    """The weight itself is written to."""

    def scale(self) -> Tensor:
        return self.weight.view(-1)[0]


def quantised(made: type[Quantised]) -> nn.Module:
    model = Decoder(mask=awkward.CachedMask)
    attention = model.blocks[1].attention
    assert isinstance(attention, awkward.Attention)
    attention.qkv = made(attention.qkv.in_features, attention.qkv.out_features)
    return model.eval()


def test_values_made_of_parameters_may_be_written_to() -> None:
    torch.manual_seed(3)
    model = quantised(Quantised)
    captured = capture(model)
    assert "unified" in captured.way
    assert max(differences(model, captured, [2, 37, LIMIT])) < 2e-5
    lower_for_serving(captured, None)


def test_a_parameter_may_not() -> None:
    with pytest.raises(PortError) as refused:
        lower_for_serving(capture(quantised(WeightWritten)), None)
    assert any(r.location and "clamp_(min" in r.location.source for r in refused.value.reasons)


class PartOfARow(awkward.Attention):
    """ALiBi for each key, from a row that the first call makes."""

    def __init__(self, first: Callable[[int], int]) -> None:
        super().__init__(None, awkward.CausalMask())
        self.first, self.row = first, None

    def forward(self, x: Tensor) -> Tensor:
        if self.row is None:
            slopes = torch.tensor([2.0**-h for h in range(awkward.HEADS)])
            self.row = slopes[:, None, None] * torch.arange(1 - LIMIT, 1)
        length, start = x.shape[1], self.first(x.shape[1])
        q, k, v = self.qkv(x).unflatten(2, (3, awkward.HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT + self.row[:, :, start : start + length]
        scores = scores.masked_fill(~self.mask(length), float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def unified(first: Callable[[int], int]) -> tuple[nn.Module, Unified]:
    torch.manual_seed(3)
    model = Decoder().eval()
    for block in model.blocks:
        block.attention = PartOfARow(first)
    model.eval()
    clone = clone_for_capture(model)
    *samples, longest = (take_sample(clone, b, n) for b, n in ((2, 37), (3, 53), (4, 41), (2, 96)))
    return model, unify(samples, longest)


class CastWeights(nn.Module):
    """Weights as float32 in every call, one of them as it is before; an attribute is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.live: tuple[Tensor, int] | None = None

    def forward(self, ids: Tensor) -> Tensor:
        self.live = self.scale.float() * self.embed(ids), ids.shape[1]
        return self.live[0] @ self.embed.weight.float().T


def test_earlier_calls_do_not_rename_weights_that_they_get_back_unchanged():
    model = CastWeights().eval()
    assert model.scale.float() is model.scale
    captured = capture(model)
    assert max(differences(model, captured, [2, 7, 37])) < 2e-5
    casts = [n for n in captured.graph.graph.nodes if n.target is torch.ops.aten.to.dtype]
    assert [n.all_input_nodes[0].op for n in casts] == ["placeholder"] * 2


def test_a_table_is_read_from_its_end():
    model, found = unified(lambda length: LIMIT - length)
    for rows, length in ((1, 2), (2, 23), (3, LIMIT)):
        ids = torch.randint(VOCAB, (rows, length))
        values = [
            model.get_parameter(given.name) if given.kind is InputKind.PARAMETER else given.value
            for given in map(graph_input, found.graph.graph.find_nodes(op="placeholder"))
        ]
        values = [ids if value is None else value for value in values]
        with torch.no_grad():
            torch.testing.assert_close(fx.Interpreter(found.graph).run(*values), model(ids))


def test_a_table_that_is_read_from_its_middle_is_refused():
    with pytest.raises(PortError) as caught:
        unified(lambda length: (LIMIT - length) // 2)
    reason = caught.value.reasons[0]
    assert reason.code is ReasonCode.DEPENDS_ON_LENGTH
    assert reason.location is not None and "self.row[" in reason.location.source


def refused(model: nn.Module) -> tuple[ReasonCode, str]:
    with pytest.raises(PortError) as caught:
        capture(model.eval())
    reason = caught.value.reasons[0]
    return reason.code, reason.location.source if reason.location else ""


class DynamicRotary(nn.Module):
    """The angles depend on the longest sequence seen so far."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 16

    def forward(self, x: Tensor) -> Tensor:
        self.longest = max(self.longest, x.shape[2])  # HERE
        cos, sin = tables(x.shape[2])
        return rotate(x, cos / self.longest, sin / self.longest)


class Counting(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1  # HERE
        return super().forward(ids) * self.calls


class Remembering(Decoder):
    """What the last call computed enters this one."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        if self.last is not None:
            logits = logits + self.last.mean()
        self.last = logits  # HERE
        return logits


class HiddenCounter(Decoder):
    """The same in an object that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.box = SimpleNamespace(calls=0)

    def forward(self, ids: Tensor) -> Tensor:
        self.box.calls += 1
        return super().forward(ids) * self.box.calls


@pytest.mark.parametrize(
    "make",
    [lambda: Decoder(DynamicRotary), Counting, Remembering],
    ids=["longest so far", "count", "last logits"],
)
def test_state_that_enters_the_result_is_refused_at_its_line(make):
    code, line = refused(make())
    assert code is ReasonCode.MUTATED_STATE
    assert "# HERE" in line


def test_state_in_a_plain_object_is_refused():
    with pytest.raises(PortError, match=r"box\.calls") as caught:
        capture(HiddenCounter().eval())
    assert caught.value.reasons[0].code is ReasonCode.MUTATED_STATE


class NarrowerWhenLong(nn.Module):
    """Short sequences see everything, long ones a window: no table of one length serves both."""

    def forward(self, length: int) -> Tensor:
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        if length > 30:
            causal = causal & ~causal.tril(-9)
        return causal


class LogScaled(Decoder):
    def forward(self, ids: Tensor) -> Tensor:
        scale = float(ids.shape[1]) ** 0.5
        return super().forward(ids) * scale  # HERE


class Doubled(Decoder):
    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        if ids.shape[1] >= 70:
            logits = logits * 2  # HERE
        return logits


def test_masks_of_two_lengths_that_disagree_are_refused():
    code, _ = refused(Decoder(mask=NarrowerWhenLong))
    assert code is ReasonCode.DEPENDS_ON_LENGTH


class RowsNarrowerWhenLong(nn.Module):
    """Torch takes T for a number at the loop, and says nothing of the question that follows."""

    def forward(self, length: int) -> Tensor:
        causal = torch.zeros(length, length, dtype=torch.bool)
        for row in range(length):
            causal[row, : row + 1] = True
        if length > 30:
            causal = causal & ~causal.tril(-9)
        return causal


class CountedNarrowerWhenLong(nn.Module):
    """Nobody sees what is asked about a plain number; what the code names is compared."""

    def forward(self, length: int) -> Tensor:
        count = int(length)
        causal = torch.ones(count, count, dtype=torch.bool).tril()
        return causal & ~causal.tril(-9) if count > 30 else causal


@pytest.mark.parametrize("mask", [RowsNarrowerWhenLong, CountedNarrowerWhenLong])
def test_a_question_after_the_length_was_a_number_is_not_missed(mask):
    model = Decoder(mask=mask).eval()
    assert ask(model, 37).counted
    with pytest.raises(PortError) as caught:
        fxport.port(model)
    assert caught.value.reasons[0].code is ReasonCode.DEPENDS_ON_LENGTH


def test_questions_do_not_change_with_the_answers():
    """Both sides of both numbers are found at once: torch alone would have stopped at the first."""

    class Asks(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            rows = [torch.ones(4) for _ in range(ids.shape[1])]
            near = 1 if ids.shape[1] > 20 else 2
            return torch.stack(rows) * near * min(ids.shape[1], 64)

    asked = ask(Asks(), 37)
    assert asked.sides >= {20, 21, 64, 65}


def test_another_path_for_long_sequences_is_refused_at_its_line():
    code, line = refused(Doubled())
    assert code is ReasonCode.DEPENDS_ON_LENGTH
    assert "# HERE" in line


def test_memory_knows_writes_through_views():
    def forward(x: Tensor) -> Tensor:
        out = torch.zeros(4, 5)
        out[1:, 2] = x
        other = torch.ones(3)
        return out, other

    gm = torch.fx.experimental.proxy_tensor.make_fx(forward)(torch.randn(3))
    memory = Memory(gm.graph)
    x = next(iter(gm.graph.nodes))
    reached = memory.reaching([x], gm.graph)
    names = {str(n.target) for n in reached}
    assert "aten.zeros.default" in names
    assert "aten.ones.default" not in names


def test_every_awkward_model_is_tested():
    assert set(UNIFIED) | {"experts", "experts with skip"} == set(awkward.MODELS)


def test_a_length_that_cannot_be_found_is_refused() -> None:
    """It was taken for the length that had been tried first."""

    class Looks(Decoder):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * (1 if ids.sum().item() >= 0 else 2)

    with pytest.raises(PortError, match="longest sequence is unknown") as caught:
        longest(Looks().eval(), 37)
    assert caught.value.reasons[0].location is not None


class StretchedRotary(nn.Module):
    """TeleChat: tables of the longest sequence yet; beyond 64 tokens they are scaled by it."""

    def __init__(self) -> None:
        super().__init__()
        self.longest, self.cos, self.sin = 0, torch.zeros(0), torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        length = max(x.shape[2], 64)
        if length > self.longest:
            self.longest = length
            self.cos, self.sin = (table * (length / 64) for table in tables(length))
        return rotate(x, self.cos[: x.shape[2]], self.sin[: x.shape[2]])


def test_what_happens_beyond_the_longest_sequence_asked_for_does_not_matter() -> None:
    torch.manual_seed(3)
    model = Decoder(StretchedRotary).double().eval()
    with pytest.raises(PortError):
        capture(model)
    captured = capture(model, most=64)
    assert captured.limit == 64
    for length in (2, 37, 64):
        ids = torch.randint(0, VOCAB, (2, length))
        with torch.no_grad():
            assert (run(captured, ids) - model(ids)).abs().max() < 1e-12
