"""Which rows of a vocabulary each rank holds: vLLM's layout, so that its layers can hold them.

Every rank has the same number of rows, a multiple of 64 where the vocabulary is large enough
(matrix products want that); the last rank's are padded.
"""

from __future__ import annotations

__all__ = ["bounds", "divides", "padding"]

_ROWS = 64


def padding(size: int, world_size: int) -> int:
    """The multiple to which the vocabulary is padded; vLLM's `padding_size`."""
    part = -(-size // (_ROWS * world_size)) * _ROWS
    return _ROWS * world_size if part * (world_size - 1) < size else world_size


def bounds(size: int, world_size: int) -> list[int]:
    """Rank r holds rows ``bounds[r]`` to ``bounds[r + 1]``."""
    unit = padding(size, world_size)
    part = -(-size // unit) * unit // world_size
    return [min(part * rank, size) for rank in range(world_size + 1)]


def divides(size: int, world_size: int) -> bool:
    """Whether there is something to divide and every rank gets a row."""
    if world_size == 1:
        return False
    limits = bounds(size, world_size)
    return limits[-2] < limits[-1]
