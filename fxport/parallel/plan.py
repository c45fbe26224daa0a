"""What a model looks like on each rank: records, printed as a table, drawn as a graph diff."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fxport.errors import FxportError, Location

if TYPE_CHECKING:
    from fxport.diff.record import GraphDiff

__all__ = ["CollectiveRecord", "ParameterShard", "Plan", "Replicated"]

# indices[rank][dim]: the full tensor's positions that the rank holds, in order; None: all.
Indices = tuple[tuple[tuple[int, ...] | None, ...], ...]


@dataclass(frozen=True)
class ParameterShard:
    """How one parameter is divided.

    Attributes:
        name: qualified name in the user's model.
        shape: of the full parameter.
        kind: ``column``, ``row``, ``vocabulary``, ``sliced`` or ``replicated``.
        indices: ``indices[rank][dim]``, positions held, None for all of them.
        shared: some positions are on several ranks, whose gradients are summed in backward.
        reason: why it is replicated; empty when it is divided.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    indices: Indices
    shared: bool = False
    reason: str = ""

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of this rank's shard."""
        return tuple(
            size if index is None else len(index)
            for size, index in zip(self.shape, self.indices[rank], strict=True)
        )


@dataclass(frozen=True)
class CollectiveRecord:
    """One collective of the emitted graph.

    Attributes:
        kind: ``all_reduce`` or ``all_gather``.
        direction: ``forward`` or ``backward``.
        elements_per_token: elements of one rank's tensor for one token.
        bytes_per_token: the same in bytes of the parameters' dtype.
        module: the user's module.
        location: the user's line.
    """

    kind: str
    direction: str
    elements_per_token: int
    bytes_per_token: int
    module: str
    location: Location | None


@dataclass(frozen=True)
class Replicated:
    """A part that every rank computes in full, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The division of a model over `world_size` ranks; ``print`` shows it as a table.

    Attributes:
        unseen: what was not shown about the lengths of sequences, in words; "" where all was.
    """

    world_size: int
    parameters: tuple[ParameterShard, ...]
    collectives: tuple[CollectiveRecord, ...]
    replicated: tuple[Replicated, ...]
    unseen: str = ""
    _draw: Callable[[], GraphDiff] | None = field(default=None, repr=False, compare=False)

    def diff(self) -> GraphDiff:
        """The model's graph against that of the first rank, with what became of each parameter.

        ``plan.diff().to_html("plan.html")`` draws it.

        Raises:
            FxportError: the plan does not come from `fxport.plan`.
        """
        if self._draw is None:
            raise FxportError("only a plan that fxport.plan has made can be drawn")
        return self._draw()

    def count(self, direction: str, kind: str = "all_reduce") -> int:
        """How many collectives of a kind run in ``forward`` or ``backward``."""
        return sum(c.kind == kind and c.direction == direction for c in self.collectives)

    def shard(self, name: str) -> ParameterShard:
        """The shard of a parameter by its qualified name; KeyError when there is none."""
        for found in self.parameters:
            if found.name == name:
                return found
        raise KeyError(name)

    def __str__(self) -> str:
        from tabulate import tabulate

        shards = [
            (p.name, p.kind, _size(p.shape), _size(p.local_shape(0)), p.reason or _note(p))
            for p in self.parameters
        ]
        calls = [
            (c.direction, c.kind, c.elements_per_token, c.bytes_per_token, c.module, c.location)
            for c in self.collectives
        ]
        parts = [
            tabulate(shards, ["parameter", "kind", "full", "rank 0", "note"]),
            tabulate(calls, ["", "collective", "elements/token", "bytes/token", "module", "line"]),
        ]
        if self.replicated:
            rows = [(r.what, r.reason) for r in self.replicated]
            parts.append(tabulate(rows, ["replicated", "reason"]))
        return "\n\n".join([*parts, *([f"not shown: {self.unseen}"] if self.unseen else [])])


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _note(shard: ParameterShard) -> str:
    return "shared by several ranks" if shard.shared else ""
