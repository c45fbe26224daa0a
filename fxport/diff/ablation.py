"""Tells a wrong node that was put in from the new nodes it stands beside.

after:   k -> flip -> fxport::attention -> getitem     differs; neither has a counterpart
tried:   k ---------> fxport::attention -> getitem     agrees: it was `flip`
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

from torch import fx

__all__ = ["Agrees", "put_in"]

Agrees = Callable[[fx.GraphModule, fx.Node], bool]


def put_in(
    gm: fx.GraphModule, suspects: Iterable[fx.Node], seen: fx.Node, agrees: Agrees
) -> fx.Node | None:
    """The first of `suspects` without which `seen` is what it should be.

    Args:
        suspects: nodes of `gm`; each is tried with each of its inputs in its place.
        seen: the node of `gm` whose value or gradient differs.
        agrees: (a changed copy, `seen` in it) -> whether it no longer differs.
    """
    for suspect in suspects:
        if suspect is seen:
            continue
        for source in suspect.all_input_nodes:
            changed, nodes = _copy(gm)
            nodes[suspect].replace_all_uses_with(nodes[source])
            changed.graph.erase_node(nodes[suspect])
            changed.recompile()
            if _runs(changed, nodes[seen], agrees):
                return suspect
    return None


def _copy(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    changed = copy.deepcopy(gm)
    return changed, dict(zip(gm.graph.nodes, changed.graph.nodes, strict=True))


def _runs(changed: fx.GraphModule, seen: fx.Node, agrees: Agrees) -> bool:
    try:
        return agrees(changed, seen)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False  # other shapes: the node was needed
