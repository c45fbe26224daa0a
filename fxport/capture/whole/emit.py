"""One step of a graph of plain sizes once more, on other operands and with other sizes."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of

__all__ = ["again", "call", "named"]

aten = torch.ops.aten

# Their arguments `size` or `shape` hold the sizes of the result.
_SHAPED = (aten.view, aten.reshape, aten._unsafe_view, aten.expand, aten.broadcast_to)


def named(node: fx.Node) -> dict[str, Any]:
    """All arguments by name; those of `getitem` by number."""
    if node.target is operator.getitem:
        return {"0": node.args[0], "1": node.args[1]}
    return arguments(node)


def again(node: fx.Node, given: Mapping[str, Any], sizes: Mapping[int, int]) -> fx.Node | None:
    """The same step before `node`.

    Args:
        given: arguments that are other ones, by name.
        sizes: of the result, by axis, where they are other ones.

    Returns:
        None where the result does not have these sizes, or torch does not take them.
    """
    values = {**named(node), **given}
    if getattr(node.target, "overloadpacket", None) in _SHAPED:
        name = "size" if "size" in values else "shape"
        shape = shape_of(node)
        values[name] = [
            old if old == -1 else sizes.get(axis, shape[axis])
            for axis, old in enumerate(values[name])
        ]
    if node.target is operator.getitem:
        return call(node, operator.getitem, tuple(values.values()), {})
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [a.name for a in node.target._schema.arguments][: len(node.args)]
    args = tuple(values[name] for name in names)  # what was left out stays left out
    try:
        made = call(node, node.target, args, {name: values[name] for name in node.kwargs})
    except (RuntimeError, ValueError, IndexError):  # ``unflatten(x, 1, [-1, 16])`` of 37
        return None
    if isinstance(node.meta["val"], torch.Tensor):
        wanted = tuple(sizes.get(axis, size) for axis, size in enumerate(shape_of(node)))
        if shape_of(made) != wanted:
            node.graph.erase_node(made)
            return None
    return made


def call(at: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """A call before `at`, as if by the same line of the user's."""
    given, by_name = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    with torch.no_grad():
        value = target(*given, **by_name)
    with at.graph.inserting_before(at):
        node = at.graph.call_function(target, args, kwargs)
    node.meta = {**{k: v for k, v in at.meta.items() if k != "val"}, "val": value}
    return node
