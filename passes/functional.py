"""Replaces in-place operations on fresh values by their out-of-place form.

Before                                  After
    y = matmul(q, k)                        y = matmul(q, k)
    z = masked_fill_(y, mask, -inf)         z = masked_fill(y, mask, -inf)
    softmax(y)                              softmax(z)

    q, k, v = chunk(qkv, 3)                 q, k, v = chunk(qkv, 3)
    q = mul_(q, scale)                      q = mul(q, scale)

    part = slice(s, 3, -T)  [B, H, T, T]    (all of s: the same tensor)
    copy_(part, x)                          t = clone(x)

Sound only while nobody else sees the change: the memory is fresh (made by an operation that
returns new memory), and no other view of it that may overlap is read afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import cast

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import graph_input
from fxport.capture.location import user_location
from fxport.capture.memory import Memory, is_fresh, is_mutation
from fxport.errors import PortError, Reason, ReasonCode
from fxport.passes.slice_writes import join_written_pieces

__all__ = ["drop_whole_slices", "functionalise", "replace_mutation"]

aten = torch.ops.aten

# Nothing of what was there is left, so its values are no input.
_FILLED = {
    aten.fill_.Scalar: aten.full_like.default,
    aten.zero_.default: aten.zeros_like.default,
}


# Their results share no memory with each other.
_SPLITS = {
    aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default,
    aten.unbind.int, aten.tensor_split.sections, aten.tensor_split.indices,
}  # fmt: skip


def functionalise(gm: fx.GraphModule) -> None:
    """Rewrites every mutable op in place on the graph.

    Raises:
        PortError: an in-place op changes memory that is read through another view afterwards.
    """
    drop_whole_slices(gm)
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


def drop_whole_slices(gm: fx.GraphModule) -> None:
    """A slice of everything, ``scores[:, :, :, -T:]``, is the tensor itself."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        given = arguments(node)
        if given["step"] == 1 and shape_of(node) == shape_of(given["self"]):
            node.replace_all_uses_with(given["self"])
            gm.graph.erase_node(node)


def replace_mutation(gm: fx.GraphModule, node: fx.Node) -> Reason | None:
    """Rewrites one in-place op; a reason when that would not be exact."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    functional = _FILLED.get(target) or _out_of_place(target)
    changed = arguments(node).get("self")
    refusal = _refusal(node)
    if functional is None or not isinstance(changed, fx.Node) or _is_shared(changed, node):
        return refusal
    dtype, source = changed.meta["val"].dtype, _written_over_all(node)
    with gm.graph.inserting_before(node):
        if source is not None:
            new = gm.graph.call_function(aten.clone.default, (source,))
            casts = source.meta["val"].dtype != dtype
        else:
            new = gm.graph.call_function(functional, node.args, node.kwargs)
            casts = any(_widens(argument, dtype) for argument in node.all_input_nodes)
        new.meta = dict(node.meta)
        if casts:
            new = gm.graph.call_function(aten.to.dtype, (new, dtype))
            new.meta = dict(node.meta)
    for user in list(changed.users):
        if node < user:
            user.replace_input_with(changed, new)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return None


def _written_over_all(node: fx.Node) -> fx.Node | None:
    """What is copied into all of a tensor: nothing is left of what was there."""
    if node.target is not aten.copy_.default:
        return None
    target, source = (arguments(node)[name] for name in ("self", "src"))
    same = isinstance(source, fx.Node) and shape_of(source) == shape_of(target)
    return source if same else None


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


def _widens(argument: fx.Node, dtype: torch.dtype) -> bool:
    """Whether the out-of-place form may give another dtype: in place, the changed one's stays."""
    value = argument.meta["val"]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    return value.dtype != dtype


def _is_shared(value: fx.Node, mutation: fx.Node) -> bool:
    """Whether anybody but the users of `value` may see that `mutation` changes it."""
    if value.op != "call_function" or value.meta["val"].dtype != mutation.meta["val"].dtype:
        return True
    memory = Memory(mutation.graph)
    place = memory.shared(value)
    others = [n for n in mutation.graph.nodes if memory.shared(n) is place and n is not value]
    if any(other.op != "call_function" for other in others):
        return True
    # Views made later come from `value`, from its changed form, or from one of these.
    before = (other for other in others if other < mutation)
    return any(_is_read_after(n, mutation) and not _apart(n, value) for n in before)


def _is_read_after(node: fx.Node, mutation: fx.Node) -> bool:
    return any(mutation < user for user in node.users)


def _apart(one: fx.Node, other: fx.Node) -> bool:
    """Whether two views show different pieces of a tensor that was split."""
    pieces = dict(_pieces(one))
    return any(source in pieces and pieces[source] != index for source, index in _pieces(other))


def _pieces(view: fx.Node) -> Iterator[tuple[fx.Node, int]]:
    """(split, which piece) for every split on the way to a view."""
    node: fx.Node | None = view
    while node is not None and not (node.op == "call_function" and is_fresh(node)):
        source = next(iter(node.all_input_nodes), None)
        if node.target is operator.getitem and source is not None and source.target in _SPLITS:
            yield source, cast(int, node.args[1]) % len(source.meta["val"])
        node = source
