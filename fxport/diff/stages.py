"""The stages of a port: every graph on the way, and what each pass did to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import fx

from fxport.diff.record import GraphDiff

__all__ = ["Recorder", "Stage"]


@dataclass(frozen=True)
class Stage:
    """One pass over one graph.

    Attributes:
        name: the pass.
        diff: against the graph before this stage.
    """

    name: str
    diff: GraphDiff

    @property
    def graph(self) -> fx.GraphModule:
        """The graph after the pass."""
        return self.diff.after


class Recorder:
    """Collects stages. The graph must not change between two stages: they share a snapshot."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._stages: list[Stage] = []

    @property
    def stages(self) -> tuple[Stage, ...]:
        """So far, in order."""
        return tuple(self._stages)

    @contextmanager
    def stage(self, name: str) -> Iterator[GraphDiff]:
        """Records the pass that runs inside; a pass that raises leaves no stage.

        The pass hands what it decided to `GraphDiff.note`.
        """
        earlier = self._stages[-1].diff if self._stages else None
        diff = GraphDiff(self._gm, name, after=earlier)
        with diff:
            yield diff
        self._stages.append(Stage(name, diff))
