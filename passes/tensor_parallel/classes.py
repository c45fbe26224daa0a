"""Equivalence classes of feature positions ("atoms")."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Classes"]


class Classes:
    """Union-find over atoms; an atom is one position of one value's features."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._roots: Tensor | None = None  # of all atoms; None once they have changed

    def fresh(self, shape: Iterable[int]) -> Tensor:
        """New atoms, each its own class, as an int64 tensor of `shape`."""
        self._roots = None
        first = len(self._parent)
        sizes = tuple(shape)
        count = int(torch.Size(sizes).numel())
        self._parent.extend(range(first, first + count))
        return torch.arange(first, first + count).reshape(sizes)

    def find(self, atom: int) -> int:
        parent = self._parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def union(self, one: int, other: int) -> None:
        """The older atom stands for the class, so that classes keep the order of positions."""
        one, other = self.find(one), self.find(other)
        if one != other:
            self._roots = None
            self._parent[max(one, other)] = min(one, other)

    def union_all(self, atoms: Tensor) -> None:
        """All atoms of the tensor become one class."""
        flat = atoms.reshape(-1).tolist()
        for atom in flat[1:]:
            self.union(flat[0], atom)

    def pair(self, one: Tensor, other: Tensor) -> None:
        """Position by position."""
        if one is other or torch.equal(one, other):
            return
        for a, b in zip(one.reshape(-1).tolist(), other.reshape(-1).tolist(), strict=True):
            self.union(a, b)

    def roots(self) -> Tensor:
        """The class of every atom, int64 ``[atoms]``."""
        if self._roots is not None:
            return self._roots
        parent = torch.tensor(self._parent, dtype=torch.int64)
        while True:
            above = parent[parent]
            if torch.equal(above, parent):
                self._roots = parent
                return parent
            parent = above

    def of(self, atoms: Tensor) -> set[int]:
        if self._roots is not None:
            return set(self._roots[atoms.reshape(-1)].unique().tolist())
        return {self.find(a) for a in set(atoms.reshape(-1).tolist())}
