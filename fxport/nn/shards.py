"""Which part of a full parameter a rank holds, and reading and putting together such parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxport.errors import FxportError, SavedPortError
from fxport.parallel.context import ParallelContext

__all__ = ["Shard", "ShardedModule", "copy_part", "full_state_dict", "shards_of"]


@dataclass(frozen=True)
class Shard:
    """Equal contiguous parts of one dimension; the last part may end in padding.

    Attributes:
        dim: the divided dimension.
        full: its size in the whole model, without padding.
        part: its size on every rank.
        replicas: how many neighbouring ranks hold the same part.
    """

    dim: int
    full: int
    part: int
    replicas: int = 1

    def span(self, rank: int) -> tuple[int, int]:
        """First and one past the last position that `rank` holds; padding is not counted."""
        start = min(rank // self.replicas * self.part, self.full)
        return start, min(start + self.part, self.full)

    def full_shape(self, held: Tensor) -> tuple[int, ...]:
        return (*held.shape[: self.dim], self.full, *held.shape[self.dim + 1 :])


class ShardedModule(nn.Module):
    """A module that says of its own parameters which part of the whole it holds."""

    def __init__(self, parallel_context: ParallelContext | None) -> None:
        super().__init__()
        self.parallel_context = parallel_context or ParallelContext(0, 1)
        self.shards: dict[str, Shard] = {}

    def add_parameter(self, name: str, full: Tensor, shard: Shard | None) -> None:
        """Registers this rank's part of `full`; every rank draws the same full values."""
        if shard is None:
            self.register_parameter(name, nn.Parameter(full))
            return
        shape = list(full.shape)
        shape[shard.dim] = shard.part
        self.shards[name] = shard
        held = nn.Parameter(full.new_zeros(shape))
        copy_part(name, held, full, shard, self.parallel_context.rank)
        self.register_parameter(name, held)


def shards_of(model: nn.Module) -> dict[str, tuple[Shard, ParallelContext]]:
    """Qualified name -> shard, for every divided parameter (under each of its names)."""
    return {
        f"{prefix}.{name}" if prefix else name: (shard, module.parallel_context)
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ShardedModule)
        for name, shard in module.shards.items()
    }


def copy_part(name: str, held: Tensor, full: Tensor, shard: Shard | None, rank: int) -> None:
    """Fills `held` with its part of the full value; padding becomes zero.

    Raises:
        SavedPortError: `full` has another shape than the whole parameter.
    """
    expected = tuple(held.shape) if shard is None else shard.full_shape(held)
    if tuple(full.shape) != expected:
        raise SavedPortError(f"`{name}` has shape {tuple(full.shape)}; the model needs {expected}")
    with torch.no_grad():
        if shard is None:
            held.copy_(full)
            return
        start, stop = shard.span(rank)
        held.zero_()
        held.narrow(shard.dim, 0, stop - start).copy_(full.narrow(shard.dim, start, stop - start))


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the whole model, equal on every rank; tied tensors under every name.

    A collective: every rank of the group must call it.

    Raises:
        FxportError: a divided parameter is on the meta device.
    """
    shards = shards_of(model)
    done: dict[int, Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, held in model.state_dict(keep_vars=True).items():
        if id(held) not in done:
            done[id(held)] = _gathered(name, held.detach(), shards)
        result[name] = done[id(held)]
    return result


def _gathered(
    name: str, held: Tensor, shards: Mapping[str, tuple[Shard, ParallelContext]]
) -> Tensor:
    if held.is_meta:
        raise FxportError(f"`{name}` is on the meta device: it has no data")
    if name not in shards:
        return held
    shard, context = shards[name]
    full = held.new_empty(shard.full_shape(held))
    for rank, part in enumerate(context.transport.all_gather(held)):
        start, stop = shard.span(rank)
        if stop > start:
            full.narrow(shard.dim, start, stop - start).copy_(
                part.narrow(shard.dim, 0, stop - start)
            )
    return full
