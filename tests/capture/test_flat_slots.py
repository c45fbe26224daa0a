"""Experts that choose among all slots of all tokens in one vector."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxport.backends.torch import PackedModel
from fxport.capture.export import capture
from fxport.errors import PortError
from fxport.passes.serving import lower_for_serving
from tests.capture.packed import assert_exact
from tests.zoo.experts import CHOSEN, Routed, decoder


class ByMask(Routed):
    """Tokens, weights and rows by the mask itself."""

    def numbered(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[0]).unsqueeze(1).expand(-1, CHOSEN).reshape(-1)

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat, token, out = chosen.reshape(-1), self.numbered(x), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = flat == i
            if not mask.any():
                continue
            at = token[mask]
            y = expert(x[at]) * weights.reshape(-1)[mask].unsqueeze(-1)
            out.scatter_add_(0, at.unsqueeze(-1).expand(-1, x.shape[1]), y)
        return out


class ByNumber(ByMask):
    """Tokens by the number of the slot; the rows are there once for each slot."""

    def numbered(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[0]).repeat_interleave(CHOSEN)

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat, token, out = chosen.view(-1), self.numbered(x), torch.zeros_like(x)
        rows = x.repeat_interleave(CHOSEN, 0)
        for i, expert in enumerate(self.experts):
            at = (flat == i).nonzero(as_tuple=True)[0]
            if at.numel() == 0:
                continue
            out.index_add_(0, token[at], expert(rows[at]) * weights.view(-1)[at, None])
        return out


class Divided(ByMask):
    def token(self, at: Tensor) -> Tensor:
        return at // CHOSEN

    def slot(self, at: Tensor) -> Tensor:
        return at % CHOSEN

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat, out = chosen.flatten(), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            at = torch.nonzero(flat == i).squeeze(-1)
            if at.numel() == 0:
                continue
            token = self.token(at)
            out[token] += expert(x[token]) * weights[token, self.slot(at)].unsqueeze(-1)
        return out


@pytest.mark.parametrize("style", [ByMask, ByNumber, Divided])
def test_the_port_is_the_model(style: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    model = decoder(style, layers=1).double().eval()
    captured = capture(model)
    serving = lower_for_serving(captured, None).serving
    assert_exact(PackedModel(serving, captured.parameters), model)


class Reversed(ByMask):
    """The tokens of the other end."""

    def numbered(self, x: Tensor) -> Tensor:
        return super().numbered(x).flip(0)


class OtherSlots(ByMask):
    """Numbered as if each token had a slot more."""

    def numbered(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[0]).repeat_interleave(CHOSEN + 1)[: x.shape[0] * CHOSEN]


class Interleaved(ByMask):
    """First the first slots of all tokens."""

    def numbered(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[0]).repeat(CHOSEN)


class DividedByMore(Divided):
    def token(self, at: Tensor) -> Tensor:
        return at // (2 * CHOSEN)


class RemainderOfMore(Divided):
    def slot(self, at: Tensor) -> Tensor:
        return at % (CHOSEN + 1) % CHOSEN


@pytest.mark.parametrize(
    "style", [Reversed, OtherSlots, Interleaved, DividedByMore, RemainderOfMore]
)
def test_what_numbers_something_else_is_refused(style: Callable[[], nn.Module]) -> None:
    with pytest.raises(PortError):
        lower_for_serving(capture(decoder(style, layers=1).eval()), None)
