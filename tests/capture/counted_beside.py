"""A file of the user's that defines no module: counts calls, and asks whether it is traced."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_compiling

CALLS = 0
SEEN = {"calls": 0}


def counted(x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1  # HERE
    return x * 2 if CALLS > 500 else x


def noted(x: Tensor) -> Tensor:
    SEEN["calls"] += 1
    return x


def untraced(x: Tensor, length: int) -> Tensor:
    return x * 2 if not is_compiling() and length > 60 else x
