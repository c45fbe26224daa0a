"""Parts that the ranks take of a value that each of them has: every part says all ranks'.

    p = slice(copy_to(W) [8, C], 0, 4, 8)     on rank 1; `TAKEN` of p: ((0, 1, 2, 3), (4, 5, 6, 7))

The emission writes it, the checker reads it: what one rank takes is what it should, and a sum over
the ranks has every position once.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxport.capture.arguments import arguments

__all__ = ["SLICES", "TAKEN", "Indices", "constant_index", "positions_of", "taken_once"]

aten = torch.ops.aten
# By rank: positions along one dimension, None for all of them.
Indices = tuple[tuple[int, ...] | None, ...]
TAKEN = "taken"  # of a part: `Indices`
SLICES = {aten.slice.Tensor, aten.index_select.default}


def constant_index(index: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(index, device=like.device)


def positions_of(part: fx.Node) -> tuple[int, ...] | None:
    """What it takes; None: not known before it runs."""
    found = arguments(part)
    if part.target is aten.slice.Tensor:
        limits = found["start"], found["end"], found["step"]
        return tuple(range(*limits)) if all(isinstance(n, int) for n in limits) else None
    index = found["index"]
    return tuple(index.args[0]) if index.target is constant_index else None


def taken_once(part: fx.Node) -> bool:
    """Whether the ranks' parts are all positions, each on one rank."""
    indices: Indices = part.meta.get(TAKEN, (None,))
    held = sorted(i for index in indices for i in index or ())
    return None not in indices and held == list(range(len(held)))
