"""Constants of a sample: what they hold, and how much memory they keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxport.capture import lengths
from fxport.capture.clone import clone_for_capture
from fxport.capture.sample import Sample, take_sample
from fxport.capture.unify import NeedsTable
from tests.zoo.awkward import LIMIT, Decoder

COPIES = 60


class GrownMask(nn.Module):
    """OpenELM: twice as long as the longest call, and one for each sequence of a large batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unseen", torch.ones(64, 64).triu(1), persistent=False)

    def forward(self, length: int) -> Tensor:
        if self.unseen.shape[-1] < length:
            made = torch.ones(2 * length, 2 * length).triu(1)
            self.register_buffer("unseen", made, persistent=False)
        whole = self.unseen[None].repeat(COPIES, 1, 1) == 0
        return whole[1, :length, :length]


def taken() -> Sample:
    clone = clone_for_capture(Decoder(mask=GrownMask).eval())
    return take_sample(clone, 2, 37, (LIMIT,))


def outermost(sample: Sample) -> list[fx.Node]:
    """Constants that something else reads."""
    fixed = [n for n in sample.needed if n.op == "call_function" and n not in sample.data]
    return [n for n in fixed if any(u in sample.data for u in n.users)]


def test_large_constants_that_only_others_are_made_of_are_let_go() -> None:
    sample = taken()
    masks = [n for n in outermost(sample) if n.meta["val"].dtype == torch.bool]
    assert masks
    for mask in masks:
        assert torch.equal(sample.value(mask), torch.ones(37, 37).triu(1).bool())
    storages = {v.untyped_storage()._cdata: v for v in sample._values.values()}
    held = sum(v.untyped_storage().nbytes() for v in storages.values())
    assert held < COPIES * (2 * LIMIT) ** 2  # bytes of one mask before it is cut, as bool


def test_one_that_was_let_go_is_made_again() -> None:
    sample = taken()
    sample.value(outermost(sample)[0])
    (repeated, *_) = sample.graph.graph.find_nodes(
        op="call_function", target=torch.ops.aten.repeat.default
    )
    assert repeated not in sample._values
    whole = torch.ones(2 * LIMIT, 2 * LIMIT).triu(1).expand(COPIES, -1, -1)
    assert torch.equal(sample.value(repeated), whole)


@pytest.mark.parametrize(("most", "longest"), [(2**20, 64), (2**31, LIMIT)])
def test_tables_are_as_long_as_memory_allows(monkeypatch, most: int, longest: int) -> None:
    """Of a model that takes up to `LIMIT`; without a limit they would be made up to 64."""
    monkeypatch.setattr(lengths, "UNBOUNDED", 64)
    monkeypatch.setattr(lengths, "_MOST_BYTES", most)
    monkeypatch.setattr(lengths, "unify", with_tables_alone)
    clone = clone_for_capture(Decoder(mask=GrownMask).eval())
    samples = [take_sample(clone, batch, length) for batch, length in ((3, 37), (2, 53))]
    assert lengths._unified(clone, samples, (), LIMIT) == (longest, longest)


def with_tables_alone(samples: list[Sample], whole: Sample | None = None) -> int:
    if whole is None:
        raise NeedsTable(1)
    return whole.length
