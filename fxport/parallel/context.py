"""Which rank of how many this process (or simulated thread) is.

One object goes through planning, emission and execution. It never owns the process group: whoever
made the group destroys it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fxport.errors import FxportError
from fxport.parallel.transport import DistributedTransport, Simulator, SingleRank, Transport

__all__ = ["ParallelContext"]


@dataclass(frozen=True)
class ParallelContext:
    """A rank within a tensor-parallel group.

    Attributes:
        rank: 0-based, within the group (not the global rank).
        world_size: how many ranks share the model.
        group: a ``torch.distributed.ProcessGroup``, a `Simulator`, or None. None means the default
            group of ``torch.distributed`` when `world_size` is above 1.

    Raises:
        FxportError: `rank` is outside ``[0, world_size)``.
    """

    rank: int
    world_size: int
    group: Any = None

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise FxportError(f"rank {self.rank} of {self.world_size} ranks does not exist")
        if isinstance(self.group, Simulator) and self.group.world_size != self.world_size:
            raise FxportError(
                f"the simulator runs {self.group.world_size} ranks, not {self.world_size}"
            )

    @classmethod
    def from_distributed(cls, group: Any = None) -> ParallelContext:
        """This process's place in a ``torch.distributed`` group (default: the whole world).

        Raises:
            FxportError: ``torch.distributed`` is not initialised, or without this process.
        """
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise FxportError("torch.distributed is not initialised: call init_process_group first")
        rank = dist.get_rank(group)
        if rank < 0:
            raise FxportError("this process is not a member of the process group")
        return cls(rank, dist.get_world_size(group), group)

    @classmethod
    def simulated(cls, world_size: int) -> tuple[ParallelContext, ...]:
        """One context per rank, all in this process; see `Simulator.run`."""
        simulator = Simulator(world_size)
        return tuple(cls(rank, world_size, simulator) for rank in range(world_size))

    @property
    def transport(self) -> Transport:
        """What carries tensors between the ranks."""
        if self.world_size == 1:
            return SingleRank()
        if isinstance(self.group, Simulator):
            return self.group.transport(self.rank)
        return DistributedTransport(self.group)
