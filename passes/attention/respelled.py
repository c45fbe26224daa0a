"""Products that were written in another way for an attention, and can be put back as they were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

__all__ = ["Respelled"]


@dataclass(frozen=True)
class _Saved:
    """What a node was that was taken out of the graph."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]


@dataclass
class Respelled:
    """What was changed around some softmaxes.

    Attributes:
        weights: their results.
    """

    weights: set[fx.Node]
    _removed: dict[fx.Node, _Saved] = field(default_factory=dict)
    _made: list[fx.Node] = field(default_factory=list)
    _instead: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def put(self, old: fx.Node, new: fx.Node) -> None:
        """Has the users of `old` use `new`."""
        old.replace_all_uses_with(new)
        self._instead[old] = new

    def take_out(self, gm: fx.GraphModule, old: Sequence[fx.Node], made: Iterable[fx.Node]) -> None:
        """Takes those of `old`, in graph order, that nothing uses any more out of the graph."""
        self._made += made
        for node in reversed(old):
            if not node.users:
                self._removed[node] = _Saved(node.args, dict(node.kwargs), dict(node.meta))
                gm.graph.erase_node(node)

    def merge(self, later: Respelled) -> None:
        """Takes over what was changed after this."""
        self.weights |= later.weights
        self._removed.update(later._removed)
        self._made += later._made
        self._instead.update(later._instead)

    def put_back(self, gm: fx.GraphModule) -> None:
        """The graph as it was."""
        made, again = set(self._made), dict[fx.Node, fx.Node]()
        for old in self._instead:
            if old not in made:  # made by one change, replaced by the next
                new = self._final(old)
                new.replace_all_uses_with(self._rebuilt(gm, old, new, again))
        for node in sorted((n for n in self._made if not n._erased), reverse=True):
            if not node.users:
                gm.graph.erase_node(node)

    def _rebuilt(
        self, gm: fx.GraphModule, old: fx.Node, place: fx.Node, again: dict[fx.Node, fx.Node]
    ) -> fx.Node:
        if old in again or old not in self._removed:
            return again.get(old, old)
        saved = self._removed[old]
        args, kwargs = fx.node.map_arg(
            (saved.args, saved.kwargs), lambda n: self._rebuilt(gm, n, place, again)
        )
        given: list[fx.Node] = []
        fx.node.map_arg((args, kwargs), given.append)
        # What stood after the place (sizes, for one) was needed by one of several that met there.
        late = max((n for n in given if place < n), default=None)
        graph = gm.graph
        with graph.inserting_before(place) if late is None else graph.inserting_after(late):
            again[old] = graph.create_node(old.op, old.target, args, kwargs)
        again[old].meta = saved.meta
        return again[old]

    def _final(self, node: fx.Node) -> fx.Node:
        while node in self._instead:
            node = self._instead[node]
        return node
