"""Which output of a model is the logits.

forward -> (logits, loss, {"hidden": ...})      graph -> logits
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.location import user_location
from fxport.capture.unread import refuse_read
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["keep_logits"]

aten = torch.ops.aten


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
    # Several candidates: hidden states beside the logits, a value head, scores of pairs.
    index, logits = found[0] if len(found) == 1 else _over_the_vocabulary(found, gm)
    output.args = (logits,)
    gm.graph.eliminate_dead_code()
    refuse_read(gm)
    gm.recompile()
    return "the only output" if len(flat) == 1 else f"output {index} of {len(flat)}"


def _over_the_vocabulary(
    found: list[tuple[int, fx.Node]], gm: fx.GraphModule
) -> tuple[int, fx.Node]:
    """The only candidate as wide as a table of the token ids.

    Where there is none (a padded vocabulary), the one that is wider and made of all the others.
    """
    rows = _rows(gm)
    widths = [(node.meta["val"].shape[-1], (index, node)) for index, node in found]
    fixed = [(width, candidate) for width, candidate in widths if isinstance(width, int)]
    fitting = [candidate for width, candidate in fixed if width in rows]
    if rows and not fitting:
        others = {node for _, node in found}
        wider = [candidate for width, candidate in fixed if width > max(rows)]
        fitting = [c for c in wider if others <= _made_of(c[1])]
    if len(fitting) != 1:
        sizes = " and ".join(f"[.., {width}]" for width, _ in widths)
        below = f", for ids below {max(rows)}" if rows else ""
        reason = Reason(
            ReasonCode.NO_LOGITS,
            f"forward returns {len(found)} tensors that could be the logits: {sizes}{below}",
            user_location((fitting or found)[-1][1]),
            hint="return the logits of the next token alone: generation uses no other head",
        )
        raise PortError([reason])
    return fitting[0]


def _made_of(node: fx.Node) -> set[fx.Node]:
    """The node, and everything that it is computed from."""
    found, pending = {node}, [node]
    while pending:
        new = [n for n in pending.pop().all_input_nodes if n not in found]
        found.update(new)
        pending.extend(new)
    return found


def _rows(gm: fx.GraphModule) -> set[int]:
    """How many rows the tables have in which the token ids are looked up."""
    same = {
        n for n in gm.graph.find_nodes(op="placeholder") if graph_input(n).kind is InputKind.DATA
    }
    found: set[int] = set()
    for node in gm.graph.nodes:
        if node.op != "call_function" or not any(n in same for n in node.all_input_nodes):
            continue
        given = arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
        if node.target is aten.embedding.default and given["indices"] in same:
            found.add(given["weight"].meta["val"].shape[0])
        elif node.target is aten.index.Tensor and given["indices"][0] in same:
            found.add(given["self"].meta["val"].shape[0])
        elif node.target is aten.one_hot.default:
            found.add(node.meta["val"].shape[-1])
        elif _is_integer(node):
            same.add(node)
    return {rows for rows in found if isinstance(rows, int)}


def _is_integer(node: fx.Node) -> bool:
    values = node.meta.get("val")
    tensors = values if isinstance(values, list | tuple) else [values]
    return all(
        isinstance(t, torch.Tensor) and not t.is_floating_point() and t.dtype != torch.bool
        for t in tensors
    )
