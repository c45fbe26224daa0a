"""An attribute that forward sets before anybody reads it keeps nothing between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxport.capture.clone import clone_for_capture
from fxport.capture.earlier_calls import histories_of
from fxport.capture.export import capture
from fxport.capture.sample import take_sample
from fxport.errors import PortError, ReasonCode


class Layer(nn.Module):
    def __init__(self, note: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.loss: Any = None
        self.note = note

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.note(self, x)).tanh()


class Noting(nn.Module):
    """Four layers; each notes something, and their model reads it."""

    def __init__(self, note: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(29, 8)
        self.layers = nn.ModuleList(Layer(note) for _ in range(4))
        self.head = nn.Linear(8, 29)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | int]:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x), sum(layer.loss.mean() for layer in self.layers)


def noted(layer: Layer, x: Tensor) -> Tensor:
    layer.loss = x.square()
    return x + layer.loss


def by_name(layer: Layer, x: Tensor) -> Tensor:
    setattr(layer, "loss", x.abs())  # noqa: B010
    return x * getattr(layer, "loss")  # noqa: B009


@pytest.mark.parametrize("note", [noted, by_name])
def test_what_is_set_before_it_is_read_is_captured_once(note: Callable[..., Any]) -> None:
    model = Noting(note).eval()
    captured = capture(model)
    assert captured.symbolic
    ids = torch.randint(0, 29, (3, 19))
    inputs = captured.graph.graph.find_nodes(op="placeholder")
    given = [captured.parameters.get(n.meta["input"].name, ids) for n in inputs]
    with torch.no_grad():
        torch.testing.assert_close(captured.graph(*given), model(ids)[0], rtol=0, atol=0)


def summed(layer: Layer, x: Tensor) -> Tensor:
    layer.loss = x if layer.loss is None else layer.loss[:1, :1] + x
    return x + layer.loss


def if_there(layer: Layer, x: Tensor) -> Tensor:
    y = 2 * x if hasattr(layer, "seen") else x
    layer.seen = layer.loss = x
    return y


def among_all(layer: Layer, x: Tensor) -> Tensor:
    y = x if layer.__dict__["loss"] is None else 2 * x
    layer.loss = x
    return y


def among_variables(layer: Layer, x: Tensor) -> Tensor:
    y = x if vars(layer)["loss"] is None else 2 * x
    layer.loss = x
    return y


def written_there(layer: Layer, x: Tensor) -> Tensor:
    layer.__dict__["count"] = layer.__dict__.get("count", 0) + 1
    layer.loss = x
    return x * layer.__dict__["count"]


@pytest.mark.parametrize("note", [summed, if_there, among_all, among_variables, written_there])
def test_what_is_read_before_it_is_set_is_refused(note: Callable[..., Any]) -> None:
    with pytest.raises(PortError, match="earlier calls"):
        capture(Noting(note).eval())


def unread(layer: Layer, x: Tensor) -> Tensor:
    layer.loss = x.square()
    return x * 2.0


def test_what_is_set_before_it_is_read_needs_no_earlier_calls() -> None:
    clone = clone_for_capture(Noting(unread))
    fresh = take_sample(clone, 3, 37)
    assert not fresh.changed
    assert set(fresh.overwritten) == {(f"layers.{i}", "loss") for i in range(4)}
    assert histories_of(clone, fresh, 64, frozenset()) == {(): [fresh]}
    assert take_sample(clone, 3, 37, (11,)).changed  # nobody knows which call read what


def left_by_short_calls(layer: Layer, x: Tensor) -> Tensor:
    if x.shape[1] > 48:
        return x * (1.0 if layer.loss is None else 3.0)
    layer.loss = x.square()
    return x * 1.0


class Left(Noting):
    """Whose model reads nothing of what its layers note."""

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_what_one_length_sets_and_another_reads_is_refused() -> None:
    model = Left(left_by_short_calls).eval()
    with pytest.raises(PortError, match="changes the attribute `loss`") as refused:
        capture(model)
    assert refused.value.reasons[0].code is ReasonCode.MUTATED_STATE
    assert refused.value.reasons[0].location.source == "layer.loss = x.square()"
