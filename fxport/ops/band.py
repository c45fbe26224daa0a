"""The columns that causality and the window leave to a row, as two numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fxport.ops.params import AttentionParams

__all__ = ["Band", "band_of"]


@dataclass(frozen=True)
class Band:
    """Row i sees column j iff ``low <= j - i <= high``; None means without limit on that side.

    A limit that forbids nothing for the given lengths is None, so ``Band(None, None)`` says that
    every row sees every column, however the call was spelt.
    """

    low: int | None
    high: int | None

    def columns(self, rows: range, length: int) -> range:
        """The smallest range of columns in [0, length) outside which no row of `rows` sees."""
        start = 0 if self.low is None else max(0, rows.start + self.low)
        stop = length if self.high is None else min(length, rows.stop + self.high)
        return range(start, max(start, stop))

    def covers(self, rows: range, columns: range) -> bool:
        """Whether every row of `rows` sees every column of `columns`."""
        return (self.low is None or columns.start - (rows.stop - 1) >= self.low) and (
            self.high is None or columns.stop - 1 - rows.start <= self.high
        )


@lru_cache(maxsize=1024)
def band_of(params: AttentionParams, rows: int, columns: int) -> Band:
    """The band of a call with Tq = rows and Tk = columns.

    With ``a = i + q_offset``, ``j >= a - window_left`` and ``j <= a + window_right`` are limits on
    ``j - i``; causal is the limit ``j <= a``.
    """
    low: int | None = None
    high: int | None = None
    if params.window_left >= 0:
        low = params.q_offset - params.window_left
    if params.window_right >= 0:
        high = params.q_offset + params.window_right
    if params.causal:  # no window ends earlier
        high = params.q_offset
    if low is not None and low <= -(rows - 1):  # j - i is never less than this
        low = None
    if high is not None and high >= columns - 1:
        high = None
    return Band(low, high)
