"""Checks an emitted graph with rules of its own: nothing here knows how it was made.

Every value is one of

| state      | value on the ranks                        | gradient on the ranks     |
| constant   | the same                                  | none                      |
| replicated | the same                                  | the same                  |
| local      | a part, or a copy used on a part          | a contribution            |
| lookup     | rows of this rank, garbage elsewhere      | -                         |
| partial    | a summand                                 | the same                  |

A partial sum may only be scaled, added to another, or reduced; a replicated value may enter local
work only through `CopyTo`; a divided parameter that several ranks hold only through
`SharedGradient`; the output is replicated.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import fx, nn

from fxport.parallel.modules import CopyTo, Gather, ReduceFrom, SharedGradient
from fxport.parallel.plan import ParameterShard, Plan

__all__ = ["check"]

aten = torch.ops.aten


class _State(enum.Enum):
    CONSTANT = "constant"
    REPLICATED = "replicated"
    LOCAL = "local"
    LOOKUP = "lookup"
    PARTIAL = "partial"


_C, _R, _L, _P = _State.CONSTANT, _State.REPLICATED, _State.LOCAL, _State.PARTIAL
# Ops that map a sum of summands to the sum of the results, given a number.
_SCALING = {aten.div.Tensor, aten.mul.Tensor}


def check(module: fx.GraphModule, plan: Plan, rank: int) -> list[str]:
    """Everything that is wrong with the graph of one rank; an empty list proves the states."""
    return _Checker(module, plan, rank).run()


class _Checker:
    def __init__(self, module: fx.GraphModule, plan: Plan, rank: int) -> None:
        self.module, self.rank = module, rank
        self.shards = {s.name: s for s in plan.parameters}
        self.first_names = {id(module.get_parameter(s.name)): s.name for s in plan.parameters}
        self.state: dict[fx.Node, _State] = {}
        self.divided: dict[fx.Node, ParameterShard] = {}
        self.errors: list[str] = []

    def run(self) -> list[str]:
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.state[node] = _C
            elif node.op == "get_attr":
                self.state[node] = self._attribute(node)
            elif node.op == "call_module":
                self.state[node] = self._collective(node)
            elif node.op == "call_function":
                self.state[node] = self._call(node)
            else:
                for value in node.all_input_nodes:
                    if self.state[value] not in (_R, _C):
                        self._wrong(node, f"the output is {self.state[value].value}")
        return self.errors

    def _wrong(self, node: fx.Node, what: str) -> None:
        self.errors.append(f"{node.name} ({node.target}): {what}")

    def _attribute(self, node: fx.Node) -> _State:
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, nn.Parameter):
            return _C
        shard = self.shards[self.first_names[id(value)]]
        if tuple(value.shape) != shard.local_shape(self.rank):
            self._wrong(node, "the parameter has another shape than the plan says")
        if any(index is not None for box in shard.indices for index in box):
            self.divided[node] = shard
            return _L
        return _R

    def _collective(self, node: fx.Node) -> _State:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before, module = self.state[source], self.module.get_submodule(str(node.target))
        if isinstance(module, CopyTo):
            if before not in (_R, _C):
                self._wrong(node, f"sums the gradient of a {before.value} value")
            return _L
        if isinstance(module, ReduceFrom):
            if before is not _P:
                self._wrong(node, f"reduces a {before.value} value")
            return _R
        if isinstance(module, SharedGradient):
            if source not in self.divided:
                self._wrong(node, "shares the gradient of what is no divided parameter")
            return _L
        if isinstance(module, Gather):
            if before is not _L:
                self._wrong(node, f"gathers a {before.value} value")
            return _R
        self._wrong(node, "unknown module")
        return _R

    def _call(self, node: fx.Node) -> _State:
        if node.target is aten.sym_size.int:  # a number, without a gradient
            return _C
        inputs = {i: self.state[i] for i in node.all_input_nodes}
        if node.target is aten.linear.default:
            return self._linear(node)
        if node.target is aten.embedding.default and self._rows(node.args[0]):
            return _State.LOOKUP
        states = set(inputs.values())
        if _State.LOOKUP in states:
            if node.target is not aten.masked_fill.Scalar:
                self._wrong(node, "uses rows of other ranks before they are masked")
            return _P
        if _P in states:
            return self._partial(node, states)
        if node.target is aten.sum.dim_IntList and states == {_L}:
            return _P
        return self._mixed(node, inputs)

    def _partial(self, node: fx.Node, states: set[_State]) -> _State:
        numbers = len(node.all_input_nodes) == 1 and node.target in _SCALING
        if not numbers and not (node.target is aten.add.Tensor and states == {_P}):
            self._wrong(node, "uses a partial sum before it is reduced")
        return _P

    def _mixed(self, node: fx.Node, inputs: dict[fx.Node, _State]) -> _State:
        if _L not in inputs.values():
            return _R if _R in inputs.values() else _C
        for value, state in inputs.items():
            if state is _R:
                self._wrong(node, f"{value.name} is replicated and enters local work unsummed")
            self._held_once(node, value)
        return _L

    def _held_once(self, node: fx.Node, value: fx.Node) -> None:
        """Gradients of positions that several ranks hold must be summed."""
        shard = self.divided.get(value)
        if shard is None:
            return
        for dim, size in enumerate(shard.shape):
            indices = [box[dim] for box in shard.indices]
            if all(index is None for index in indices):
                continue
            held = [i for index in indices for i in (range(size) if index is None else index)]
            if len(held) != len(set(held)):
                self._wrong(node, f"the gradient of {shard.name} is not summed")

    def _rows(self, weight: Any) -> bool:
        shard = self.divided.get(weight)
        return shard is not None and any(box[0] is not None for box in shard.indices)

    def _columns(self, weight: Any) -> bool:
        shard = self.divided.get(weight)
        return shard is not None and any(box[1] is not None for box in shard.indices)

    def _linear(self, node: fx.Node) -> _State:
        x, weight = node.args[0], node.args[1]
        bias = node.args[2] if len(node.args) > 2 else None
        assert isinstance(x, fx.Node)
        if self.state[x] is _P:
            self._wrong(node, "uses a partial sum before it is reduced")
        if not self._columns(weight):
            return self._mixed(node, {i: self.state[i] for i in node.all_input_nodes})
        if self.state[x] is not _L:
            self._wrong(node, "a divided contraction of a value that is not divided")
        if bias is not None:
            self._wrong(node, "adds a bias before the reduction: once for every rank")
        self._held_once(node, weight)  # type: ignore[arg-type]
        return _P
