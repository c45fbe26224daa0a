"""Tables that earlier calls have kept of parameters that are never trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxport.capture.export import Captured, capture
from fxport.errors import PortError
from tests.capture.test_lengths import run
from tests.zoo.awkward import HEAD, LIMIT, VOCAB, rotate

KEPT = 16  # what a model that was called has seen


class KeptAngles(nn.Module):
    """Angles of a parameter, made when a longer sequence comes, and kept in a buffer."""

    def __init__(self, *, trained: bool = False) -> None:
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, HEAD, 2).float() / HEAD)
        self.frequencies = nn.Parameter(frequencies, requires_grad=trained)
        self.register_buffer("kept", torch.zeros(LIMIT, HEAD), persistent=False)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        assert length <= LIMIT
        if length > self.seen:
            angles = torch.arange(length)[:, None] * self.frequencies
            self.kept[:length] = angles.repeat(1, 2).detach()
            self.seen = length
        angles = self.kept[:length]
        return rotate(x, angles.cos(), angles.sin())


class Turned(nn.Module):
    """As small as shows it: tokens, turned by their positions, to logits."""

    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HEAD)
        self.rotary = KeptAngles(trained=trained)
        self.head = nn.Linear(HEAD, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rotary(self.embed(ids)[:, None])[:, 0])


def small(*, trained: bool = False) -> Turned:
    torch.manual_seed(3)
    return Turned(trained=trained).eval()


def worst(captured: Captured, make: Callable[[], nn.Module]) -> float:
    """Of logits against a model that was never called before, at every kind of length."""
    found = []
    for length in (2, KEPT, KEPT + 1, 37, LIMIT):
        ids = torch.randint(0, VOCAB, (2, length))
        with torch.no_grad():
            found.append((run(captured, ids) - make()(ids)).abs().max().item())
    return max(found)


@pytest.mark.parametrize("called", [False, True])
def test_the_graph_computes_what_was_kept(called: bool) -> None:
    model = small()
    if called:
        model(torch.zeros(2, KEPT, dtype=torch.long))
    captured = capture(model)
    assert captured.limit == LIMIT
    assert worst(captured, small) < 2e-5
    assert model.rotary.seen == (KEPT if called else 0)

    def turned() -> Turned:
        """The same model with other frequencies, never called."""
        other = small()
        other.rotary.frequencies.mul_(1.5)
        return other

    model.rotary.frequencies.mul_(1.5)
    assert worst(captured, turned) < 2e-5 < worst(captured, small)


def test_the_half_precision_graph_is_found_without_the_values() -> None:
    model = small()
    model(torch.zeros(2, KEPT, dtype=torch.long))
    own = capture(model)
    half = capture(model, torch.bfloat16, convert_buffers=True, own=own)
    used = {n.name for n in half.graph.graph.find_nodes(op="placeholder") if n.users}
    assert any("frequencies" in name for name in used) and half.limit == LIMIT


def test_what_was_kept_of_other_values_is_refused() -> None:
    model = small()
    model(torch.zeros(2, KEPT, dtype=torch.long))
    model.rotary.frequencies.mul_(1 + 1e-6)
    with pytest.raises(PortError, match=r"earlier calls|differs between"):
        capture(model)


def test_a_trained_parameter_moves_on_from_what_was_kept() -> None:
    model = small(trained=True)
    with torch.no_grad():
        model(torch.zeros(2, KEPT, dtype=torch.long))
    with pytest.raises(PortError, match=r"earlier calls|differs between"):
        capture(model)


@pytest.mark.parametrize("stale", [False, True])
def test_a_short_table_of_other_values_is_refused(stale: bool) -> None:
    """Longer calls make all of it anew: up to `KEPT` tokens alone the model gives what it kept."""
    model = small()
    frequencies = model.rotary.frequencies.data
    del model.rotary.frequencies
    model.rotary.register_buffer("frequencies", frequencies)
    model(torch.zeros(2, KEPT, dtype=torch.long))
    if not stale:
        assert worst(capture(model), small) < 2e-5
        return
    model.rotary.frequencies.mul_(1.5)
    with pytest.raises(PortError, match=r"earlier calls|between inputs"):
        capture(model)
