"""Which values of a graph may share memory, and who writes to it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from fxport.capture.arguments import arguments

__all__ = ["Memory", "changed_by", "is_fresh", "is_mutation", "is_written_through"]

# May return their input: ATen's schema does not say so for these.
_MAYBE_ALIAS = (
    torch.ops.aten.to,
    torch.ops.aten.reshape,
    torch.ops.aten.contiguous,
    torch.ops.aten.flatten,
    torch.ops.aten.dropout,
    torch.ops.aten.type_as,
    torch.ops.aten.feature_dropout,
    torch.ops.aten.reshape_as,
    torch.ops.aten.lift_fresh,
)


def is_fresh(node: fx.Node) -> bool:
    """Whether the op returns memory of its own: no output aliases an input."""
    target = node.target
    if target is operator.getitem:
        return _is_own_output(node)
    if not isinstance(target, torch._ops.OpOverload) or target.overloadpacket in _MAYBE_ALIAS:
        return False
    return all(r.alias_info is None for r in target._schema.returns)


def _is_own_output(node: fx.Node) -> bool:
    """One of several outputs of an op (``topk``), each memory of its own, picked only here."""
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(source.target, torch._ops.OpOverload):
        return False
    count = len(source.target._schema.returns)
    if count < 2 or not is_fresh(source):  # a list of tensors is one return
        return False
    if any(u.target is not operator.getitem for u in source.users):
        return False
    again = [u for u in source.users if u.args[1] % count == index % count]  # type: ignore[operator]
    return again == [node]


def is_mutation(node: fx.Node) -> bool:
    """Whether the op writes to one of its arguments."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def is_written_through(node: fx.Node) -> bool:
    """Whether a value is written into by this use of it, or through a view that this is."""
    if is_mutation(node):
        return True
    views = isinstance(node.target, torch._ops.OpOverload) and any(
        r.alias_info is not None for r in node.target._schema.returns
    )
    return views and any(is_written_through(user) for user in node.users)


class Memory:
    """Groups the nodes of a graph by the memory that they may share (views, in-place results).

    An op that is not known to return fresh memory counts as sharing that of the arguments that
    its schema says it may return, and of every tensor argument where there is no such schema.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            self._parent[node] = node
            if node.op == "call_function" and not is_fresh(node):
                for argument in _shown(node):
                    self._parent[self._root(argument)] = self._root(node)
        self.writes: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            for changed in changed_by(node):
                self.writes.setdefault(self._root(changed), []).append(node)

    def _root(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def shared(self, node: fx.Node) -> fx.Node:
        """A representative of the memory that `node` lives in."""
        return self._root(node)

    def written_by(self, node: fx.Node) -> list[fx.Node]:
        """Every op that writes to the memory of `node`, in graph order."""
        return self.writes.get(self._root(node), [])

    def reaching(self, starts: Iterable[fx.Node], graph: fx.Graph) -> set[fx.Node]:
        """All nodes whose value depends on `starts`, through arguments or through memory."""
        found = set(starts)
        tainted = {self._root(n) for n in found}
        size = -1
        while size != len(found):
            size = len(found)
            for node in graph.nodes:
                depends = self._root(node) in tainted or any(
                    i in found for i in node.all_input_nodes
                )
                if not depends or node.op == "output":
                    continue
                found.add(node)
                tainted.update(self._root(changed) for changed in changed_by(node))
        return found

    def needed(self, graph: fx.Graph) -> set[fx.Node]:
        """Nodes that the output depends on; writes count when their memory is read."""
        live = {n for n in graph.nodes if n.op == "output"}
        roots: set[fx.Node] = set()
        size = -1
        while size != len(live):
            size = len(live)
            for node in reversed(graph.nodes):
                if node not in live and not any(self._root(c) in roots for c in changed_by(node)):
                    continue
                live.add(node)
                for argument in node.all_input_nodes:
                    live.add(argument)
                    roots.add(self._root(argument))
        return live


def _shown(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory the result of an op that is not fresh may be."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.all_input_nodes
    declared = target._schema.arguments
    if target.overloadpacket in _MAYBE_ALIAS:
        return _nodes(node, declared[:1])  # ``type_as(self, other)`` never is `other`
    aliased = [a for a in declared if a.alias_info is not None]
    return _nodes(node, aliased) if aliased else node.all_input_nodes


def changed_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that the op writes to."""
    if not is_mutation(node):
        return []
    assert isinstance(node.target, torch._ops.OpOverload)
    declared = node.target._schema.arguments
    return _nodes(node, [a for a in declared if a.alias_info and a.alias_info.is_write])


def _nodes(node: fx.Node, declared: Sequence[torch.Argument]) -> list[fx.Node]:
    bound = arguments(node)
    flat: list[fx.Node] = []
    fx.node.map_arg([bound[a.name] for a in declared if a.name in bound], flat.append)
    return flat
