"""Attention within chunks of positions, as calls that the kernels know.

    every row is in one chunk       as it is
    the chunk divides the length    [B, H, T, D] -> [B * T / chunk, H, chunk, D]: a longer batch
    else, or packed already         [B, H, T, D] -> [1, H, B * T, D]: packed, a segment for each
                                    chunk; and a window, which keeps kernels from looking farther

None of it moves what lies in memory as ``[B, T, H, D]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxport.ops.layout import in_row_major_layout

__all__ = ["Chunks"]

_WINDOW, _CHUNK = 2, 8  # where they stand among the fields of `AttentionParams`


@dataclass(frozen=True)
class Chunks:
    """How one call is folded.

    Attributes:
        batch, length, chunk: B, T and the size of a chunk, which is smaller than T.
        cu_seqlens: of the call.
    """

    batch: int
    length: int
    chunk: int
    cu_seqlens: Tensor | None = None

    @staticmethod
    def of(q: Tensor, cu_seqlens: Tensor | None, numbers: Sequence[float]) -> Chunks | None:
        """Of a call with these numbers; None where chunks forbid nothing."""
        chunk = int(numbers[_CHUNK]) if len(numbers) > _CHUNK else 0
        if chunk <= 0 or chunk >= q.shape[2] or q.shape[0] == 0:
            return None
        return Chunks(q.shape[0], q.shape[2], chunk, cu_seqlens)

    @property
    def divides(self) -> bool:
        """Whether all chunks are of one size."""
        return self.cu_seqlens is None and self.length % self.chunk == 0

    def numbers(self, numbers: Sequence[float]) -> tuple[float, ...]:
        """Those of the folded call."""
        found = list(numbers[:_CHUNK])
        if not self.divides:
            reach = self.chunk - 1
            found[_WINDOW] = min(reach, found[_WINDOW]) if found[_WINDOW] >= 0 else reach
        return tuple(found)

    def borders(self, device: torch.device) -> Tensor | None:
        """Where the segments begin, int32; None if the folded call is not packed."""
        if self.divides:
            return None
        if self.cu_seqlens is not None:
            return self._within(self.cu_seqlens)
        within = torch.arange(0, self.length, self.chunk, dtype=torch.int32, device=device)
        rows = torch.arange(self.batch, dtype=torch.int32, device=device) * self.length
        starts = (rows[:, None] + within).flatten()
        return torch.cat((starts, starts.new_full((1,), self.batch * self.length)))

    def _within(self, cu_seqlens: Tensor) -> Tensor:
        """Of chunks in segments; as many numbers whatever the segments are, the last ones T."""
        rows = torch.arange(self.length, dtype=torch.int32, device=cu_seqlens.device)
        starts = cu_seqlens[torch.bucketize(rows, cu_seqlens[1:], right=True)]
        begins = (rows - starts) % self.chunk == 0
        most = len(cu_seqlens) + self.length // self.chunk
        found = torch.where(begins, rows, self.length).sort().values[:most]
        return torch.cat((found, found.new_full((1,), self.length)))

    def fold(self, x: Tensor) -> Tensor:
        """``[B, H, T, D]`` as the folded call takes it."""
        _, heads, _, size = x.shape
        return x.transpose(1, 2).reshape(*self._rows, heads, size).transpose(1, 2)

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse, for what lies in memory as ``[.., T, H, D]``."""
        _, heads, _, size = x.shape
        return x.transpose(1, 2).view(self.batch, self.length, heads, size).transpose(1, 2)

    def fold_rows(self, x: Tensor) -> Tensor:
        """``[B, H, T]``, contiguous in the new form."""
        _, heads, _ = x.shape
        return x.transpose(1, 2).reshape(*self._rows, heads).transpose(1, 2).contiguous()

    def unfold_rows(self, x: Tensor) -> Tensor:
        """The inverse."""
        _, heads, _ = x.shape
        rows = x.transpose(1, 2).reshape(self.batch, self.length, heads)
        return in_row_major_layout(rows.transpose(1, 2))

    @property
    def _rows(self) -> tuple[int, int]:
        if self.divides:
            return self.batch * (self.length // self.chunk), self.chunk
        return 1, self.batch * self.length
