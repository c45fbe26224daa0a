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

import torch
from torch import fx
from torch._subclasses import FakeTensor

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.location import user_location
from fxport.capture.memory import Memory, is_fresh, is_mutation
from fxport.capture.written import reason_of_write
from fxport.errors import PortError, Reason, ReasonCode
from fxport.passes.slice_writes import join_written_pieces
from fxport.passes.view_writes import apart, drop_ways_back, parts_above, write_parts

__all__ = ["drop_whole_slices", "functionalise", "replace_mutation", "write_anew"]

aten = torch.ops.aten

# Nothing of what was there is left, so its values are no input.
_FILLED = {
    aten.fill_.Scalar: aten.full_like.default,
    aten.zero_.default: aten.zeros_like.default,
}


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
            reason = write_anew(gm, node)
            reasons += [] if reason is None else [reason]
    if reasons:
        raise PortError(reasons)
    drop_ways_back(gm.graph)
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
    functional = _functional(node)
    changed = arguments(node).get("self")
    refusal = _refusal(node)
    if functional is None or not isinstance(changed, fx.Node) or _is_shared(changed, node):
        return refusal
    _replace(gm, node, changed, _new_value(gm, node, changed, functional))
    return None


def write_anew(gm: fx.GraphModule, node: fx.Node) -> Reason | None:
    """Rewrites one in-place op, and the tensors that it writes a part of."""
    reason = replace_mutation(gm, node)
    return None if reason is None or _write_parts(gm, node) else reason


def _write_parts(gm: fx.GraphModule, node: fx.Node) -> bool:
    """The same where what `changed` is a part of is read afterwards: it is made anew."""
    changed = arguments(node).get("self")
    functional = _functional(node)
    if functional is None or not isinstance(changed, fx.Node) or _is_cast(changed, node):
        return False
    parts = parts_above(changed, node)
    if parts is None or not isinstance(changed.meta["val"], FakeTensor):  # its pieces need shapes
        return False
    new = _new_value(gm, node, changed, functional)
    write_parts(gm, changed, new, parts, node)
    _replace(gm, node, changed, new)
    return True


def _new_value(
    gm: fx.GraphModule, node: fx.Node, changed: fx.Node, functional: torch._ops.OpOverload
) -> fx.Node:
    """What `changed` holds after an in-place operation, in its dtype."""
    dtype = changed.meta["val"].dtype
    with gm.graph.inserting_before(node):
        if node.target is aten.copy_.default:  # nothing is left of what was there
            source = arguments(node)["src"]
            casts = source.meta["val"].dtype != dtype
            if shape_of(source) != shape_of(changed):
                spread = gm.graph.call_function(aten.expand_as.default, (source, changed))
                spread.meta = {**node.meta, "val": _as_wide(source, changed)}
                source = spread
            new = gm.graph.call_function(aten.clone.default, (source,))
        else:
            new = gm.graph.call_function(functional, node.args, node.kwargs)
            casts = any(_widens(argument, dtype) for argument in node.all_input_nodes)
        new.meta = dict(node.meta)
        if casts:
            new = gm.graph.call_function(aten.to.dtype, (new, dtype))
            new.meta = dict(node.meta)
    return new


def _replace(gm: fx.GraphModule, node: fx.Node, changed: fx.Node, new: fx.Node) -> None:
    for user in list(changed.users):
        if node < user:
            user.replace_input_with(changed, new)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _as_wide(source: fx.Node, wide: fx.Node) -> torch.Tensor:
    """The fake value of the one, expanded to the shape of the other."""
    value: torch.Tensor = wide.meta["val"]
    with value.fake_mode, torch.no_grad():  # type: ignore[attr-defined]
        return source.meta["val"].expand_as(value)  # type: ignore[no-any-return]


def _refusal(node: fx.Node) -> Reason:
    base: fx.Node | None = node.all_input_nodes[0]
    while base is not None and base.op == "call_function" and not is_fresh(base):
        base = next(iter(base.all_input_nodes), None)
    if base is not None and base.op == "placeholder":
        return reason_of_write(base, node)
    return Reason(
        ReasonCode.MUTATED_IN_PLACE,
        f"`{node.target}` changes a tensor that is also seen through a view",
        user_location(node),
        "use the out-of-place operation",
    )


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    return _FILLED.get(target) or _out_of_place(target)


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
    # What is changed is given by position, whatever its name.
    theirs, ours = ([a.name for a in f._schema.arguments[1:]] for f in (functional, target))
    return functional if theirs == ours else None


def _widens(argument: fx.Node, dtype: torch.dtype) -> bool:
    """Whether the out-of-place form may give another dtype: in place, the changed one's stays."""
    value = argument.meta["val"]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    return value.dtype != dtype


def _is_cast(value: fx.Node, mutation: fx.Node) -> bool:
    return bool(value.meta["val"].dtype != mutation.meta["val"].dtype)


def _is_shared(value: fx.Node, mutation: fx.Node) -> bool:
    """Whether anybody but the users of `value` may see that `mutation` changes it."""
    if value.op != "call_function" or _is_cast(value, mutation):
        return True
    memory = Memory(mutation.graph)
    place = memory.shared(value)
    others = [n for n in mutation.graph.nodes if memory.shared(n) is place and n is not value]
    if any(other.op != "call_function" for other in others):
        return True
    # Views made later come from `value`, from its changed form, or from one of these.
    before = (other for other in others if other < mutation)
    return any(_is_read_after(n, mutation) and not apart(n, value) for n in before)


def _is_read_after(node: fx.Node, mutation: fx.Node) -> bool:
    return any(mutation < user for user in node.users)
