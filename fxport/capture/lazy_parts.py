"""``x.unbind(1)`` and ``x.split(1, 1)`` along a symbolic size: parts that are cut when asked for.

    h.unbind(1)[-1]          ->  h.select(1, -1)
    h.split(1, 1)[-1]        ->  h[:, -1:]
    pe.split([T, L - T])     ->  (pe[:T], pe[T:])

Torch would make as many parts as the size at hand says, and take that for the only size. Whoever
counts the parts or goes through them all gets these, as from torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["parts_when_asked"]

_UNBINDS = (torch.unbind, Tensor.unbind)
_SPLITS = (torch.split, Tensor.split)


def parts_when_asked(func: Any, args: Any, kwargs: Any) -> Sequence[Tensor] | None:
    """What a call of torch's gives instead; None for any other call."""
    if func in _UNBINDS:
        return _symbolic(_unbound, *args, **kwargs)
    if func in _SPLITS:
        return _symbolic(_split, *args, **kwargs)
    return None


def _symbolic(
    read: Callable[..., Sequence[Tensor] | None], *args: Any, **kwargs: Any
) -> Sequence[Tensor] | None:
    try:
        parts = read(*args, **kwargs)
    except TypeError:  # torch says what is wrong
        return None
    plain = isinstance(parts, _Parts) and not isinstance(parts.size, torch.SymInt)
    return None if plain else parts


def _unbound(input: Tensor, dim: int = 0) -> _Parts:
    return _Parts(input, dim, lambda i: input.select(dim, i), lambda: torch.unbind(input, dim))


def _split(tensor: Tensor, split_size: Any, dim: int = 0) -> Sequence[Tensor] | None:
    if isinstance(split_size, list | tuple):
        return _of_sizes(tensor, split_size, dim)
    if type(split_size) is not int or split_size != 1:
        return None

    def part(index: int) -> Tensor:
        return tensor.narrow(dim, tensor.shape[dim] + index if index < 0 else index, 1)

    return _Parts(tensor, dim, part, lambda: torch.split(tensor, 1, dim))


def _of_sizes(tensor: Tensor, sizes: Sequence[Any], dim: int) -> Sequence[Tensor] | None:
    if not any(isinstance(size, torch.SymInt) for size in sizes):
        return None
    torch._check(sum(sizes) == tensor.shape[dim])
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(tensor.narrow(dim, *part) for part in zip(starts, sizes, strict=True))


class _Parts(Sequence[Tensor]):
    def __init__(
        self,
        whole: Tensor,
        dim: int,
        part: Callable[[int], Tensor],
        every: Callable[[], Sequence[Tensor]],
    ) -> None:
        self.size = whole.shape[dim]
        self._part = part
        self._every = every

    def __getitem__(self, index: Any) -> Any:
        return self._part(index) if type(index) is int else self._every()[index]

    def __len__(self) -> int:
        return int(self.size)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._every())
