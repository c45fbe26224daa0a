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

__all__ = ["is_hidden", "value_of"]

aten = torch.ops.aten

_PASSING = (aten.to, aten._to_copy, aten.contiguous, aten.clone, aten.alias, aten.detach)


def value_of(node: Any) -> Tensor | None:
    """What a constant of plain sizes holds; None of what depends on tokens or parameters."""
    from fxport.passes.masks.values import constant_value  # core loads no pass at import

    if isinstance(node, bool | int | float):
        return torch.tensor(node)
    if not isinstance(node, fx.Node):
        return None
    try:
        found = constant_value(node, {})
    except ValueError:
        return None
    return found if isinstance(found, Tensor) else None


def is_hidden(scores: fx.Node, region: Tensor) -> bool:
    """Whether every score at these places has the weight 0.

    Args:
        scores: what a softmax over the last axis takes.
        region: bool, of the last two axes; each row has a place outside of it.
    """
    while getattr(scores.target, "overloadpacket", None) in _PASSING:
        scores = scores.all_input_nodes[0]
    packet = getattr(scores.target, "overloadpacket", None)
    if packet is aten.masked_fill:
        given = arguments(scores)
        mask, number = value_of(given["mask"]), value_of(given["value"])
        if _forbids(mask, number, region, scores, hides=True):
            return True
        return is_hidden(given["self"], region)
    if packet is aten.where:
        given = arguments(scores)
        mask = value_of(given["condition"])
        return any(
            _forbids(mask, value_of(given[name]), region, scores, hides=name == "self")
            for name in ("self", "other")
        )
    if packet is aten.add:
        sides = [arguments(scores)[name] for name in ("self", "other")]
        return arguments(scores)["alpha"] == 1 and any(_lowers(s, region, scores) for s in sides)
    return False


def _forbids(
    mask: Tensor | None, number: Tensor | None, region: Tensor, scores: fx.Node, *, hides: bool
) -> bool:
    if mask is None or number is None or number.numel() != 1 or mask.dtype != torch.bool:
        return False
    hidden = mask if hides else ~mask
    if not _all_within(hidden, region):
        return False
    return float(number) == -math.inf or (
        float(number) <= _limit(scores) and _row_has(~hidden, region)
    )


def _lowers(side: Any, region: Tensor, scores: fx.Node) -> bool:
    mask = value_of(side)
    if mask is None or not mask.is_floating_point() or mask.isnan().any():
        return False
    if _all_within(mask == -math.inf, region):
        return True
    return _all_within(mask <= _limit(scores), region) and _row_has(mask > -1e4, region)


def _limit(scores: fx.Node) -> float:
    from fxport.passes.masks.prover import hard_limit

    return hard_limit(scores)


def _all_within(hidden: Tensor, region: Tensor) -> bool:
    """At every place of the region, in every head."""
    return bool((hidden | ~region).all())


def _row_has(seen: Tensor, region: Tensor) -> bool:
    """Whether every row sees a key outside of the region."""
    return bool((seen & ~region).any(-1).all())
