"""The longest sequence: what shapes do not tell, the numbers of the positions do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxport.capture import longest as asked
from fxport.capture.clone import clone_for_capture
from fxport.capture.longest import longest
from fxport.capture.walk import last_within_tables

MOST = 4096


class Learned(nn.Module):
    """Learned positions, and a table of kinds that every token looks up at 0."""

    def __init__(self, rows: int, shift: int = 0, last: int = MOST, cut: int = 2 * MOST) -> None:
        super().__init__()
        self.embed, self.kinds = nn.Embedding(29, 8), nn.Embedding(64, 8)
        self.positions, self.head = nn.Embedding(rows, 8), nn.Linear(8, 29)
        self.shift, self.last, self.cut = shift, last, cut

    def forward(self, ids: Tensor) -> Tensor:
        assert ids.shape[1] <= self.cut
        at = (torch.arange(ids.shape[1]) + self.shift).clamp(max=self.last)
        return self.head(self.embed(ids) + self.positions(at) + self.kinds(torch.zeros_like(ids)))


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (Learned(96), 96),
        (Learned(96, shift=2), 94),
        (Learned(96, last=95), None),  # later ones have the last position
        (Learned(MOST), None),
        (Learned(96, cut=50), None),  # that is for the shapes to say
    ],
    ids=["learned", "shifted", "clamped", "as long as any", "asserted"],
)
def test_the_end_of_a_table_of_positions(model: Learned, found: int | None) -> None:
    assert last_within_tables(clone_for_capture(model), 37, MOST) == found


def test_no_sequence_beyond_a_table_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    runs = asked.runs

    def noting(model: nn.Module, length: int, usual: int) -> bool:
        lengths.append(length)
        return runs(model, length, usual)

    monkeypatch.setattr(asked, "runs", noting)
    assert longest(clone_for_capture(Learned(96)), 37) == 96
    assert lengths == [96]
    assert longest(clone_for_capture(Learned(96, cut=50)), 37) == 50
    assert longest(clone_for_capture(Learned(96, last=95)), 37) is None
