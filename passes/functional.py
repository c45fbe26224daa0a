"""Replaces in-place operations on fresh values by their out-of-place form.

Before                                  After
    y = matmul(q, k)                        y = matmul(q, k)
    z = masked_fill_(y, mask, -inf)         z = masked_fill(y, mask, -inf)
    softmax(y)                              softmax(z)

Sound only while nobody sees `y` through another view: the changed value, and everything it may
share memory with, must be fresh (made by an operation that returns new memory) and unaliased.
"""

from __future__ import annotations

import torch
from torch import fx

from fxport.capture.arguments import arguments
from fxport.capture.inputs import graph_input
from fxport.capture.location import user_location
from fxport.capture.memory import is_fresh, is_mutation
from fxport.errors import PortError, Reason, ReasonCode
from fxport.passes.slice_writes import join_written_pieces

__all__ = ["functionalise", "replace_mutation"]


def functionalise(gm: fx.GraphModule) -> None:
    """Rewrites every mutable op in place on the graph.

    Raises:
        PortError: an in-place op changes a value that other operations see through a view.
    """
    join_written_pieces(gm)
    reasons: list[Reason] = []
    for node in list(gm.graph.nodes):
        if is_mutation(node):
            reason = replace_mutation(gm, node)
            if reason is not None:
                reasons.append(reason)
    if reasons:
        raise PortError(reasons)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def replace_mutation(gm: fx.GraphModule, node: fx.Node) -> Reason | None:
    """Rewrites one in-place op; a reason when that would not be exact."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    functional = _out_of_place(target)
    changed = arguments(node).get("self")
    refusal = _refusal(node)
    if functional is None or not isinstance(changed, fx.Node) or _is_shared(changed, node):
        return refusal
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(functional, node.args, node.kwargs)
    new.meta = dict(node.meta)
    for user in list(changed.users):
        if node < user:
            user.replace_input_with(changed, new)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return None


def _refusal(node: fx.Node) -> Reason:
    base: fx.Node | None = node.all_input_nodes[0]
    while base is not None and base.op == "call_function" and not is_fresh(base):
        base = next(iter(base.all_input_nodes), None)
    if base is not None and base.op == "placeholder":
        return Reason(
            ReasonCode.MUTATED_STATE,
            f"forward writes to `{graph_input(base).name}`, "
            "so its result may depend on earlier calls",
            user_location(node),
            "compute the value in __init__, or pass it through forward",
        )
    return Reason(
        ReasonCode.MUTATED_IN_PLACE,
        f"`{node.target}` changes a tensor that is also seen through a view",
        user_location(node),
        "use the out-of-place operation",
    )


def _out_of_place(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The overload of the same name without the trailing underscore, ATen's own convention."""
    namespace, name = target._schema.name.split("::")
    if not name.endswith("_") or name.startswith("_"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    overload = target._overloadname
    if packet is None or overload not in packet.overloads():
        return None
    functional: torch._ops.OpOverload = getattr(packet, overload)
    same = [a.name for a in functional._schema.arguments] == [
        a.name for a in target._schema.arguments
    ]
    return functional if same else None


def _is_shared(value: fx.Node, mutation: fx.Node) -> bool:
    """Whether memory of `value` may be seen by anybody but its direct users."""
    if value.op != "call_function" or not is_fresh(value):
        return True
    if value.meta["val"].dtype != mutation.meta["val"].dtype:
        return True
    return any(not is_fresh(user) for user in value.users if user is not mutation)
