"""Experts whose slots are numbered through, ``row * K + slot``, and what stands beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxport
from fxport.backends.torch import PackedModel
from fxport.capture.export import capture
from fxport.capture.skips import _possible
from fxport.errors import PortError
from fxport.passes.serving import lower_for_serving
from tests.capture.packed import assert_exact
from tests.zoo.experts import CHOSEN, EXPERTS, WIDTH, Routed, decoder


class WrittenBySlot(Routed):
    """What each expert gives is written to the row of the slot that chose it."""

    def number(self, row: Tensor, slot: Tensor) -> Tensor:
        return row * CHOSEN + slot

    def chosen_by(self, chosen: Tensor, i: int) -> tuple[Tensor, Tensor]:
        row, slot = torch.where(chosen == i)
        return row, slot

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        slots = x.new_zeros(x.shape[0] * CHOSEN, WIDTH)
        for i, expert in enumerate(self.experts):
            row, slot = self.chosen_by(chosen, i)
            if row.numel() == 0:
                continue
            slots[self.number(row, slot)] = expert(x[row])
        return (slots.view(-1, CHOSEN, WIDTH) * weights[..., None]).sum(1)


class SlotsFirst(WrittenBySlot):
    """The slots are the first axis of the mask."""

    def chosen_by(self, chosen: Tensor, i: int) -> tuple[Tensor, Tensor]:
        slot, row = torch.where(chosen.t() == i)
        return row, slot


class TakenBySlot(WrittenBySlot):
    """Rows and weights of slots are taken by their number, too."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        each = x.repeat_interleave(CHOSEN, 0)
        slots, flat = torch.zeros_like(each), weights.view(-1)
        for i, expert in enumerate(self.experts):
            number = self.number(*self.chosen_by(chosen, i))
            slots[number] = expert(each[number]) * flat[number, None]
        return slots.view(-1, CHOSEN, WIDTH).sum(1)


class AddedBySlot(WrittenBySlot):
    """NVIDIA's loop over the experts of a rank: a mask of tokens, a sum by slot in place, and
    work that keeps gradients flowing where no expert is here."""

    def here(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape[:1], dtype=torch.bool)

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        slots, active, here = x.new_zeros(x.shape[0], CHOSEN, WIDTH), 0, self.here(x)
        for i, expert in enumerate(self.experts):
            row, slot = torch.where(torch.logical_and(chosen == i, here.unsqueeze(-1)))
            if row.numel() == 0:
                continue
            active += 1
            rows = x.gather(dim=0, index=row[:, None].expand(-1, WIDTH))
            out = expert(rows) * weights[row, slot, None]
            at = self.number(row, slot)[:, None].expand(-1, WIDTH)
            slots.view(-1, WIDTH).scatter_add_(dim=0, index=at, src=out)
        if self.is_idle(active):
            out = self.experts[0](torch.zeros_like(x[:1])) * weights[0, 0]
            slots[0, 0] += out[0]
        return slots.sum(1)

    def is_idle(self, active: int) -> bool:
        return active == 0


EXACT = (WrittenBySlot, SlotsFirst, TakenBySlot, AddedBySlot)


@pytest.mark.parametrize("style", EXACT)
def test_the_port_is_the_model(style: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    model = decoder(style, layers=1).double().eval()
    port = fxport.port(model)
    assert_exact(PackedModel(port.serving, port.parameters), model)


class OtherSlot(WrittenBySlot):
    """The last slot's number is that of the first."""

    def number(self, row: Tensor, slot: Tensor) -> Tensor:
        return row * CHOSEN + (CHOSEN - 1 - slot)  # refused


class OtherFactor(WrittenBySlot):
    """Rows of two tokens are written by one."""

    def number(self, row: Tensor, slot: Tensor) -> Tensor:
        return (row * (CHOSEN - 1) + slot).clamp(max=0)  # refused


class FewerSlots(WrittenBySlot):
    """The numbers of slots reach into the next token's rows."""

    def number(self, row: Tensor, slot: Tensor) -> Tensor:
        return row * 1 + slot  # refused


class SomeHere(AddedBySlot):
    """Only a few tokens are on this rank: none may be."""

    def here(self, x: Tensor) -> Tensor:
        return x[:, 0] > 0

    def is_idle(self, active: int) -> bool:
        return active == 0


class OneActive(AddedBySlot):
    """Where all tokens chose one expert, that changes the first token."""

    def is_idle(self, active: int) -> bool:
        return active == 1


@pytest.mark.parametrize("style", [OtherSlot, OtherFactor, FewerSlots, SomeHere, OneActive])
def test_twins_are_refused(style: Callable[[], nn.Module]) -> None:
    with pytest.raises(PortError) as refused:
        lower_for_serving(capture(decoder(style, layers=1).eval()), None)
    location = refused.value.reasons[0].location
    assert location is not None
    if style in (OtherSlot, OtherFactor, FewerSlots):
        assert location.source.endswith("# refused"), location


def test_any_two_experts_are_both_empty_in_a_pattern_that_can_be() -> None:
    group = list(range(EXPERTS))
    patterns = _possible(frozenset(group), [group])
    assert all(not p.issuperset(group) for p in patterns)
    for one in group:
        for other in group:
            assert any({one, other} <= p for p in patterns)
    alone = frozenset(group[:-1])
    assert _possible(alone, [group]) == [alone]
