"""Checks an emitted graph with rules of its own: nothing here knows how it was made.

Every value is one of

| state      | value on the ranks                        | gradient on the ranks     |
| constant   | the same                                  | none                      |
| replicated | the same                                  | the same                  |
| copy       | the same, entered local work              | a contribution            |
| local      | a part, or a part of a copy               | a contribution            |
| lookup     | rows of this rank, garbage elsewhere      | -                         |
| partial    | a summand                                 | the same                  |

A partial sum may only be scaled (by a number or a copy), moved, mapped by a copied weight, added
to another, or reduced; a replicated value may enter local work only through `CopyTo`; a divided
parameter that several ranks hold only through `SharedGradient`; of a whole value a rank takes the
part that is its own (`taken`); the output is replicated.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import fx, nn

import fxport.ops.experts  # noqa: F401  (registers the op)
from fxport.parallel.dropout import AttentionRate, KeyedDropout, StepSeed
from fxport.parallel.modules import CopyTo, Gather, ReduceFrom, SharedGradient
from fxport.parallel.plan import ParameterShard, Plan
from fxport.passes.tensor_parallel.parts import Parts, made_of, parts_of, viewed
from fxport.passes.tensor_parallel.taken import SLICES, TAKEN, positions_of, taken_once

__all__ = ["check"]

aten = torch.ops.aten


class _State(enum.Enum):
    CONSTANT = "constant"
    REPLICATED = "replicated"
    COPY = "copy"
    LOCAL = "local"
    LOOKUP = "lookup"
    PARTIAL = "partial"


_C, _R, _L, _P = _State.CONSTANT, _State.REPLICATED, _State.LOCAL, _State.PARTIAL
_K = _State.COPY
# Ops that map a sum of summands to the sum of the results, given a number or the same values.
_SCALING = {aten.div.Tensor, aten.mul.Tensor}
_MOVING = {
    aten.reshape.default, aten.view_as.default, aten.transpose.int, aten.permute.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.sum.dim_IntList,
}  # fmt: skip
_MASKING = {aten.where.ScalarOther: (1, 0), aten.masked_fill.Scalar: (0, 1)}  # (value, mask)
_CASTS = {aten.type_as.default, aten.to.other}  # the other value gives its dtype only
_BY_EXPERT = torch.ops.fxport.expert_linear.default
_PRODUCTS = {
    aten.einsum.default, aten.matmul.default, aten.bmm.default, aten.mm.default, _BY_EXPERT,
}  # fmt: skip


def check(module: fx.GraphModule, plan: Plan, rank: int) -> list[str]:
    """Everything that is wrong with the graph of one rank; an empty list proves the states."""
    return _Checker(module, plan, rank).run()


class _Checker:
    def __init__(self, module: fx.GraphModule, plan: Plan, rank: int) -> None:
        self.module, self.rank, self.ranks = module, rank, plan.world_size
        self.shards = {s.name: s for s in plan.parameters}
        self.first_names = {id(module.get_parameter(s.name)): s.name for s in plan.parameters}
        self.state: dict[fx.Node, _State] = {}
        self.divided: dict[fx.Node, ParameterShard] = {}
        self.weights: dict[fx.Node, ParameterShard] = {}  # those too whose gradient is shared
        self.parts: dict[fx.Node, Parts] = {}  # of those, and of what is made of them
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
                if self.state[node] is _R and _has_no_gradient(node):
                    self.state[node] = _C
                made = made_of(node, self.parts)
                if made is None and node.args and node.args[0] in self.weights:
                    made = viewed(node, self.weights[node.args[0]], self.rank)  # type: ignore[index]
                if made is not None:
                    self.parts[node] = made
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
            self.divided[node] = self.weights[node] = shard
            self.parts[node] = parts_of(shard)
            return _L
        return _R

    def _collective(self, node: fx.Node) -> _State:
        module = self.module.get_submodule(str(node.target))
        if isinstance(module, StepSeed | AttentionRate):
            return _C
        context = getattr(module, "context", None)
        if context is not None and (context.rank, context.world_size) != (self.rank, self.ranks):
            self._wrong(node, "a collective of other ranks than the plan's")
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before = self.state[source]
        if isinstance(module, KeyedDropout):
            return self._dropout(node, before, module)
        if isinstance(module, CopyTo):
            if before not in (_R, _C):
                self._wrong(node, f"sums the gradient of a {before.value} value")
            return _K
        if isinstance(module, ReduceFrom):
            if before is not _P:
                self._wrong(node, f"reduces a {before.value} value")
            return _R
        if isinstance(module, SharedGradient):
            if source not in self.divided:
                self._wrong(node, "shares the gradient of what is no divided parameter")
            else:
                self.weights[node] = self.divided[source]
                self.parts[node] = parts_of(self.divided[source])
            return _L
        if isinstance(module, Gather):
            if before is not _L:
                self._wrong(node, f"gathers a {before.value} value")
            self._gathered(node, source, module)
            return _R
        self._wrong(node, "unknown module")
        return _R

    def _dropout(self, node: fx.Node, before: _State, module: KeyedDropout) -> _State:
        if before is _P:
            self._wrong(node, "masks a partial sum")
        if before is not _L and any(size is not None for size in module.sizes):
            self._wrong(node, "masks a whole value like a part of it")
        if self.state[node.args[1]] is not _C:  # type: ignore[index]
            self._wrong(node, "the seed is not the same on every rank")
        return before

    def _call(self, node: fx.Node) -> _State:
        if node.target in (aten.sym_size.int, aten.zeros_like.default):  # without a gradient
            return _C
        if node.target in _CASTS:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            return self.state[source]
        inputs = {i: self.state[i] for i in node.all_input_nodes}
        if node.target is aten.linear.default:
            return self._linear(node)
        if node.target in _PRODUCTS:
            for value in node.all_input_nodes:
                if value in self.parts or self._cut(value) is not None:
                    return self._product(node, value)
        if node.target is aten.embedding.default and self._rows(node.args[0]):
            self._looked_up(node)
            return _State.LOOKUP
        states = set(inputs.values())
        if node.target in SLICES and (TAKEN in node.meta or _K in states):
            return self._taken(node, states)
        if _State.LOOKUP in states:
            if node.target is not aten.masked_fill.Scalar:
                self._wrong(node, "uses rows of other ranks before they are masked")
            return _P
        if _P in states:
            return self._partial(node, inputs)
        if node.target is aten.sum.dim_IntList and states == {_L}:
            return _P
        return self._mixed(node, inputs)

    def _taken(self, node: fx.Node, states: set[_State]) -> _State:
        """A part of what every rank has, or of what it holds."""
        if not states <= {_K, _C, _L}:
            self._wrong(node, f"takes a part of a {next(iter(states - {_C})).value} value")
        if TAKEN not in node.meta:
            self._wrong(node, "takes a part, and does not say what other ranks take")
        elif positions_of(node) != node.meta[TAKEN][self.rank]:
            self._wrong(node, "takes the part of another rank")
        return _L

    def _partial(self, node: fx.Node, inputs: dict[fx.Node, _State]) -> _State:
        first = node.args[0]
        others = [state for value, state in inputs.items() if value is not first]
        leads = isinstance(first, fx.Node) and inputs[first] is _P
        if node.target is aten.add.Tensor:
            fine = set(inputs.values()) == {_P} and len(node.args) == 2 and not node.kwargs
        elif node.target is aten.mul.Tensor:
            fine = [*inputs.values()].count(_P) == 1 and set(inputs.values()) <= {_P, _K, _C}
            fine = fine and node.args[0] is not node.args[1]
        elif node.target in _PRODUCTS and len(inputs) == 2:  # with a copy of every expert's gates
            fine = [*inputs.values()].count(_P) == 1 and set(inputs.values()) <= {_P, _K, _C}
        elif node.target in _MASKING:
            value, mask = (node.args[i] for i in _MASKING[node.target])
            zero = isinstance(node.args[2], int | float) and node.args[2] == 0
            fine = zero and inputs == {value: _P, mask: _C}  # type: ignore[comparison-overlap]
        elif node.target is aten.index_add.default:
            base, _, index, source = node.args
            begun = self.state[base] is _P or base.target is aten.zeros_like.default  # type: ignore
            fine = begun and (self.state[source], self.state[index]) == (_P, _C)  # type: ignore
            fine = fine and len(node.args) == 4 and not node.kwargs
        elif node.target in _SCALING:
            fine = leads and set(others) <= {_K, _C}
        elif node.target is aten.to.dtype:
            dtype = node.kwargs.get("dtype")
            fine = leads and isinstance(dtype, torch.dtype) and dtype.is_floating_point
        else:  # the other operand of a view gives its sizes only
            fine = leads and node.target in _MOVING
        if not fine:
            self._wrong(node, "uses a partial sum before it is reduced")
        return _P

    def _mixed(self, node: fx.Node, inputs: dict[fx.Node, _State]) -> _State:
        states = set(inputs.values())
        if not states & {_L, _K}:
            return _R if _R in states else _C
        for value, state in inputs.items():
            if state is _R:
                self._wrong(node, f"{value.name} is replicated and enters local work unsummed")
            self._held_once(node, value)
        return _K if states <= {_K, _C} and not _takes_a_part(node) else _L

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

    def _gathered(self, node: fx.Node, source: fx.Node, module: Gather) -> None:
        """Every rank's results must be as many as its rows."""
        shard = self.weights.get(source.args[1]) if len(source.args) > 1 else None  # type: ignore[arg-type]
        if shard is None or any(box[0] is None for box in shard.indices):
            self._wrong(node, "gathers what is no result of a divided weight")
        elif module.sizes != tuple(len(box[0] or ()) for box in shard.indices):
            self._wrong(node, f"gathers other sizes than the ranks have rows of {shard.name}")

    def _looked_up(self, node: fx.Node) -> None:
        """Rows are counted from this rank's first, and others are masked."""
        shard = self.divided[node.args[0]]  # type: ignore[index]
        held = shard.indices[self.rank][0] or ()
        filled: Any = node.args[1]
        limits = set()
        if filled.target is aten.masked_fill.Scalar and held == tuple(range(held[0], held[-1] + 1)):
            shifted, outside, _ = filled.args
            limits = {(n.target, n.args[0], n.args[1]) for n in outside.all_input_nodes}
            if shifted.target is not aten.sub.Tensor or shifted.args[1] != held[0]:
                limits = set()
            wanted = {(aten.lt.Scalar, shifted, 0), (aten.ge.Scalar, shifted, len(held))}
        if not limits or limits != wanted:
            self._wrong(node, f"looks up other rows than this rank has of {shard.name}")

    def _rows(self, weight: Any) -> bool:
        shard = self.divided.get(weight)
        return shard is not None and any(box[0] is not None for box in shard.indices)

    def _cut(self, weight: Any) -> int | None:
        """The dimension along which a part of a copied weight, of one expert say, is taken."""
        if weight.target not in SLICES:
            return None
        return weight.args[1] if self.state[weight.args[0]] is _K else None

    def _columns(self, weight: Any) -> bool:
        if self._cut(weight) == 1:
            return True
        return weight in self.parts and self.parts[weight][1]

    def _product(self, node: fx.Node, weight: fx.Node) -> _State:
        """A matrix product or einsum with a divided weight: partial if what is summed is."""
        if _P in {self.state[i] for i in node.all_input_nodes}:
            self._wrong(node, "uses a partial sum before it is reduced")
        others = set(node.all_input_nodes) - {weight}
        if node.target is _BY_EXPERT:
            others -= self._experts(node)
        cut = self._cut(weight)
        parts = self.parts.get(weight, ())
        divided = {d for d, part in enumerate(parts) if part} if cut is None else {cut}
        if not divided & self._summed(node, weight):
            return self._mixed(node, {i: self.state[i] for i in node.all_input_nodes})
        if any(self.state[i] is not _L for i in others):
            self._wrong(node, "a divided contraction of a value that is not divided")
        self._summed_once(node, weight)
        return _P

    def _summed_once(self, node: fx.Node, weight: fx.Node) -> None:
        if self._cut(weight) is not None and not taken_once(weight):
            self._wrong(node, "sums positions that the ranks have not each once")
        self._held_once(node, weight)

    def _experts(self, node: fx.Node) -> set[fx.Node]:
        """The choice of experts, which must be the same on every rank."""
        chosen = node.args[2]
        assert isinstance(chosen, fx.Node)
        if self.state[chosen] is not _C:
            self._wrong(node, "the experts are not the same on every rank")
        return {chosen}

    def _summed(self, node: fx.Node, weight: fx.Node) -> set[int]:
        """Dimensions of the weight that do not appear in the result."""
        if node.target is _BY_EXPERT:
            return {0, 2}  # of another rank's experts nothing is right
        if node.target is aten.einsum.default:
            inputs, result = str(node.args[0]).replace(" ", "").split("->")
            operands: Any = node.args[1]
            own = inputs.split(",")[list(operands).index(weight)]
            return {d for d, letter in enumerate(own) if letter not in result}
        if weight in self.parts:
            rank = len(self.parts[weight])
        else:  # a part of a copied parameter
            known = weight
            while "val" not in known.meta:
                known = known.all_input_nodes[0]
            rank = known.meta["val"].dim()
        return {rank - 2 if node.args[1] is weight else rank - 1}

    def _linear(self, node: fx.Node) -> _State:
        x, weight = node.args[0], node.args[1]
        bias = node.args[2] if len(node.args) > 2 else None
        assert isinstance(x, fx.Node)
        if self.state[x] is _P:
            if self.state[weight] is not _K or bias is not None:  # type: ignore[index]
                self._wrong(node, "uses a partial sum before it is reduced")
            return _P
        if not self._columns(weight):
            return self._mixed(node, {i: self.state[i] for i in node.all_input_nodes})
        if self.state[x] is not _L:
            self._wrong(node, "a divided contraction of a value that is not divided")
        if bias is not None:
            self._wrong(node, "adds a bias before the reduction: once for every rank")
        self._summed_once(node, weight)  # type: ignore[arg-type]
        return _P


def _has_no_gradient(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())


def _takes_a_part(node: fx.Node) -> bool:
    """Whether the ranks may take different parts of the same value."""
    return node.target in (aten.embedding.default, torch.ops.fxport.attention.default)
