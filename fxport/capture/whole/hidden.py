"""Whether scores are masked, by their values, at certain places.

    masked_fill(s, mask, -inf)      where(mask, s, -inf)      s + mask

Sizes are plain here, so a mask is computed and looked at.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fxport.capture.arguments import arguments
from fxport.capture.memory import Memory

__all__ = ["Values", "is_made_of"]

aten = torch.ops.aten

_PASSING = (aten.to, aten._to_copy, aten.contiguous, aten.clone, aten.alias, aten.detach)
_MASKING = (aten.masked_fill, aten.where, aten.add)


class Values:
    """What the constants of a graph of plain sizes hold, as it was before it is rewritten."""

    def __init__(self, graph: fx.Graph) -> None:
        memory = Memory(graph)
        self._written = {node for node in graph.nodes if memory.written_by(node)}

    def is_written(self, node: fx.Node) -> bool:
        """Whether something is written into its memory."""
        return node in self._written

    def of(self, node: Any) -> Tensor | None:
        """None of what depends on tokens or parameters, or is written to."""
        from fxport.passes.masks.values import constant_value  # core loads no pass at import

        if isinstance(node, bool | int | float):
            return torch.tensor(node)
        if not isinstance(node, fx.Node) or is_made_of(node, self._written):
            return None
        try:
            found = constant_value(node, {})
        except ValueError:
            return None
        return found if isinstance(found, Tensor) else None

    def hide(self, scores: fx.Node, region: Tensor) -> bool:
        """Whether every score at these places has the weight 0.

        A finite number only counts where it is the one mask that there is.

        Args:
            scores: what a softmax over the last axis takes.
            region: bool, of the last two axes; each row has a place outside of it.
        """
        top = scores = _through(scores)
        limit = _limit(scores)
        while _packet(scores) is aten.masked_fill:
            given = arguments(scores)
            hidden, number = self.of(given["mask"]), self.of(given["value"])
            if hidden is None or number is None:
                return False
            only = scores is top and _packet(_through(given["self"])) not in _MASKING
            if _forbids(hidden, float(number), region, limit if only else -math.inf):
                return True
            if float(number) != -math.inf and bool((hidden & region).any()):
                return False  # it is written over what an earlier one has hidden
            scores = _through(given["self"])
        limit = limit if scores is top else -math.inf
        given = arguments(scores) if _packet(scores) in _MASKING else {}
        if _packet(scores) is aten.where:
            return self._chosen(given, region, limit)
        if _packet(scores) is aten.add and given["alpha"] == 1:
            return self._lowered(given, region, limit)
        return False

    def _chosen(self, given: dict[str, Any], region: Tensor, limit: float) -> bool:
        """``where(mask, s, -inf)``, or the other way round."""
        mask = self.of(given["condition"])
        if mask is None:
            return False
        for name, other, hidden in (("self", "other", mask), ("other", "self", ~mask)):
            number = self.of(given[name])
            if number is not None and number.numel() == 1:
                least = limit if _is_unmasked(given[other]) else -math.inf
                return _forbids(hidden, float(number), region, least)
        return False

    def _lowered(self, given: dict[str, Any], region: Tensor, limit: float) -> bool:
        """``s + mask``"""
        for name, other in (("self", "other"), ("other", "self")):
            mask = self.of(given[name])
            if mask is None or not mask.is_floating_point() or bool(mask.isnan().any()):
                continue
            if _all_within(mask == -math.inf, region):
                return True
            seen = _row_has(mask > -1e4, region) and _is_unmasked(given[other])
            return _all_within(mask <= limit, region) and seen
        return False


def is_made_of(node: fx.Node, those: set[fx.Node]) -> bool:
    """Whether one of those is the node, or goes into it."""
    pending, seen = [node], set[fx.Node]()
    while pending:
        one = pending.pop()
        if one in those:
            return True
        if one not in seen:
            seen.add(one)
            pending += one.all_input_nodes
    return False


def _packet(node: Any) -> Any:
    return getattr(getattr(node, "target", None), "overloadpacket", None)


def _through(node: fx.Node) -> fx.Node:
    while _packet(node) in _PASSING:
        node = node.all_input_nodes[0]
    return node


def _is_unmasked(scores: Any) -> bool:
    return isinstance(scores, fx.Node) and _packet(_through(scores)) not in _MASKING


def _forbids(hidden: Tensor, number: float, region: Tensor, limit: float) -> bool:
    if hidden.dtype != torch.bool or not _all_within(hidden, region):
        return False
    return number == -math.inf or (number <= limit and _row_has(~hidden, region))


def _limit(scores: fx.Node) -> float:
    from fxport.passes.masks.effects import hard_limit

    return hard_limit(scores)


def _all_within(hidden: Tensor, region: Tensor) -> bool:
    """At every place of the region, in every head."""
    return bool((hidden | ~region).all())


def _row_has(seen: Tensor, region: Tensor) -> bool:
    """Whether every row sees a key outside of the region."""
    return bool((seen & ~region).any(-1).all())
