"""Expert loops: those that treat each token on its own are ported, their twins are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxport
from fxport.backends.torch import PackedModel
from fxport.capture.export import capture
from fxport.capture.frames import ADDS
from fxport.errors import PortError, ReasonCode
from fxport.passes.serving import lower_for_serving
from tests.zoo.awkward import LAYERS, LIMIT, VOCAB
from tests.zoo.experts import EXACT, MIXING, MODELS, Routed, decoder


def worst_difference(model: nn.Module, lengths: list[int], *, loops: int = 0) -> float:
    """Port against original in float64, two sequences packed.

    Args:
        loops: how many of them run the chosen experts alone.
    """
    port = fxport.port(model)
    assert sum(d.pass_name == "experts" for d in port.report.decisions) == loops
    body = port.serving.body
    linears = body.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    experts = {n for n in port.parameters if ".experts." in n} if loops else set()
    assert not experts & {body.weights.get(n.name) for x in linears for n in x.all_input_nodes}
    packed = PackedModel(port.serving, port.parameters)
    worst = 0.0
    for length in lengths:
        sequences = [torch.randint(0, VOCAB, (n,)) for n in (length, 11)]
        for sequence, found in zip(sequences, packed(sequences), strict=True):
            with torch.no_grad():
                expected = model(sequence[None])[0]
            worst = max(worst, (found - expected).abs().max().item())
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_the_port_is_the_model(name: str) -> None:
    torch.manual_seed(3)
    model = MODELS[name]().double().eval()
    # one token leaves an expert empty; at 96 every one of them has tokens
    assert worst_difference(model, [1, 2, 5, 37, LIMIT], loops=LAYERS) < 1e-12


@pytest.mark.parametrize("name", MIXING)
def test_twins_that_mix_tokens_are_refused_at_their_line(name: str) -> None:
    with pytest.raises(PortError) as caught:
        lower_for_serving(capture(decoder(MIXING[name], layers=1).eval()), None)
    location = caught.value.reasons[0].location
    assert location is not None and "# HERE" in location.source


class Half(Routed):
    """Not every token is chosen by anyone: rows without an expert keep what was there."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = x * 0.5
        rows = (weights[:, 0] > 0.5).nonzero().squeeze(-1)
        if rows.shape[0] > 0:
            y[rows] = self.experts[0](x[rows])
        return y


def test_a_mask_made_of_numbers_keeps_the_other_rows() -> None:
    torch.manual_seed(3)
    model = decoder(Half, layers=2).double().eval()
    assert worst_difference(model, [1, 2, 5, 37]) < 1e-12


class Infinite(Routed):
    """Infinite for tokens that are not selected: they must not leak through the sum."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            if rows.numel() == 0:
                continue
            share = 1.0 / (chosen == i).any(-1)[rows].to(x.dtype)[:, None]
            y.index_add_(0, rows, expert(x[rows]) * share * weights[rows, slot, None])
        return y


def test_what_is_computed_for_other_rows_does_not_leak() -> None:
    torch.manual_seed(3)
    model = decoder(Infinite, layers=1).double().eval()
    assert worst_difference(model, [1, 5, 37], loops=1) < 1e-12


def test_a_selection_is_taken_and_put_back_once_per_expert_and_layer() -> None:
    graph = capture(decoder(EXACT["numel"], layers=2).eval()).graph.graph
    assert sum(ADDS in node.meta for node in graph.nodes) == 2 * 3
    targets = {str(n.target) for n in graph.nodes}
    assert not targets & {"aten.where.default", "aten.nonzero.default", "aten._assert_async.msg"}


def test_an_attention_mask_may_repeat_itself_beside_experts() -> None:
    """Where no expert has tokens no rows are looked for; the mask is to be the same there."""

    class Window(nn.Module):
        def forward(self, length: int) -> Tensor:
            at = torch.arange(length)
            near = (at.unsqueeze(1) - at.unsqueeze(0)) < 6
            return (at.unsqueeze(1) >= at.unsqueeze(0)) & near

    torch.manual_seed(3)
    model = decoder(EXACT["boolean masks"], layers=1, mask=Window).double().eval()
    assert worst_difference(model, [1, 5, 37], loops=1) < 1e-12


def test_the_report_says_what_it_costs() -> None:
    # nothing shows that a token chooses no expert twice
    report = fxport.port(decoder(EXACT["twice, slots last"], layers=2).double().eval()).report
    found = [d for d in report.left() if d.reason and d.reason.code is ReasonCode.EVERY_TOKEN]
    assert [d.module for d in found] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert all(d.location and "index_add_" in d.location.source for d in found)
    assert "3 selections" in str(found[0].reason)


class SlotRows(Routed):
    """minimind: a row for each slot, and masks written out twice."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        rows, flat = x.repeat_interleave(weights.shape[-1], dim=0), chosen.view(-1)
        y = torch.empty_like(rows)
        for i, expert in enumerate(self.experts):
            y[flat == i] = expert(rows[flat == i])
        return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)


