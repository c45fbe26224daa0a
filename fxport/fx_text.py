"""A graph as text that survives unrelated changes: no shapes, no counters over the whole graph.

    h.0.attn/softmax = aten.softmax.int(h.0.attn/masked_fill, -1)

Nodes are named as in a graph diff, see `fxport.diff.names`.
"""

from __future__ import annotations

from torch import fx

from fxport.diff.names import arguments_text, node_text, sizes_of, stable_names, target_text

__all__ = ["graph_text"]


def graph_text(graph: fx.GraphModule | fx.Graph) -> str:
    """One line per node."""
    if isinstance(graph, fx.GraphModule):
        graph = graph.graph
    names, sizes = stable_names(graph), sizes_of(graph)
    return "\n".join(
        node_text(n.op, names[n], target_text(n), arguments_text(n, names, sizes))
        for n in graph.nodes
    )
