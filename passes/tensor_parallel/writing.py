"""A new node beside an old one: what the passes that respell a model's graph write with."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["write"]


def write(graph: fx.Graph, origin: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call at the graph's insertion point, with its value and the user's line of `origin`."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {k: v for k, v in origin.meta.items() if k != "val"}
    given, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    with torch.no_grad():
        node.meta["val"] = target(*given, **named)
    return node
