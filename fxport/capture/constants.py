"""What the constants of a sample hold: all that depends on neither tokens nor parameters.

Masks for thousands of positions are made of many values of their size, in every layer alike. So
what gives the same is made once, and what is large is let go once nobody else needs it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxport.capture.inputs import graph_input
from fxport.capture.memory import Memory

__all__ = ["run_constants"]

_LARGE = 2**20  # bytes


def run_constants(
    nodes: Sequence[fx.Node], memory: Memory, passing: Collection[fx.Node]
) -> dict[fx.Node, Any]:
    """The values of constants, run in order, writes included.

    Args:
        nodes: all constants of a graph, in order; all that they are made of is among them.
        memory: of that graph.
        passing: of which only other constants are made. Those that are large have no value in
            the result.
    """
    first = _made_alike(nodes, memory)
    last = {first[used]: node for node in nodes for used in node.all_input_nodes}
    lasting = {first[n] for n in nodes if n not in passing or n.op != "call_function"}
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        used_here = dict.fromkeys(first[used] for used in node.all_input_nodes)
        if first[node] is node:
            values[node] = _run(node, memory, {n: values[first[n]] for n in node.all_input_nodes})
        for used in used_here:
            if last[used] is node and used not in lasting and _is_large(values[used]):
                del values[used]
    alone = {node: _alone(value) for node, value in values.items()}
    return {node: alone[first[node]] for node in nodes if first[node] in alone}


def _made_alike(nodes: Sequence[fx.Node], memory: Memory) -> dict[fx.Node, fx.Node]:
    """The first node that gives the same value; itself where that is not known.

    What is written to has another value later, and random numbers are drawn anew.
    """
    first: dict[fx.Node, fx.Node] = {}
    made: dict[object, fx.Node] = {}
    for node in nodes:
        key: object = node
        if not any(memory.written_by(n) for n in (node, *node.all_input_nodes)):
            if node.op != "call_function":
                key = id(_stored(node))
            elif torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
                given = fx.node.map_arg((node.args, node.kwargs), first.__getitem__)
                key = node.target, repr(given)  # a node is printed as its name
        first[node] = made.setdefault(key, node)
    return first


def _run(node: fx.Node, memory: Memory, values: Mapping[fx.Node, Any]) -> Any:
    if node.op != "call_function":
        value = _stored(node)
        # The model's own memory stays as it is.
        return value.clone() if memory.written_by(node) else value
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    target: Any = node.target
    with torch.no_grad():
        return target(*args, **kwargs)


def _stored(node: fx.Node) -> torch.Tensor:
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(node.graph.owning_module)
    else:
        value = graph_input(node).value
    assert isinstance(value, torch.Tensor), node
    return value


def _is_large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.nbytes > _LARGE


def _alone(value: Any) -> Any:
    """A copy of a small part of something large, without the rest."""
    if not isinstance(value, torch.Tensor):
        return value
    held = value.untyped_storage().nbytes()
    return value.clone() if held > max(_LARGE, 2 * value.nbytes) else value
