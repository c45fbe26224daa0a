"""Which positions of a value each rank holds, dimension by dimension."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxport.passes.tensor_parallel.labels import Labels
from fxport.passes.tensor_parallel.solver import Solution

__all__ = ["Box", "Boxes", "Undividable", "positions", "select"]

# One index vector per dimension; None: all positions.
Box = tuple[tuple[int, ...] | None, ...]


class Undividable(Exception):
    """A divided value reached an op that cannot work on a part of it."""

    def __init__(self, node: fx.Node, why: str, atoms: list[Tensor]) -> None:
        super().__init__(f"{node}: {why}")
        self.node, self.why, self.atoms = node, why, atoms


class Boxes:
    """Positions by rank, from the owners of their classes."""

    def __init__(self, labels: Labels, solution: Solution) -> None:
        self.labels, self.solution = labels, solution
        roots = labels.classes.roots()
        held = torch.ones(solution.world_size, len(roots), dtype=torch.bool)
        classes: dict[frozenset[int], list[int]] = {}
        for root, ranks in solution.owners.items():
            classes.setdefault(ranks, []).append(root)
        for ranks, owned in classes.items():
            for rank in range(solution.world_size):
                held[rank, owned] = rank in ranks
        self._held = held[:, roots]  # [ranks, atoms]
        self._known: dict[int, tuple[Tensor, tuple[Box, ...]]] = {}

    def of_ranks(self, node: fx.Node, atoms: Tensor) -> tuple[Box, ...]:
        """Index vectors by dimension, for every rank: ranks must decide alike what to divide.

        Raises:
            Undividable: the positions that some rank holds are no product of index vectors.
        """
        known = self._known.get(id(atoms))
        if known is None:
            boxes = tuple(self._box(node, atoms, rank) for rank in range(len(self._held)))
            known = self._known[id(atoms)] = (atoms, boxes)  # the tensor keeps its id taken
        return known[1]

    def _box(self, node: fx.Node, atoms: Tensor, rank: int) -> Box:
        if not atoms.numel():  # x[..., 32:] of 32 features: no position, nothing to divide
            return (None,) * atoms.dim()
        mask = self._held[rank][atoms]
        if mask.all():
            return (None,) * atoms.dim()
        result: list[tuple[int, ...] | None] = []
        product = torch.ones_like(mask)
        for dim in range(mask.dim()):
            others = [d for d in range(mask.dim()) if d != dim]
            line = mask.amax(others) if others else mask
            shape = [1] * mask.dim()
            shape[dim] = -1
            product = product & line.reshape(shape)
            whole = bool(line.all())
            result.append(None if whole else tuple(line.nonzero().reshape(-1).tolist()))
        if not torch.equal(product, mask):
            raise Undividable(node, "the positions of a rank are no rectangle", [atoms])
        return tuple(result)

    def complete(self, atoms: Tensor) -> bool:
        """Whether every rank holds every position."""
        return bool(self._held[:, atoms].all())


def positions(index: tuple[int, ...] | None, size: int) -> tuple[int, ...]:
    """What an index vector of a box says about a dimension of `size`."""
    return tuple(range(size)) if index is None else index


def select(value: Tensor, box: Box) -> Tensor:
    """The part of a tensor in the box."""
    for dim, index in enumerate(box):
        if index is not None:
            places = torch.tensor(index, dtype=torch.int64, device=value.device)
            value = value.index_select(dim, places)
    return value
