"""What must be true of the nodes of an attention before one call may take their place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from fxport.capture.memory import is_written_through
from fxport.errors import ReasonCode
from fxport.passes.attention.products import as_product
from fxport.passes.attention.site import Left
from fxport.passes.graph_facts import GraphFacts, lends_shape_only, only_checks

__all__ = ["check_closed", "check_grad_mode", "check_rounding"]


def check_grad_mode(facts: GraphFacts, nodes: Iterable[fx.Node], output: fx.Node) -> None:
    """One call has one backward; under ``no_grad`` a part of the original has none.

    Raises:
        Left: one of `nodes` runs without autograd, and `output` with it.
    """
    other = facts.grad_switched(nodes, output)
    if other is not None:
        raise Left(
            ReasonCode.UNSUPPORTED_FEATURE,
            "gradients are switched on or off inside this attention",
            other,
            "let torch.no_grad() cover the whole attention, or none of it",
        )


def check_closed(interior: tuple[fx.Node, ...], output: fx.Node) -> None:
    """Nobody else may look at the scores or weights; their shape is no secret."""
    inside = {*interior, output}
    for node in interior:
        for user in node.users:
            if user in inside or only_checks(user) or lends_shape_only(node, user):
                continue
            written = is_written_through(user)
            raise Left(
                ReasonCode.MUTATED_IN_PLACE if written else ReasonCode.WEIGHTS_USED_ELSEWHERE,
                "the scores are changed in place in between"
                if written
                else "the scores or weights are used besides this attention",
                user if user.op != "output" else node,
                "use the out-of-place operation" if written else "",
            )


def check_rounding(
    interior: tuple[fx.Node, ...], output: fx.Node, scores: fx.Node, values: fx.Node
) -> None:
    """The op keeps its operands' precision; the original may round more coarsely than it shows.

    Args:
        scores: the product of q and k; it rounds what it sums, and so do its operands' casts.
        values: what v is made of, before any cast.
    """
    visible = _itemsize(output)
    for node in interior:
        before, after = (
            n.meta.get("val") if isinstance(n, fx.Node) else None for n in (*node.args[:1], node)
        )
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
            continue
        narrowed = after.dtype.itemsize < min(before.dtype.itemsize, visible)
        if narrowed and after.is_floating_point() and as_product(node) is None:
            raise _rounded(
                f"scores or weights are rounded from {before.dtype} to {after.dtype} in between",
                node,
            )
    if _itemsize(scores) < min(visible, _itemsize(values)):
        dtypes = scores.meta["val"].dtype, values.meta["val"].dtype
        raise _rounded(f"q.k is rounded to {dtypes[0]} where the values are {dtypes[1]}", scores)


def _itemsize(node: fx.Node) -> int:
    size: int = node.meta["val"].dtype.itemsize
    return size


def _rounded(what: str, node: fx.Node) -> Left:
    return Left(
        ReasonCode.UNSUPPORTED_FEATURE,
        what,
        node,
        "the softmax in float32, or in the model's own dtype if that is wider",
    )