class OtherSlots(SlotRows):
    """What one expert gives goes where another one was chosen."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        rows, flat = x.repeat_interleave(weights.shape[-1], dim=0), chosen.flatten().clone()
        y = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            found = rows[flat == i]
            flat[:] = flat.flip(0)
            y[flat == i] = expert(found)  # HERE
        return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)


class UniqueStyle(Routed):
    """A loop over the experts that were chosen, as `torch.unique` gives them."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for number in torch.unique(chosen):
            mask = chosen == int(number.item())
            rows = mask.any(dim=-1).nonzero().squeeze(-1)
            slot = mask[rows].int().argmax(dim=-1, keepdim=True)
            share = weights.index_select(0, rows).gather(-1, slot)
            y.index_add_(0, rows, self.experts[int(number)](x.index_select(0, rows)) * share)
        return y


class GatherStyle(Routed):
    """Row numbers written out for every column."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            if rows.numel() == 0:
                continue
            index = rows[:, None].expand(-1, self.columns(x))  # HERE: only some
            z = expert(self.widened(x.gather(dim=0, index=index), x)) * weights[rows, slot, None]
            y.scatter_add_(dim=0, index=rows.view(-1, 1).repeat(1, x.size(1)), src=z)
        return y

    def columns(self, x: Tensor) -> int:
        return x.size(1)

    def widened(self, taken: Tensor, x: Tensor) -> Tensor:
        return taken


class GathersAPart(GatherStyle):
    """Half of the columns of each row."""

    def columns(self, x: Tensor) -> int:
        return x.size(1) // 2

    def widened(self, taken: Tensor, x: Tensor) -> Tensor:
        return torch.cat([taken, taken], 1)


class HowManyUnique(UniqueStyle):
    """What a token gets depends on how many experts the others chose."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return super().mix(x, weights, chosen) / chosen.unique().numel()  # HERE


class ChosenAgain(Routed):
    """Weights are chosen among those of the rows that were chosen."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = (chosen == i).any(dim=1)
            if mask.sum() == 0:
                continue
            share = torch.zeros(mask.sum())
            for slot in range(weights.shape[1]):
                here = chosen[mask, slot] == i
                share[here] = weights[mask, slot][here]  # HERE
            y[mask] += expert(x[mask]) * share.unsqueeze(1)
        return y


@pytest.mark.parametrize("style", [SlotRows, UniqueStyle, GatherStyle])
def test_more_ways_to_find_the_rows_of_an_expert(style: type[Routed]) -> None:
    torch.manual_seed(3)
    model = decoder(style, layers=1).double().eval()
    packed = PackedModel(
        lower_for_serving(capture(model), None).serving, dict(model.named_parameters())
    )
    for length in (1, 5, 37, LIMIT - 1):
        ids = torch.randint(0, VOCAB, (length,))
        with torch.no_grad():
            assert (packed([ids])[0] - model(ids[None])[0]).abs().max() < 1e-12


@pytest.mark.parametrize("style", [OtherSlots, HowManyUnique, ChosenAgain, GathersAPart])
def test_other_rows_or_their_number_are_refused(style: type[Routed]) -> None:
    with pytest.raises(PortError) as caught:
        capture(decoder(style, layers=1).eval())
    location = caught.value.reasons[0].location
    assert location is not None and "# HERE" in location.source


class Taken(Routed):
    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        ends = chosen.flatten().bincount().cpu().numpy().cumsum(0)  # HERE
        return x * int(ends[-1])


def test_numbers_taken_out_of_torch_are_refused_at_their_line() -> None:
    with pytest.raises(PortError) as caught:
        capture(decoder(Taken, layers=1).eval())
    reason = caught.value.reasons[0]
    assert reason.location is not None and "# HERE" in reason.location.source
    assert "torch.where" in reason.hint
