"""For `origins`: what the positions of divided parameters are called, and what may meet.

W [N, C], b [N], s [1, H, 1, 1], U [3, C, H, D]
                            position i of the divided dimension: first(W) + i
a = attention(q, k, v)      channel i of a head: `of_results`, after the head's first query feature
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxport.parallel.plan import ParameterShard, Plan
from fxport.passes.tensor_parallel.taken import Indices

__all__ = ["Naming", "meetings_are", "sums_are"]

_WIDEST = 2**16  # a head's value size, at most
Meetings = Sequence[tuple[Tensor, Tensor]]
Sums = Sequence[tuple[bool, Tensor]]


class Naming:
    """Numbers for the positions of parameters along the dimension in which they are divided.

    Args:
        taken: whole parameters of which the ranks take parts when they run -> dimension, positions.

    Attributes:
        bases: name of a parameter -> its first number; counted from 1 on, in this order.
    """

    def __init__(self, plan: Plan, taken: Mapping[str, tuple[int, Indices]]) -> None:
        self.bases: dict[str, int] = {}
        self._shards: dict[str, tuple[ParameterShard, int]] = {}
        self._taken = taken
        first = 1
        for shard in plan.parameters:
            dim = taken[shard.name][0] if shard.name in taken else _divided(shard)
            if dim is None:
                continue
            self.bases[shard.name], self._shards[shard.name] = first, (shard, dim)
            first += shard.shape[dim]
        self.count = first
        self._widest = max(first, _WIDEST)
        self._starts = torch.tensor([*self.bases.values()])

    def of_parameter(self, name: str, rank: int | None) -> Tensor | None:
        """Names of all positions, or of those of one rank; None where none are given."""
        if name not in self._shards:
            return None
        shard, dim = self._shards[name]
        index = None if rank is None else shard.indices[rank][dim]
        held = range(shard.shape[dim]) if index is None else index
        shape = list(shard.shape)
        shape[dim] = len(held)
        numbers = torch.tensor(held, dtype=torch.int64) + self.bases[name]
        return numbers.reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)

    def of_results(self, queries: Tensor, width: int) -> Tensor:
        """Names of an attention's results ``[.., width]``, from its queries' ``[.., D]``."""
        return queries[..., :1] * self._widest + torch.arange(width)

    def of_rows(self, names: Tensor) -> Tensor:
        """Parameters' positions for what may be named after them."""
        return torch.where(names < self._widest, names, names // self._widest)

    def owner(self, names: Tensor) -> Tensor:
        """Which parameter each position is of, or the results of whose heads."""
        owners = torch.searchsorted(self._starts, self.of_rows(names), right=True) - 1
        return torch.where(names < self._widest, owners, owners + len(self._starts))

    def owner_of(self, names: Sequence[int]) -> int:
        """Of the first of some positions."""
        return int(self.owner(torch.tensor(names[0])))

    def all_of(self, owner: int, names: Tensor) -> bool:
        """Whether a choice of parameters' positions has all of one's."""
        bounds = [*self._starts.tolist(), self.count]
        owner %= len(self._starts)
        return bool(names[bounds[owner] : bounds[owner + 1]].all())

    def held(self, rank: int) -> Tensor:
        """By name: whether a rank holds it, or takes it."""
        found = torch.zeros(self.count, dtype=torch.bool)
        for name, (shard, dim) in self._shards.items():
            by_rank = [box[dim] for box in shard.indices]
            index = (self._taken[name][1] if name in self._taken else by_rank)[rank]
            rows = range(shard.shape[dim]) if index is None else index
            found[torch.tensor(rows, dtype=torch.int64) + self.bases[name]] = True
        return found


def _divided(shard: ParameterShard) -> int | None:
    """The one dimension that is divided."""
    dims = {d for box in shard.indices for d, index in enumerate(box) if index is not None}
    return dims.pop() if len(dims) == 1 else None


def meetings_are(found: Meetings, wanted: Meetings, naming: Naming) -> bool:
    """Whether all that meets here meets there; of two parameters that meet there at all."""
    if not found or not wanted:
        return True
    here, there = (_pairs(m) for m in (found, wanted))
    here = here[:, _among(naming.owner(here), naming.owner(there))]
    return bool(_among(here, there).all())


def _pairs(meetings: Meetings) -> Tensor:
    """``[2, n]``, the lower name first."""
    rows = []
    for one, other in meetings:
        pair = torch.stack(torch.broadcast_tensors(one, other)).reshape(2, -1)
        rows.append(pair.sort(0).values.unique(dim=1))
    return torch.cat(rows, 1)


def _among(pairs: Tensor, others: Tensor) -> Tensor:
    """Which columns of ``[2, n]`` are columns of ``[2, m]``."""
    known, numbers = torch.cat([pairs, others], 1).unique(return_inverse=True)
    coded = numbers[0] * len(known) + numbers[1]
    return torch.isin(coded[: pairs.shape[1]], coded[pairs.shape[1] :])


def _lines(groups: Tensor) -> list[list[int]]:
    """Along the last dimension."""
    found: list[list[int]] = (
        groups.flatten(0, -2).tolist() if groups.dim() > 1 else [groups.tolist()]
    )
    return found


def sums_are(found: Sums, wanted: Sums, naming: Naming, rank: int) -> bool:
    """Whether what is summed here is a sum there, or this rank's share of one.

    Of parameters that are summed there at all. A sum over the ranks that this rank has alone is
    none: the others add their own to it.
    """
    there: dict[int, set[tuple[int, ...]]] = {}
    for _, groups in wanted:
        for group in _lines(groups):
            there.setdefault(naming.owner_of(group), set()).add(tuple(group))
    mine = naming.held(rank)
    for lower in range(rank):
        mine &= ~naming.held(lower)
    for over_ranks, groups in found:
        for group in filter(None, _lines(groups)):
            owner = naming.owner_of(group)
            expected = there.get(owner)
            if expected is not None and over_ranks:
                shares = {_chosen(whole, mine, naming) for whole in expected}
                expected = shares if naming.all_of(owner, mine) else shares - expected
            if expected is not None and tuple(group) not in expected:
                return False
    return True


def _chosen(names: tuple[int, ...], mine: Tensor, naming: Naming) -> tuple[int, ...]:
    """Those of this rank's parts of the parameters."""
    known = torch.tensor(names)
    return tuple(known[mine[naming.of_rows(known)]].tolist())
