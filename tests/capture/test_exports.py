"""How often a model is traced: every trace of a large model takes seconds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxport
from fxport.capture.clone import clone_for_capture
from fxport.capture.export import capture
from fxport.capture.lengths import trace_at_lengths
from fxport.capture.sample import take_sample
from fxport.capture.symbolic import trace_symbolically
from fxport.errors import PortError
from tests.capture.test_one_more import LONGEST, Masked
from tests.zoo.called import VOCAB, Tiny

Sizes = tuple[tuple[int, ...], ...]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Sizes]:
    """The sizes of the token ids of every export, those of earlier calls among them."""
    sizes: list[Sizes] = []
    export = torch.export.export

    def noted(model: nn.Module, inputs: tuple[Tensor, ...], **options: object) -> object:
        sizes.append(tuple(tuple(ids.shape) for ids in inputs))
        return export(model, inputs, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.export, "export", noted)
    return sizes


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x[:, [-1]]], ids=["all", "the last"])
def test_what_a_symbolic_graph_says_is_not_traced_again(traced, change):
    assert capture(Masked(change)).limit == LONGEST
    assert traced == [((2, 37),), ((2, LONGEST),), ((1, LONGEST),)]


class Grows(Tiny):
    """Keeps a table that grows with the longest sequence."""

    table = torch.zeros(0, 1)

    def forward(self, ids: Tensor) -> Tensor:
        if len(self.table) < ids.shape[1]:
            self.table = torch.arange(ids.shape[1])[:, None] * 0.5
        return super().forward(ids) + self.table[: ids.shape[1]]


def test_samples_after_an_earlier_call_are_taken_once(traced):
    trace_at_lengths(clone_for_capture(Grows().eval()))
    assert len(traced) == len(set(traced))


class Table:
    """No module: keeps how many rows it has, and doubles them."""

    length = 0

    def rows(self, count: int) -> Tensor:
        if count > self.length:
            self.length = max(count, 2 * self.length)
            self.values = torch.arange(self.length)[:, None] * 0.5
        return self.values[:count]


class Kept(Tiny):
    """Has such a table, and then something that no symbol can be: a key."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids) + self.table.rows(ids.shape[1])
        return {ids.shape[1]: logits}[ids.shape[1]]


def test_a_trace_that_fails_leaves_no_symbols_in_plain_objects():
    clone = clone_for_capture(Kept().eval())
    with pytest.raises(PortError):  # no symbol at any length; plain lengths are tried then
        trace_symbolically(clone)
    assert vars(clone.table) == {}
    assert take_sample(clone, 3, 37).length == 37


class Float(Tiny):
    """Takes no table in float32 where its parameters are in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.eye(VOCAB))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) @ self.table


def test_a_failure_at_a_length_that_is_needed_is_final(traced):
    port = fxport.port(Float().eval())
    own, *half = traced
    # With buffers in float32: with a symbol, and plain. Then with all in half precision.
    assert (own, half) == (((2, 37),), [((2, 37),), ((3, 37),), ((2, 37),)])
    assert port.half is not None


class Split(Tiny):
    """Puts the length as a plain number into shapes, and compares it with what it made of it."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        n = int(ids.shape[1])
        parts = logits.new_zeros(4 * n).view(ids.shape[1], -1)
        return logits + parts.sum(-1, keepdim=True) if 4 * n // ids.shape[1] == 4 else logits


def test_numbers_that_are_made_of_the_length_need_no_lengths_of_their_own(traced):
    trace_at_lengths(clone_for_capture(Split().eval()))
    lengths = {sizes[0][1] for sizes in traced}
    assert lengths == {37, 53, 41, 2, 96}


class Dispatches(Tiny):
    """Does something else beyond 50 tokens."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        return logits * (2.0 if ids.shape[1] > 100 - int(ids.shape[1]) else 1.0)


def test_both_sides_of_a_number_that_is_made_of_the_length_are_traced(traced):
    with pytest.raises(PortError):
        trace_at_lengths(clone_for_capture(Dispatches().eval()))
    assert {50, 51} <= {sizes[0][1] for sizes in traced}
