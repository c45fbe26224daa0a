"""Tells equal constant subgraphs by a number, so that each is looked at once."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.constants import is_symbolic
from fxport.passes.graph_facts import value_inputs

__all__ = ["Keys"]


class Keys:
    """Two nodes get one key only if they are the same operations on equal stored tensors."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._of_node: dict[fx.Node, int] = {}
        self._of_call: dict[Any, int] = {}
        self._stored: list[torch.Tensor] = []

    def of(self, node: fx.Node | None) -> int:
        """The key of a node; 0 for None."""
        if node is None:
            return 0
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [n for n in value_inputs(current) if n not in self._of_node]
            if current in self._of_node or is_symbolic(current) or not missing:
                pending.pop()
                if current not in self._of_node:
                    self._of_node[current] = self._number(self._describe(current))
            else:
                pending.extend(missing)
        return self._of_node[node]

    def _number(self, description: Any) -> int:
        return self._of_call.setdefault(description, len(self._of_call) + 1)

    def _describe(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if is_symbolic(node) or not isinstance(value, torch.Tensor):
            return "size", str(value)
        stored = self._stored_value(node)
        if stored is not None:
            return "stored", self._same_as(stored)
        if node.op != "call_function":
            return "unknown", node.name

        def hashable(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                # One that only lends its shape has no key; the shape is part of the key below.
                return "node", self._of_node.get(argument, 0)
            if isinstance(argument, tuple | list):
                return tuple(hashable(a) for a in argument)
            if isinstance(argument, dict):
                return tuple((k, hashable(v)) for k, v in argument.items())
            return type(argument), repr(argument)

        metadata = (str(tuple(value.shape)), value.dtype, value.device)
        return node.target, hashable(node.args), hashable(dict(node.kwargs)), metadata

    def _stored_value(self, node: fx.Node) -> torch.Tensor | None:
        if node.op == "get_attr":
            found = operator.attrgetter(str(node.target))(self._gm)
            return found if isinstance(found, torch.Tensor) else None
        if node.op == "placeholder":
            source = graph_input(node)
            return source.value if source.kind is InputKind.BUFFER else None
        return None

    def _same_as(self, value: torch.Tensor) -> int:
        for index, known in enumerate(self._stored):
            if known is value or _equal(known, value):
                return index
        self._stored.append(value)
        return len(self._stored) - 1


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype or left.device != right.device:
        return False
    return bool(left.data_ptr() == right.data_ptr() and left.stride() == right.stride()) or (
        torch.equal(left, right)
    )
