"""What spellings of attention are made with.

Each: qkv ``[3, B, T, H, D]`` (and weights) -> a tensor.

All shapes differ: B=2, H=4, T=7, D=6; the functions read them from their input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DIRECT",
    "LEGAL",
    "Spelling",
    "causal_bool",
    "finish",
    "heads_first",
    "legal",
    "parameter",
]


@dataclass(frozen=True)
class Spelling:
    """One way to write an attention.

    Attributes:
        function: ``(qkv, *parameters, *buffers) -> output``.
        parameters, buffers: shapes or tensors made by a function of (H, limit).
        expect: words that must stand in the decision's detail.
    """

    function: Callable[..., Any]
    parameters: tuple[Callable[[], Tensor], ...] = ()
    buffers: tuple[Callable[[], Tensor], ...] = ()
    expect: tuple[str, ...] = ("causal",)

    def __str__(self) -> str:
        return self.function.__name__


LEGAL: list[Spelling] = []
DIRECT: list[Spelling] = []  # traced without Dynamo only, in a tenth of the time
LIMIT = 16


def legal(
    *expect: str,
    parameters: tuple[Callable[[], Tensor], ...] = (),
    buffers: tuple[Callable[[], Tensor], ...] = (),
    among: list[Spelling] = LEGAL,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        among.append(Spelling(function, parameters, buffers, expect or ("causal",)))
        return function

    return register


def tril_buffer() -> Tensor:
    return torch.tril(torch.ones(LIMIT, LIMIT)).view(1, 1, LIMIT, LIMIT)


def bool_buffer() -> Tensor:
    return torch.ones(LIMIT, LIMIT, dtype=torch.bool).tril()


def minus_inf_buffer() -> Tensor:
    return torch.full((LIMIT, LIMIT), float("-inf")).triu(1)


def parameter(*shape: int) -> Callable[[], Tensor]:
    def make() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5

    return make


def heads_first(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(0))
    return q, k, v


def causal_bool(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def finish(w: Tensor, v: Tensor) -> Tensor:
    return (w @ v).transpose(1, 2).flatten(2)
