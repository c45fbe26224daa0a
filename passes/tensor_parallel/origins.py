"""Checks that heads meet the heads, and features the weights, that they meet on one rank.

The positions of a parameter are named along the dimension that is divided, in the unsharded graph
and in that of a rank, where the plan says which the rank holds; or where the rank takes a part of a
whole parameter. What a product makes is named after the rows of its weight that make it. Names move
through views, splits, norms and pointwise ops. Then, in both graphs alike,

* a query head must be attended with the same key and value head,
* a column of a weight must be multiplied with the same feature,
* what meets in a pointwise op, as a bias or as a norm's weight must meet in the unsharded graph,
* what a rank sums is what it holds of a sum there, without what lower ranks hold.

The rules know nothing of how the graph was emitted. What cannot be followed in the unsharded graph
is not compared; what can be followed there must be in the rank's, too.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.parallel.dropout import KeyedDropout
from fxport.parallel.modules import CopyTo, SharedGradient
from fxport.parallel.plan import Plan
from fxport.passes.graph_facts import reachable
from fxport.passes.tensor_parallel.contraction import PRODUCTS, letters, operands_of
from fxport.passes.tensor_parallel.factors import unit_shape, unit_value
from fxport.passes.tensor_parallel.names import Naming, meetings_are, sums_are
from fxport.passes.tensor_parallel.numbers import OF
from fxport.passes.tensor_parallel.ops import KINDS, Kind
from fxport.passes.tensor_parallel.taken import TAKEN, Indices, constant_index

__all__ = ["check_origins"]

aten = torch.ops.aten
_ATTENTION = torch.ops.fxport.attention.default
_MOVING = (aten.flip.default, aten.roll.default, aten.index_select.default)
_COPYING = (
    aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.cat.default,
    aten.stack.default, aten.repeat.default,
)  # fmt: skip
_LARGEST = 2**22  # names that are written out


def check_origins(whole: fx.Graph, module: fx.GraphModule, plan: Plan, rank: int) -> list[str]:
    """Everything that meets something else on this rank than in the unsharded graph."""
    naming = Naming(plan, _taken(module))
    shapes = {s.name: s.shape for s in plan.parameters if len(s.shape) == 2}
    wanted = _Origins(naming, {n: (range(s[0]), range(s[1])) for n, s in shapes.items()}, None)
    wanted.walk(whole, None)
    indices = {s.name: s.indices[rank] for s in plan.parameters if s.name in shapes}
    held = {
        name: tuple(range(n) if i is None else i for n, i in zip(shapes[name], box, strict=True))
        for name, box in indices.items()
    }
    # tied names are one parameter
    names = {id(module.get_parameter(s.name)): s.name for s in plan.parameters}
    found = _Origins(naming, held, rank, {n.name: n for n in whole.nodes})
    found.walk(module.graph, (module, names))
    errors = []
    for name, origins in wanted.columns.items():
        if indices[name][1] is None:
            continue
        expected = [features[list(held[name][1])] for features in origins]
        here = found.columns.get(name, [])
        if not here or not all(any(torch.equal(h, o) for o in expected) for h in here):
            errors.append(f"{name}: its columns are multiplied with other features")
    for query, pairs in found.heads.items():
        if query in wanted.heads and not pairs <= wanted.heads[query]:
            errors.append("a query head is attended with another key or value head")
            break
    unequal = found.unequal and not wanted.unequal
    if unequal or not meetings_are(found.meetings, wanted.meetings, naming):
        errors.append("positions meet that do not meet in the unsharded graph")
    if not sums_are(found.sums, wanted.sums, naming, rank):
        errors.append("a sum is over other positions than in the unsharded graph")
    unread = wanted.read - found.read
    errors += [f"{name}: read by the model, and not by this rank" for name in sorted(unread)]
    lost = {name for name in wanted.followed - found.followed if name in held and held[name][0]}
    errors += [f"{name}: its result cannot be followed to an attention" for name in sorted(lost)]
    return errors


class _Origins:
    """One walk over a graph.

    Attributes:
        columns: weight -> the names of the features that its columns are multiplied with.
        heads: first feature of a query head -> those of its key and value heads.
        followed: weights whose results reach an attention.
        read: parameters.
        unequal: more positions meet fewer.
        meetings: names of positions that meet, two of one shape each.
        sums: (whether over several ranks, names ``[.., summands]``).
    """

    def __init__(
        self,
        naming: Naming,
        held: Mapping[str, Any],
        rank: int | None,
        sources: Mapping[str, fx.Node] | None = None,
    ) -> None:
        self.sources = sources or {}
        self.learned: set[fx.Node] = set()  # made of parameters alone
        self.naming, self.bases, self.held, self.rank = naming, naming.bases, held, rank
        self.meetings: list[tuple[Tensor, Tensor]] = []
        self.sums: list[tuple[bool, Tensor]] = []
        self.constants: dict[fx.Node, Tensor] = {}
        self.names: dict[fx.Node, Any] = {}
        self.weights: dict[fx.Node, str] = {}
        self.columns: dict[str, list[Tensor]] = {}
        self.heads: dict[int, set[tuple[int, int]]] = {}
        self.followed: set[str] = set()
        self.read: set[str] = set()
        self.unequal = False

    def walk(
        self, graph: fx.Graph, emitted: tuple[fx.GraphModule, Mapping[int, str]] | None
    ) -> None:
        for node in graph.nodes:
            if node.op == "placeholder" and emitted is None:
                found = graph_input(node)
                if found.kind is InputKind.PARAMETER:
                    self._parameter(node, found.name)
            elif node.op == "get_attr" and emitted is not None:
                value = _attribute(emitted[0], node)
                if id(value) in emitted[1]:
                    self._parameter(node, emitted[1][id(value)])
            elif node.op == "call_module" and emitted is not None:
                self._module(node, emitted[0].get_submodule(str(node.target)))
            elif node.op == "call_function":
                if node.all_input_nodes and self.learned.issuperset(node.all_input_nodes):
                    self.learned.add(node)
                self.names[node] = self._call(node)

    def _parameter(self, node: fx.Node, name: str) -> None:
        if node.users:
            self.read.add(name)
        if name in self.held:
            self.weights[node] = name
        self.learned.add(node)
        self.names[node] = self.naming.of_parameter(name, self.rank)

    def _module(self, node: fx.Node, module: torch.nn.Module) -> None:
        if not isinstance(module, CopyTo | SharedGradient | KeyedDropout):
            return
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source in self.weights:
            self.weights[node] = self.weights[source]
        if source in self.learned:
            self.learned.add(node)
        self.names[node] = self.names.get(source)

    def _call(self, node: fx.Node) -> Any:
        if node.target is constant_index:
            self.constants[node] = torch.tensor(node.args[0])
            return None
        if node.target is operator.getitem:
            source, index = node.args
            found = self.names.get(source)  # type: ignore[arg-type]
            return None if found is None else found[index]
        if node.target is aten.linear.default and arguments(node)["weight"] in self.weights:
            return self._linear(node)
        if node.target is aten.linear.default or node.target in PRODUCTS:
            return self._product(node)
        if node.target is _ATTENTION:
            return self._attention(node)
        kind = KINDS.get(node.target)
        named = [i for i in node.all_input_nodes if isinstance(self.names.get(i), Tensor)]
        if not named:
            return None
        if kind is Kind.STRUCTURE or node.target in _MOVING:
            return self._structure(node)
        if kind is Kind.MEAN:
            return self._summed(node)
        if kind is Kind.NORM:
            return self._norm(node)
        if kind is Kind.POINTWISE and max(self.names[i].numel() for i in named) <= _LARGEST:
            for one, other in itertools.combinations(named, 2):
                self._meet(self.names[one], self.names[other])
        if kind in (Kind.POINTWISE, Kind.CAST):
            return max((self.names[i] for i in named), key=lambda names: names.numel())
        if kind is Kind.HALVES:
            return self.names[named[0]].chunk(2, arguments(node)["dim"])[0]
        if node.target is aten.view_as_complex.default:
            return self.names[named[0]][..., 0]
        if node.target is aten.view_as_real.default:
            return torch.stack([self.names[named[0]]] * 2, dim=-1)
        return None

    def _meet(self, one: Tensor, other: Tensor) -> None:
        try:
            torch.broadcast_shapes(one.shape, other.shape)
            self.meetings.append((one, other))
        except RuntimeError:
            self.unequal = True

    def _structure(self, node: fx.Node) -> Any:
        tensors = [i for i in node.all_input_nodes if isinstance(i.meta.get("val"), Tensor)]
        if any(self.names.get(i) is None and i not in self.constants for i in tensors):
            return None
        if node.target in _COPYING and any(self.names[i].numel() > _LARGEST for i in tensors):
            return None

        def known(value: fx.Node) -> Any:
            if value in self.constants:
                return self.constants[value]
            found = self.names.get(value)
            return unit_value(value) if found is None else found

        target: Any = aten.reshape.default if node.target is aten.view.default else node.target
        try:
            return target(*fx.map_arg(node.args, known), **fx.map_arg(node.kwargs, known))
        except (RuntimeError, IndexError, KeyError, AttributeError):  # cannot be followed
            return None

    def _norm(self, node: fx.Node) -> Any:
        found = arguments(node)
        names = self.names.get(found["input"])
        if not isinstance(names, Tensor):
            return None
        width = math.prod(unit_value(n) for n in found["normalized_shape"])
        self.sums.append((False, names.reshape(math.prod(names.shape) // width, width)))
        for other in (self.names.get(found[k]) for k in ("weight", "bias") if found.get(k)):
            if isinstance(other, Tensor):
                self._meet(names, other)
        return names

    def _summed(self, node: fx.Node) -> None:
        """Over one dimension; ``sum`` in the graph of a rank is one over several."""
        found = arguments(node)
        names, dims = self.names.get(found["self"]), found["dim"]
        if isinstance(names, Tensor) and dims and len(dims) == 1:
            over_ranks = self.rank is not None and node.target is aten.sum.dim_IntList
            groups = names.movedim(dims[0], -1)
            self.sums.append((over_ranks, groups))

    def _own_sum(self, node: fx.Node) -> None:
        """``einsum("abc->ab", x)``: of this rank alone."""
        found = arguments(node)
        before, _, after = found["equation"].replace(" ", "").partition("->")
        dropped = [d for d, letter in enumerate(before) if letter not in after]
        if len(found["tensors"]) == 1 and len(dropped) == 1:
            self.sums.append((False, self.names[found["tensors"][0]].movedim(dropped[0], -1)))

    def _linear(self, node: fx.Node) -> Tensor | None:
        found = arguments(node)
        name = self.weights[found["weight"]]
        features = self.names.get(found["input"])
        if isinstance(features, Tensor) and features.numel() == features.shape[-1]:
            self.columns.setdefault(name, []).append(features.reshape(-1))
        rows = self.names[found["weight"]]
        if rows is None or _varies(rows, 1):
            return None
        rank = features.dim() if isinstance(features, Tensor) else 3
        made = rows[:, 0].reshape([1] * (rank - 1) + [-1])
        offset = self.names.get(found["bias"]) if found["bias"] is not None else None
        if isinstance(offset, Tensor):
            self._meet(made, offset)
        return made

    def _product(self, node: fx.Node) -> Tensor | None:
        """Of a weight in any layout, or one made of parameters."""
        source = self.sources.get(node.meta.get(OF, ""), node)
        if node.target is aten.einsum.default and len(arguments(node)["tensors"]) == 1:
            self._own_sum(node)
            return None
        found = letters(source)
        operands = operands_of(node)
        static = [i for i, n in enumerate(operands) if n in self.learned]
        if found is None or len(static) != 1:
            return None
        (which,) = static
        *given, after = found[1]
        weight, data = (self.names.get(operands[i]) for i in (which, 1 - which))
        of_weight, of_data = given[which], given[1 - which]
        if not isinstance(weight, Tensor) or weight.dim() != len(of_weight):
            return None
        features = data if isinstance(data, Tensor) and data.dim() == len(of_data) else None
        named = {c for d, c in enumerate(of_weight) if _varies(weight, d)}
        if features is not None and named <= set(of_data):
            self._meet(features, _aligned(weight, of_weight, of_data))
        if not named <= set(after):
            return None
        sizes = dict(zip(of_data, unit_shape(found[0][1 - which]), strict=True))
        if features is None and any(sizes[c] != 1 for c in after if c not in of_weight):
            return None
        return _aligned(weight, of_weight, after).expand(
            [features.shape[of_data.index(c)] if features is not None and c in of_data else -1
             for c in after]
        )  # fmt: skip

    def _attention(self, node: fx.Node) -> Any:
        found = arguments(node)
        q, k, v = (self.names.get(found[name]) for name in "qkv")
        if q is None or k is None or v is None or {q.dim(), k.dim(), v.dim()} != {4}:
            return None
        group = q.shape[1] // k.shape[1]
        for head, query in enumerate(q[0, :, 0, 0].tolist()):
            pair = (int(k[0, head // group, 0, 0]), int(v[0, head // group, 0, 0]))
            self.heads.setdefault(query, set()).add(pair)
        sinks = self.names.get(found["sinks"]) if found["sinks"] is not None else None
        if isinstance(sinks, Tensor):
            self._meet(q[0, :, 0, 0], sinks)
        ordered = list(self.bases)
        starts = torch.tensor([self.bases[name] for name in ordered])
        for names in (q, k, v):
            places = torch.searchsorted(starts, names.unique(), right=True) - 1
            self.followed.update(ordered[i] for i in places.unique().tolist())
        return [self.naming.of_results(q, v.shape[3]), None]


def _taken(module: fx.GraphModule) -> dict[str, tuple[int, Indices]]:
    """Whole parameters of which the ranks take parts, themselves or what is made of them: the
    dimension and the positions, where they are the same in all uses."""
    found: dict[str, set[tuple[int, Indices]]] = {}
    for node in module.graph.nodes:
        if TAKEN not in node.meta or node.args[0].op != "call_module":
            continue
        value = node.args[0].args[0]
        if not isinstance(value.meta.get("val"), Tensor):
            continue
        shape = tuple(shape_of(value))  # no SymInt: to compare one would fix the size
        for end in reachable([value]):
            if end.op == "get_attr" and _attribute(module, end).shape == shape:
                found.setdefault(str(end.target), set()).add((node.args[1], node.meta[TAKEN]))
    return {name: next(iter(parts)) for name, parts in found.items() if len(parts) == 1}


def _attribute(module: fx.GraphModule, node: fx.Node) -> Tensor:
    found: Tensor = operator.attrgetter(str(node.target))(module)
    return found


def _varies(names: Tensor, dim: int) -> bool:
    """Whether names differ along a dimension."""
    if names.stride(dim) == 0 or names.shape[dim] < 2:
        return False
    return not torch.equal(names, names.narrow(dim, 0, 1).expand_as(names))


def _aligned(names: Tensor, letters: str, wanted: str) -> Tensor:
    """With a dimension for each letter that is wanted, in that order, 1 for those it has not."""
    for dim in reversed(range(len(letters))):
        if letters[dim] not in wanted:
            names = names.select(dim, 0)
    kept = [c for c in letters if c in wanted]
    names = names.permute([kept.index(c) for c in wanted if c in kept])
    for dim, letter in enumerate(wanted):
        if letter not in kept:
            names = names.unsqueeze(dim)
    return names
