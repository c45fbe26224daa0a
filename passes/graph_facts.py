"""What a pass asks about a whole graph: where values come from, what is alive, what is mutated."""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.constants import is_symbolic

__all__ = [
    "GraphFacts",
    "Source",
    "computes",
    "erase_dead",
    "erase_if_unused",
    "grad_modes",
    "is_random",
    "lends_shape_only",
    "only_checks",
    "reachable",
    "value_inputs",
]

aten = torch.ops.aten

# In place by name, but the values stay.
_HARMLESS = {aten.detach_, aten.requires_grad_}
_SWITCHES = {torch._C._set_grad_enabled}
# Methods that end like those that write.
_OPERATORS = {
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__and__", "__or__", "__xor__",
    "__invert__",
}  # fmt: skip


class Source(enum.Flag):
    """What a value depends on. Sizes do not count."""

    CONSTANT = 0
    BUFFER = enum.auto()
    PARAMETER = enum.auto()
    DATA = enum.auto()
    MUTATED = enum.auto()  # something is written into it, so the graph does not say its value


# Their other tensor argument only lends its shape or dtype.
_LIKE = {
    aten.ones_like, aten.zeros_like, aten.full_like, aten.new_ones, aten.new_zeros, aten.new_full,
}  # fmt: skip
_LENT_BY_OTHER = {aten.expand_as, aten.view_as, aten.reshape_as, aten.type_as}


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values the result depends on."""
    packet = node.target.overloadpacket if isinstance(node.target, OpOverload) else None
    if packet in _LIKE:
        lender = node.args[0]
        return [n for n in node.all_input_nodes if n is not lender]
    if packet in _LENT_BY_OTHER:
        return [n for n in node.args[:1] if isinstance(n, fx.Node)]
    return node.all_input_nodes


def reachable(
    starts: Iterable[fx.Node],
    inputs: Callable[[fx.Node], Iterable[fx.Node]] = lambda node: node.all_input_nodes,
) -> list[fx.Node]:
    """`starts` and everything that they are computed from, by these inputs."""
    found: dict[fx.Node, None] = {}
    pending = list(starts)
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            pending.extend(inputs(node))
    return list(found)


def lends_shape_only(node: fx.Node, user: fx.Node) -> bool:
    """Whether `user` looks at the shape of `node` alone, maybe through views."""
    if node not in value_inputs(user) or is_symbolic(user):
        return True
    views = _may_alias_input(user) and user.target is not operator.getitem
    return views and bool(user.users) and all(lends_shape_only(user, u) for u in user.users)


class GraphFacts:
    """Facts of one graph, each computed once in time linear in the graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self._order = {node: index for index, node in enumerate(gm.graph.nodes)}
        self._writes = _writes(gm.graph.nodes)
        self._grad_mode = grad_modes(gm.graph.nodes)
        self._sources: dict[fx.Node, Source] = {}
        for node in gm.graph.nodes:
            self._sources[node] = self._source(node)

    def source(self, node: fx.Node) -> Source:
        return self._sources[node]

    def add(self, made: Iterable[fx.Node], place: fx.Node) -> None:
        """Takes in new nodes, in the order they were made, that compute what `place` did there."""
        for node in made:
            self._order[node] = self._order[place]
            self._grad_mode[node] = self._grad_mode[place]
            if place in self._writes:
                self._writes[node] = self._writes[place]
            self._sources[node] = self._source(node)

    def _source(self, node: fx.Node) -> Source:
        own = Source.MUTATED if node in self._writes else Source.CONSTANT
        if node.op == "placeholder":
            return own | _KINDS[graph_input(node).kind]
        if node.op == "get_attr":
            return own
        if is_symbolic(node):
            data = free_unbacked_symbols(node.meta["val"])
            return Source.DATA if data else Source.CONSTANT
        if node.op != "call_function" or is_random(node):
            own |= Source.DATA
        if not isinstance(node.target, OpOverload) and node.target is not operator.getitem:
            own |= Source.DATA
        for source in value_inputs(node):
            own |= self._sources[source]
        return own

    def grad_switched(self, nodes: Iterable[fx.Node], result: fx.Node) -> fx.Node | None:
        """One of `nodes` that runs under ``torch.no_grad`` although `result` does not."""
        if not self._grad_mode[result]:
            return None
        return next((n for n in nodes if not self._grad_mode[n]), None)

    def written_between(self, value: fx.Node, first: fx.Node, last: fx.Node) -> fx.Node | None:
        """An operation after `first` and before `last` that writes into `value`'s memory."""
        begin, end = self._order[first], self._order[last]
        for write in self._writes.get(value, ()):
            if begin < self._order[write] < end:
                return write
        return None

    def only_lifted(self, value: fx.Node) -> bool:
        """Whether every buffer behind `value` is a literal in the code (``torch.tensor(8.0)``)."""
        return all(
            isinstance(user.target, OpOverload)
            and user.target.overloadpacket in (aten.lift_fresh, aten.lift_fresh_copy)
            for node in self._placeholders_behind([value])
            for user in node.users
        )

    def buffers(self, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
        """Names of the buffers that values are computed from."""
        return tuple(sorted(graph_input(n).name for n in self._placeholders_behind(nodes)))

    def _placeholders_behind(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        found: dict[fx.Node, None] = {}
        seen: set[fx.Node] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node in seen or is_symbolic(node):
                continue
            seen.add(node)
            if node.op == "placeholder" and graph_input(node).kind is InputKind.BUFFER:
                found[node] = None
            pending.extend(value_inputs(node))
        return list(found)


_KINDS = {
    InputKind.PARAMETER: Source.PARAMETER,
    InputKind.BUFFER: Source.BUFFER,
    InputKind.DATA: Source.DATA,
    InputKind.SIZE: Source.CONSTANT,
}


def is_random(node: fx.Node) -> bool:
    """Whether it draws numbers."""
    return isinstance(node.target, OpOverload) and (
        torch.Tag.nondeterministic_seeded in node.target.tags
    )


def _written_arguments(node: fx.Node) -> list[fx.Node]:
    """Values that a call writes into. A call nobody has rules for may write into all it gets."""
    target: Any = node.target
    if node.op == "call_method":
        writes = str(target).endswith("_") and target not in _OPERATORS
        return node.all_input_nodes if writes else []
    if node.op == "call_module":
        return node.all_input_nodes
    if node.op != "call_function" or isinstance(target, HigherOrderOperator):
        return []
    if not isinstance(target, OpOverload | OpOverloadPacket):
        known = getattr(target, "__module__", "") in ("_operator", "math", "builtins")
        return [] if known and target is not operator.setitem else node.all_input_nodes
    if _packet(target) in _HARMLESS:
        return []
    found: list[fx.Node] = []
    for schema in _schemas(node):
        for index, argument in enumerate(schema.arguments):
            given = node.kwargs.get(argument.name)
            if index < len(node.args) and not argument.kwarg_only:
                given = node.args[index]
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written:
                fx.node.map_arg(given, found.append)  # there may be a list of them
    return found


def _packet(target: OpOverload | OpOverloadPacket) -> OpOverloadPacket:
    return target.overloadpacket if isinstance(target, OpOverload) else target


def _schemas(node: fx.Node) -> list[torch.FunctionSchema]:
    """Of its operation, or of all that it may turn out to be: inside torch.vmap that stays open."""
    target: Any = node.target
    if isinstance(target, OpOverload):
        return [target._schema]
    schemas = [getattr(target, name)._schema for name in target.overloads()]
    return [s for s in schemas if all(a.name in node.kwargs for a in s.arguments if a.is_out)]


def computes(node: fx.Node) -> bool:
    """Whether a node does nothing but compute its result, the same at any place of the graph."""
    if is_symbolic(node) or node.op == "get_attr":
        return True
    return _is_pure(node) and not is_random(node)


def _writes(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For every value whose memory is written into: the operations that do."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if node.target in _SWITCHES:
            continue
        for written in _written_arguments(node):
            for alias in _aliases(written):
                if alias is not node:
                    found.setdefault(alias, []).append(node)
    return found


def grad_modes(nodes: Iterable[fx.Node]) -> dict[fx.Node, bool]:
    """Whether autograd runs at each node.

    The graph does not say how it begins: taken for the opposite of what is switched to first.
    """
    given = list(nodes)
    switched = [bool(n.args[0]) for n in given if n.target in _SWITCHES]
    mode = not switched[0] if switched else True
    found: dict[fx.Node, bool] = {}
    for node in given:
        if node.target in _SWITCHES:
            mode = bool(node.args[0])
        found[node] = mode
    return found


def _aliases(value: fx.Node) -> set[fx.Node]:
    """Values that may share memory with `value`."""
    seen: set[fx.Node] = set()
    pending = [value]
    while pending:
        node = pending.pop()
        if node in seen or is_symbolic(node):  # a size that views are made with is no memory
            continue
        seen.add(node)
        if _may_alias_input(node):
            pending.extend(node.all_input_nodes)
        pending.extend(user for user in node.users if _may_alias_input(user))
    return seen


# Their schemas say that the result is new, but it may be the input itself.
_MAYBE_VIEWS = {
    aten.to, aten.reshape, aten.reshape_as, aten.contiguous, aten.flatten, aten.dropout,
    aten.type_as, aten.feature_dropout, aten.ravel,
}  # fmt: skip


def _may_alias_input(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, OpOverload | OpOverloadPacket) or is_symbolic(node):
        return False
    if _packet(target) in _MAYBE_VIEWS:
        return True
    return any(r.alias_info is not None for s in _schemas(node) for r in s.returns)


def only_checks(node: fx.Node) -> bool:
    """Assertions: they return nothing and write nothing."""
    target = node.target
    return (
        isinstance(target, OpOverload)
        and not target._schema.returns
        and not target._schema.is_mutable
    )


def erase_dead(gm: fx.GraphModule) -> None:
    """Erases values that nothing uses; keeps whatever has an effect."""
    for node in reversed(gm.graph.nodes):
        if not node.users and _is_pure(node):
            gm.graph.erase_node(node)


def _is_pure(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or only_checks(node):
        return False
    if node.target is operator.getitem:
        return True
    return isinstance(node.target, OpOverload) and not node.target._schema.is_mutable


def erase_if_unused(gm: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
    """Erases those of `nodes` that nothing uses, and what only they used."""
    pending = list(nodes)
    gone: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in gone or not _is_pure(node):
            continue
        if any(not only_checks(user) for user in node.users):
            continue
        for user in list(node.users):
            gm.graph.erase_node(user)
        inputs = node.all_input_nodes
        gone.add(node)
        gm.graph.erase_node(node)
        pending.extend(inputs)
