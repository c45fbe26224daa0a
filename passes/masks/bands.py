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
        return self._at(torch.arange(rows), torch.arange(columns), columns - rows)

    def equals(self, allowed: Tensor, places: Tensor | None = None) -> bool:
        """Whether a mask ``[.., rows, columns]`` is this band; needs no other one of its size.

        Args:
            places: which rows and columns of a square mask these are; by default all.
        """
        rows, columns = (_places(n, places) for n in allowed.shape[-2:])
        for start in range(0, len(rows), _ROWS):
            found = allowed[..., start : start + _ROWS, :]
            wanted = self._at(rows[start : start + _ROWS], columns, len(columns) - len(rows))
            if not bool((found == wanted).all()):
                return False
        return True

    def _at(self, rows: Tensor, columns: Tensor, more: int) -> Tensor:
        """At some rows and columns. (Distances as numbers take eight times a mask.)

        Args:
            more: columns than rows there are in the whole mask.
        """
        row = rows[:, None]
        diagonal = row + more if self.from_end else row
        allowed = torch.ones(len(rows), len(columns), dtype=torch.bool)
        if self.lower is not None:
            allowed &= columns >= diagonal + self.lower
        if self.upper is not None:
            allowed &= columns <= diagonal + self.upper
        if self.chunk is not None:
            allowed &= row // self.chunk == columns // self.chunk
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


def band_of(allowed: Tensor | None, places: Tensor | None = None) -> Band | None:
    """The band or chunks of one that a bool ``[Tq, Tk]`` mask is, or None.

    Args:
        places: see `Band.equals`; the first and the last row among them.
    """
    if allowed is None or not bool(allowed.any()):
        return None
    at_rows, at_columns = (_places(n, places) for n in allowed.shape)
    rows, columns = int(at_rows[-1]) + 1, int(at_columns[-1]) + 1
    # The last row shows the lower edge, the first row the upper one.
    seen = [(int(at_rows[i]), at_columns[allowed[i]]) for i in (0, -1)]
    low = min((int(c[0]) - i for i, c in seen if len(c)), default=0)
    high = max((int(c[-1]) - i for i, c in seen if len(c)), default=0)
    lower = None if low <= 1 - rows else low
    upper = None if high >= columns - 1 else high
    for band in _readings(lower, upper, rows, columns):
        if band.equals(allowed, places):
            return band
    first = at_rows[allowed[:, 0]]  # whoever sees the first column is in the first chunk
    chunk = int(first[-1]) + 1 if len(first) else 0
    for band in (Band(None, 0, chunk=chunk), Band(None, None, chunk=chunk)) if chunk > 1 else ():
        if band.equals(allowed, places):
            return band
    return None


def _places(count: int, given: Tensor | None) -> Tensor:
    return torch.arange(count) if given is None else given


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
