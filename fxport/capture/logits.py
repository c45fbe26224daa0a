"""Which output of a model is the logits.

forward -> (logits, loss, {"hidden": ...})      graph -> logits
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxport.capture.unread import refuse_read
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["keep_logits"]


def keep_logits(gm: fx.GraphModule) -> str:
    """Leaves one output, the logits: the only floating output whose last axis is a feature.

    Returns:
        Which output of the model that is, in words.

    Raises:
        PortError: no output, or more than one, could be the logits; or they depend on an argument
            that nobody knows.
    """
    output = next(n for n in gm.graph.nodes if n.op == "output")
    flat: list[Any] = list(output.args[0])
    found = [
        (index, node)
        for index, node in enumerate(flat)
        if isinstance(node, fx.Node)
        and isinstance(node.meta.get("val"), torch.Tensor)
        and node.meta["val"].is_floating_point()
        and node.meta["val"].dim() in (2, 3)
    ]
    if not found:
        reason = Reason(
            ReasonCode.NO_LOGITS,
            "forward returns no tensor [B, T, V]",
            hint="return the logits, alone or beside the loss",
        )
        raise PortError([reason])
    # Several candidates (hidden states beside the logits): the widest is over the vocabulary.
    # A wrong choice cannot pass: the head must end in the token embedding's vocabulary.
    index, logits = found[0] if len(found) == 1 else _widest(found)
    output.args = (logits,)
    gm.graph.eliminate_dead_code()
    refuse_read(gm)
    gm.recompile()
    return "the only output" if len(flat) == 1 else f"output {index} of {len(flat)}"


def _widest(found: list[tuple[int, fx.Node]]) -> tuple[int, fx.Node]:
    sizes = [(node.meta["val"].shape[-1], index, node) for index, node in found]
    fixed = [(s, i, n) for s, i, n in sizes if isinstance(s, int)]
    if not fixed or [s for s, _, _ in fixed].count(max(s for s, _, _ in fixed)) > 1:
        reason = Reason(
            ReasonCode.NO_LOGITS,
            f"forward returns {len(found)} tensors that could be the logits",
            hint="return the logits of the next token alone: generation uses no other head",
        )
        raise PortError([reason])
    _, index, node = max(fixed, key=lambda f: f[0])
    return index, node
