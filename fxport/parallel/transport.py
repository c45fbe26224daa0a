"""What carries tensors between ranks: torch.distributed, or threads of one process.

Nothing here knows about gradients; `fxport.parallel.collectives` adds them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fxport.errors import FxportError

__all__ = ["DistributedTransport", "Simulator", "SingleRank", "Transport"]

T = TypeVar("T")
# A rank that waits this long (seconds) for the others has lost them.
_PATIENCE = 120.0


class Transport(Protocol):
    """Collectives on plain tensors; every rank passes the same shape and dtype."""

    def all_reduce(self, value: Tensor, maximum: bool = False) -> Tensor:
        """The sum (or the elementwise maximum) over the ranks, as a new tensor."""
        ...

    def all_gather(self, value: Tensor) -> list[Tensor]:
        """The tensor of every rank, in rank order."""
        ...


class SingleRank:
    """World size 1: nothing moves."""

    def all_reduce(self, value: Tensor, maximum: bool = False) -> Tensor:
        return value.clone()

    def all_gather(self, value: Tensor) -> list[Tensor]:
        return [value.clone()]


@dataclass(frozen=True)
class DistributedTransport:
    """Over a ``torch.distributed`` process group (None: the default group)."""

    group: Any

    def all_reduce(self, value: Tensor, maximum: bool = False) -> Tensor:
        import torch.distributed as dist

        if torch.compiler.is_compiling():
            # In place, torch 2.11's compiler loses the gradient of what is reduced.
            from torch.distributed import _functional_collectives as functional

            group: Any = dist.group.WORLD if self.group is None else self.group
            name = "max" if maximum else "sum"
            return functional.all_reduce(value.detach().contiguous(), name, group)
        result = value.detach().clone(memory_format=torch.contiguous_format)
        operation = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
        dist.all_reduce(result, op=operation, group=self.group)
        return result

    def all_gather(self, value: Tensor) -> list[Tensor]:
        import torch.distributed as dist

        value = value.detach().contiguous()
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, value, group=self.group)
        return parts


class Simulator:
    """`world_size` ranks as threads of this process, in lock step at every collective.

    Two ranks that call different collectives, or the same with different shapes, are an error:
    a real group would hang or return garbage.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._slots: list[tuple[str, Tensor] | None] = [None] * world_size
        self._barrier = threading.Barrier(world_size)
        self.calls: list[tuple[str, int]] = []
        """(collective, bytes of one rank's tensor) in order, as rank 0 saw them."""

    def transport(self, rank: int) -> Transport:
        return _SimulatedRank(self, rank)

    def run(self, work: Callable[[int], T]) -> list[T]:
        """Runs ``work(rank)`` on every rank at once; results in rank order.

        Raises:
            Exception: the first failure that is not a consequence of another rank's.
        """
        self._barrier.reset()
        results: list[Any] = [None] * self.world_size
        failures: list[BaseException] = []

        def body(rank: int) -> None:
            try:
                # Autograd on CPU runs backward in the calling thread: ranks stay apart.
                results[rank] = work(rank)
            except BaseException as error:  # handed to the caller's thread below
                failures.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=body, args=(r,)) for r in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first = [f for f in failures if not isinstance(f, threading.BrokenBarrierError)]
        if first:
            raise first[0]
        if failures:
            raise FxportError("the ranks do not call the same number of collectives")
        return results

    def exchange(self, rank: int, kind: str, value: Tensor) -> list[Tensor]:
        """Every rank's `value`; all ranks must call this with the same `kind` and shape."""
        self._slots[rank] = (kind, value.detach())
        self._barrier.wait(_PATIENCE)
        given = [slot for slot in self._slots if slot is not None]
        if rank == 0:
            self.calls.append((kind, value.numel() * value.element_size()))
        self._barrier.wait(_PATIENCE)
        _check_same(given)
        return [tensor for _, tensor in given]


def _check_same(given: Sequence[tuple[str, Tensor]]) -> None:
    found = {(kind, tuple(tensor.shape), tensor.dtype) for kind, tensor in given}
    if len(found) != 1:
        raise FxportError(f"the ranks disagree about a collective: {sorted(map(str, found))}")


@dataclass(frozen=True)
class _SimulatedRank:
    simulator: Simulator
    rank: int

    def all_reduce(self, value: Tensor, maximum: bool = False) -> Tensor:
        kind = "all_reduce max" if maximum else "all_reduce"
        parts = self.simulator.exchange(self.rank, kind, value)
        stacked = torch.stack(parts)
        return stacked.amax(0) if maximum else stacked.sum(0)

    def all_gather(self, value: Tensor) -> list[Tensor]:
        parts = self.simulator.exchange(self.rank, "all_gather", value)
        return [part.clone() for part in parts]
