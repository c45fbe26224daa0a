"""Bands around the diagonal, and chunks of them: the masks that flags of the op express."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FULL", "Band", "band_of"]

_ROWS = 256  # of a mask, looked at together


@dataclass(frozen=True)
class Band:
    """Row i sees column j iff ``lower <= j - i <= upper``; None: without limit.

    `from_end`: `upper` and `lower` count from ``Tk - Tq`` (the last row sees the last column).
    `chunk`: and ``i // chunk == j // chunk``; None: whatever chunks they are in.
    """

    lower: int | None
    upper: int | None
    from_end: bool = False
    chunk: int | None = None

    def matrix(self, rows: int, columns: int) -> Tensor:
        """The mask itself, bool ``[rows, columns]``."""
        return self._rows(0, rows, rows, columns)

    def equals(self, allowed: Tensor) -> bool:
        """Whether a mask ``[.., rows, columns]`` is this band; needs no other one of its size."""
        rows, columns = allowed.shape[-2:]
        for start in range(0, rows, _ROWS):
            found = allowed[..., start : start + _ROWS, :]
            if not bool((found == self._rows(start, found.size(-2), rows, columns)).all()):
                return False
        return True

    def _rows(self, start: int, count: int, rows: int, columns: int) -> Tensor:
        """`count` of the rows, from `start` on. (Distances as numbers take eight times a mask.)"""
        diagonal = torch.arange(start, start + count)[:, None]
        if self.from_end:
            diagonal = diagonal + columns - rows
        column = torch.arange(columns)
        allowed = torch.ones(count, columns, dtype=torch.bool)
        if self.lower is not None:
            allowed &= column >= diagonal + self.lower
        if self.upper is not None:
            allowed &= column <= diagonal + self.upper
        if self.chunk is not None:
            row = torch.arange(start, start + count)[:, None]
            allowed &= row // self.chunk == column // self.chunk
        return allowed

    def __str__(self) -> str:
        words = self._band()
        return words if self.chunk is None else f"{words}, chunks of {self.chunk}"

    def _band(self) -> str:
        if self.upper == 0:
            words = "causal" if not self.from_end else "causal from the end"
            return words if self.lower is None else f"{words}, window {1 - self.lower}"
        if self.upper is None and self.lower is None:
            return "full"
        return f"window from {self.lower} to {self.upper}"


FULL = Band(None, None)


def band_of(allowed: Tensor | None) -> Band | None:
    """The band or chunks of one that a bool ``[Tq, Tk]`` mask is, or None."""
    if allowed is None or not bool(allowed.any()):
        return None
    rows, columns = allowed.shape
    # The last row shows the lower edge, the first row the upper one.
    seen = [(i, allowed[i].nonzero().flatten()) for i in range(0, rows, max(rows - 1, 1))]
    low = min((int(c[0]) - i for i, c in seen if len(c)), default=0)
    high = max((int(c[-1]) - i for i, c in seen if len(c)), default=0)
    lower = None if low <= 1 - rows else low
    upper = None if high >= columns - 1 else high
    for band in _readings(lower, upper, rows, columns):
        if band.equals(allowed):
            return band
    chunk = int(allowed[:, 0].sum())  # whoever sees the first column is in the first chunk
    for band in (Band(None, 0, chunk=chunk), Band(None, None, chunk=chunk)) if chunk > 1 else ():
        if band.equals(allowed):
            return band
    return None


def _readings(lower: int | None, upper: int | None, rows: int, columns: int) -> list[Band]:
    readings = [Band(lower, upper)]
    if rows != columns:
        offset = columns - rows
        readings.append(
            Band(
                None if lower is None else lower - offset,
                None if upper is None else upper - offset,
                from_end=True,
            )
        )
    return sorted(readings, key=lambda b: b.upper != 0)  # causal, if one of them is
