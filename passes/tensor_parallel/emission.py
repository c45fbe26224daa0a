"""Writes the graph of one rank.

Before                              After, rank 0 of 2 (h: replicated)
    y = linear(h, W, b)                 c = copy_to(h);  y = linear(c, W[rows], b[rows])
    z = gelu(y)                         z = gelu(y)
    o = linear(z, V, d)                 r = reduce_from(linear(z, V[:, columns]));  o = r + d

A value is *replicated* (the same on every rank, its gradient too) or *local* (computed for this
rank's part; its gradient is this rank's contribution). A replicated value enters local work
through `copy_to`; local work ends in `reduce_from`. Parameters in local work that several ranks
hold sum their gradients at their use, so that accumulated gradients stay right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.parallel.context import ParallelContext
from fxport.parallel.modules import CopyTo, ReduceFrom, SharedGradient
from fxport.passes.tensor_parallel.boxes import Box, Boxes, Undividable, positions
from fxport.passes.tensor_parallel.derived import derived
from fxport.passes.tensor_parallel.factors import unit_shape
from fxport.passes.tensor_parallel.labels import Labels
from fxport.passes.tensor_parallel.numbers import OF
from fxport.passes.tensor_parallel.ops import KINDS, Kind
from fxport.passes.tensor_parallel.postpone import Pending, postpone
from fxport.passes.tensor_parallel.solver import Solution
from fxport.passes.tensor_parallel.taken import TAKEN, Indices, constant_index

__all__ = ["Emission", "LocalHeads", "WholeParameter"]

aten = torch.ops.aten

# Writes one op of local work.
Rule = Callable[["Emission", fx.Node], None]
# The key of the rule for token embedding and head.
VOCABULARY = "vocabulary"


@dataclass(frozen=True)
class LocalHeads:
    """What one rank computes of an attention: which query heads, on how many kv heads."""

    query: tuple[int, ...]
    kv: int


class Emission:
    """The graph of one rank while it is written, and afterwards.

    Attributes:
        graph: the new graph; ``get_attr`` nodes name parameters and buffers.
        shards: parameter -> kind and the box of every rank.
        modules: collectives by the name that the graph calls.
        postponing: whether sums of projections are reduced as late as `postpone` can; those of
            other products always are.
        pending: sums that are not reduced yet; `env` reduces them when they are read.
        calls: (module name, the node of the original graph it serves).
    """

    def __init__(
        self,
        source: fx.GraphModule,
        labels: Labels,
        solution: Solution,
        context: ParallelContext,
        vocabulary: tuple[fx.Node, ...],
        whole: frozenset[str],
        rules: Mapping[Any, Rule],
        postponing: bool,
    ) -> None:
        self.rules = rules
        self.postponing = postponing
        self.pending: dict[fx.Node, Pending] = {}
        self.whole = whole
        self.source, self.labels, self.context = source, labels, context
        self.boxes = Boxes(labels, solution)
        self.rank, self.world_size = context.rank, context.world_size
        self.vocabulary = vocabulary
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = _Values(self)
        self.local: set[fx.Node] = set()
        self.modules: dict[str, nn.Module] = {}
        self.calls: list[tuple[str, fx.Node]] = []
        self.shards: dict[str, tuple[str, tuple[Box, ...]]] = {}
        self._copies: dict[fx.Node, fx.Node] = {}
        self._learned: set[fx.Node] = set()
        self._now: fx.Node | None = None

    # -- small writers -----------------------------------------------------------------------

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        assert self._now is not None
        node.meta = {k: v for k, v in self._now.meta.items() if k != "val"}
        node.meta[OF] = self._now.name
        return node

    def collective(self, name: str, module: nn.Module, value: fx.Node) -> fx.Node:
        assert self._now is not None
        key = f"{name}_{len(self.modules)}"
        self.modules[key] = module
        self.calls.append((key, self._now))
        node = self.graph.call_module(key, (value,))
        node.meta = {k: v for k, v in self._now.meta.items() if k != "val"}
        return node

    def reduce(self, value: fx.Node) -> fx.Node:
        return self.collective("reduce_from", ReduceFrom(self.context), value)

    def sum_of(self, node: fx.Node, partial: fx.Node, added: fx.Node | None = None) -> None:
        """The value of `node`: the sum of what the ranks have, and a whole bias ``[N]`` once."""
        self.pending[node] = Pending(partial, added, () if added is None else shape_of(node)[-1:])
        if not self.postponing and KINDS.get(node.target) is not Kind.CONTRACTION:
            self.settle(node)

    def settle(self, node: fx.Node) -> fx.Node:
        """Reduces a pending sum where it is needed."""
        pending, before = self.pending.pop(node), self._now
        self._now = node
        value = self.reduce(pending.partial)
        if pending.added is not None:
            value = self.call(aten.add.Tensor, value, pending.added)
        self.env[node], self._now = value, before
        return value

    def entering(self, old: fx.Node) -> fx.Node:
        """A data operand of local work: replicated values enter through `copy_to`, once."""
        new = self.env[old]
        value = old.meta["val"]
        if old in self.local or not (value.is_floating_point() or value.is_complex()):
            return new
        if old not in self._copies:
            self._copies[old] = self.collective("copy_to", CopyTo(self.context), new)
        return self._copies[old]

    def box(self, old: fx.Node, rank: int | None = None) -> Box:
        return self.every_box(old)[self.rank if rank is None else rank]

    def every_box(self, old: fx.Node) -> tuple[Box, ...]:
        """By rank. What is asked of one rank's box before a rule gives up must be asked of all:
        a rank that divides alone waits for the others forever."""
        return self.boxes.of_ranks(old, self.labels.atoms[old])

    def divided(self, old: fx.Node, dim: int) -> bool:
        """Whether some rank holds only a part of a dimension."""
        return any(box[dim] is not None for box in self.every_box(old))

    def held_once(self, old: fx.Node) -> bool:
        """Whether no position of a value is on two ranks, so that ranks' sums add up.

        Raises:
            Undividable: more than one dimension is divided.
        """
        boxes = self.every_box(old)
        dims = {d for box in boxes for d, index in enumerate(box) if index is not None}
        if len(dims) > 1:
            raise Undividable(old, "a sum over two divided dimensions", [self.labels.atoms[old]])
        held = [i for box in boxes for d in dims for i in box[d] or ()]
        return len(held) == len(set(held)) and all(box[d] for box in boxes for d in dims)

    # -- static operands ---------------------------------------------------------------------

    def static(self, old: fx.Node, kind: str, wanted: tuple[Box, ...], local: bool) -> fx.Node:
        """A parameter, buffer or constant as this op wants it on this rank.

        Args:
            wanted: the box for every rank.
            local: the op is local work, so gradients of positions on several ranks are summed.
        """
        if old.op == "placeholder" and graph_input(old).kind is InputKind.PARAMETER:
            name = graph_input(old).name
            if name not in self.whole:
                if self.shards.setdefault(name, (kind, wanted))[1] != wanted:
                    raise WholeParameter(name)
                return self._synchronised(old, wanted) if local else self.env[old]
            self._whole(old)
        made = derived(self, old, kind, wanted) if local and self.is_learned(old) else None
        if made is not None:
            return made
        if local and old in self._learned:
            value = self.collective("copy_to", CopyTo(self.context), self.env[old])
        else:
            value = self.env[old]
        return self.take_box(value, wanted)

    def is_learned(self, old: fx.Node) -> bool:
        """Whether a value depends on parameters."""
        return old in self._learned

    def take_box(self, value: fx.Node, boxes: tuple[Box, ...]) -> fx.Node:
        """This rank's part of a whole value, given every rank's."""
        for dim, index in enumerate(boxes[self.rank]):
            if index is not None:
                value = self.take(value, dim, tuple(box[dim] for box in boxes))
        return value

    def take(self, value: fx.Node, dim: int, indices: Indices) -> fx.Node:
        """This rank's positions along a dimension; the checker is told every rank's."""
        index = indices[self.rank]
        assert index is not None
        first = index[0] if index else 0
        if index == tuple(range(first, first + len(index))):
            part = self.call(aten.slice.Tensor, value, dim, first, first + len(index), 1)
        else:
            made = self.call(constant_index, index, value)
            part = self.call(aten.index_select.default, value, dim, made)
        part.meta[TAKEN] = indices
        return part

    def _synchronised(self, old: fx.Node, wanted: tuple[Box, ...]) -> fx.Node:
        divided = {d for box in wanted for d, index in enumerate(box) if index is not None}
        if not divided:
            return self.collective("copy_to", CopyTo(self.context), self.env[old])
        if len(divided) > 1:
            raise WholeParameter(graph_input(old).name)
        dim = divided.pop()
        size = unit_shape(old)[dim]
        held = [i for box in wanted for i in positions(box[dim], size)]
        if len(held) == len(set(held)):
            return self.env[old]
        index = positions(wanted[self.rank][dim], size)
        module = SharedGradient(self.context, dim, index, size)
        return self.collective("shared_gradient", module, self.env[old])

    def all_boxes(self, make: Any) -> tuple[Box, ...]:
        return tuple(make(rank) for rank in range(self.world_size))

    # -- the walk ----------------------------------------------------------------------------

    def run(self) -> None:
        for node in self.source.graph.nodes:
            self._now = node
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "output":
                for value in node.all_input_nodes:
                    if value in self.local:
                        raise Undividable(node, "the output is divided", [self.labels.atoms[value]])
                self.graph.output(fx.map_arg(node.args[0], self.env.__getitem__))
            elif node not in self.labels.atoms:
                self._static_op(node)
            else:
                self._data_op(node)

    def _placeholder(self, node: fx.Node) -> None:
        found = graph_input(node)
        if found.kind is InputKind.DATA:
            new = self.graph.placeholder(found.name)
        elif found.kind is InputKind.SIZE:
            raise Undividable(node, "a size is an input", [])
        else:
            new = self.graph.get_attr(found.name)
            if found.kind is InputKind.PARAMETER:
                self._learned.add(node)
        new.meta = dict(node.meta)
        self.env[node] = new

    def _static_op(self, node: fx.Node) -> None:
        for value in node.all_input_nodes:
            if value in self._learned:
                self._learned.add(node)
            if value in self.local and self._reads_size(node, value):
                raise Undividable(node, "a size of a divided value", [self.labels.atoms[value]])
        if node not in self._learned:  # else written once it is known how much of it is wanted
            self._copy(node)

    def _reads_size(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether the op asks for a size that is another on a part of the value."""
        if KINDS.get(node.target) is Kind.CAST:
            return False
        if node.target is aten.sym_size.int:
            return self.divided(value, arguments(node)["dim"])
        return not self.boxes.complete(self.labels.atoms[value])

    def _whole(self, parameter: fx.Node) -> None:
        """A use that needs all of a parameter."""
        full: Box = (None,) * len(unit_shape(parameter))
        name = graph_input(parameter).name
        wanted = (full,) * self.world_size
        if self.shards.setdefault(name, ("replicated", wanted))[1] != wanted:
            raise WholeParameter(name)

    def _data_op(self, node: fx.Node) -> None:
        if node in self.vocabulary and self.boxes.complete(self.labels.atoms[node]):
            weight = graph_input(arguments(node)["weight"]).name
            if weight not in self.whole:
                self.rules[VOCABULARY](self, node)
                return
        if postpone(self, node):
            return
        atoms = self.labels.atoms[node]
        parts = atoms if isinstance(atoms, tuple) else (atoms,)
        inputs = [i for i in node.all_input_nodes if i in self.labels.atoms]
        kind = KINDS.get(node.target)
        divided = any(not self.boxes.complete(p) for p in parts)
        if not divided and not any(i in self.local for i in inputs):
            self._copy(node)
            return
        rule = self.rules.get(node.target, self.rules.get(kind))
        if rule is None:
            every = [self.labels.atoms[i] for i in inputs]
            flat = [t for a in every for t in (a if isinstance(a, tuple) else (a,))]
            raise Undividable(node, f"no rule for {node.target} on a divided value", flat)
        rule(self, node)

    def write_whole(self, node: fx.Node) -> None:
        """What is made of parameters, all of it."""
        before, self._now = self._now, node
        self._copy(node)
        self._now = before

    def _copy(self, node: fx.Node) -> None:
        """Replicated work: as it was."""
        for value in node.all_input_nodes:
            if value.op == "placeholder" and value in self._learned:
                self._whole(value)
        self.env[node] = self.graph.node_copy(node, self.env.__getitem__)
        self.env[node].meta[OF] = node.name


class _Values(dict[fx.Node, fx.Node]):
    """Emitted nodes by the nodes they stand for.

    A pending sum is reduced when it is read; all of what is made of parameters, written.
    """

    def __init__(self, emission: Emission) -> None:
        super().__init__()
        self._emission = emission

    def __missing__(self, node: fx.Node) -> fx.Node:
        if node in self._emission.pending:
            return self._emission.settle(node)
        if node.op != "placeholder" and self._emission.is_learned(node):
            self._emission.write_whole(node)
            return self[node]
        raise KeyError(node)

    def get(self, node: fx.Node, default: Any = None) -> Any:
        try:
            return self[node]
        except KeyError:
            return default


class WholeParameter(Exception):
    """Two uses of a parameter want different parts of it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name
