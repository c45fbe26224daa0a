"""A graph as it was at one moment: cheap to take, made runnable only when asked for."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import fx

__all__ = ["Snapshot"]


class Snapshot:
    """A copy of a graph; tensors and modules are shared, bodies of higher-order ops are copied.

    Attributes:
        graph: the copy.
        copies: node of the original -> node of the copy.
    """

    def __init__(self, gm: fx.GraphModule | fx.Graph) -> None:
        source = gm.graph if isinstance(gm, fx.GraphModule) else gm
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        for node in source.nodes:
            self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
            self.copies[node].name = node.name
        self._attributes: dict[str, Any] = {}
        if isinstance(gm, fx.GraphModule):
            for node in source.nodes:
                if node.op in ("get_attr", "call_module"):
                    self._attributes[str(node.target)] = _attribute(gm, str(node.target))

    @cached_property
    def module(self) -> fx.GraphModule:
        """Runnable; made on first use."""
        return fx.GraphModule(self._attributes, self.graph)


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    value: Any = gm
    for part in path.split("."):
        value = getattr(value, part)
    return Snapshot(value).module if isinstance(value, fx.GraphModule) else value
