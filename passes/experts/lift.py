"""What every expert computes, computed once, for the experts that each row chose.

Of E experts                              For the K that a row chose
    linear(x, W_e)         [R, O]             expert_linear(x, stack(W_0, ..), own)   [K, R, O]
    z * bias_e             [R, O]             z * embedding(stack(bias_0, ..), own)   [K, R, O]
    eq(chosen, e)          [R, K]             eq(chosen, own[..., None])              [K, R, K]
    select(one_hot, 0, e)  [K, R]             eq(chosen, own[..., None]), permuted    [K, K, R]
    select(gates, 1, e)    [R]                gather(gates, 1, chosen), transposed    [K, R]

The same operation of every expert is one operation with an axis more, the first. Values whose
operands are all the same for every expert are taken from the first one.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import fxport.ops.experts  # noqa: F401  (registers the op)
from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.attention.emit import Emitter
from fxport.passes.tokens.rules import is_pointwise

__all__ = ["First", "Lift", "Unlike", "of_classes"]

aten = torch.ops.aten


class Unlike(Exception):
    """The experts are not alike, or there is no rule for what they do."""


class First(enum.Enum):
    """What the first axis of a value is, that its originals do not have."""

    NONE = "the same for every expert"
    EXPERT = "of each expert: [E, ...]"
    SLOT = "of the experts that a row chose: [K, ...]"


@dataclass(frozen=True)
class Lifted:
    node: fx.Node
    first: First


@dataclass(frozen=True)
class _Class:
    """The number of the expert, plus `more`."""

    more: int


class Lift:
    """Lifts values of experts, in order, to one.

    Args:
        chosen: ``[*rows, K]``, the experts of each row.
        experts: how many there are.
    """

    def __init__(self, emitter: Emitter, chosen: fx.Node, experts: int) -> None:
        self.emit, self.chosen, self.experts = emitter.call, chosen, experts
        self._done: dict[tuple[fx.Node, ...], Lifted] = {}
        self._own: dict[tuple[Any, ...], fx.Node] = {}

    def own(self, rows: tuple[Any, ...]) -> fx.Node:
        """``[K, *rows]``: the experts that each row chose."""
        if rows not in self._own:
            chosen = self.chosen
            before = shape_of(chosen)[:-1]
            if before != rows:
                if len(rows) != 1 or _product(before) != rows[0]:
                    raise Unlike
                chosen = self.emit(aten.flatten.using_ints, chosen, 0, len(before) - 1)
            order = [len(rows), *range(len(rows))]
            self._own[rows] = self.emit(aten.permute.default, chosen, order)
        return self._own[rows]

    def value(self, nodes: Sequence[fx.Node]) -> Lifted:
        """
        Args:
            nodes: the value of each expert.

        Raises:
            Unlike: they are not alike.
        """
        key = tuple(nodes)
        if key not in self._done:
            self._done[key] = self._value(key)
        return self._done[key]

    def _value(self, nodes: tuple[fx.Node, ...]) -> Lifted:
        one = nodes[0]
        if all(n is one for n in nodes):
            return Lifted(one, First.NONE)
        if any(n.op != one.op or n.target != one.target for n in nodes if n.op != "placeholder"):
            raise Unlike
        if all(map(_is_parameter, nodes)):
            return self._stacked(nodes)
        if any(n.op != "call_function" for n in nodes):
            raise Unlike
        if one.target is operator.getitem:
            return self._item(nodes)
        if not isinstance(one.target, torch._ops.OpOverload):
            bound = [{"args": n.args} for n in nodes]  # sizes
        else:
            bound = [arguments(n) for n in nodes]
        given = {name: self._argument([b[name] for b in bound]) for name in bound[0]}
        found = [v for v in _leaves(given.values()) if isinstance(v, Lifted)]
        classes = any(isinstance(v, _Class) for v in _leaves(given.values()))
        if not classes and all(v.first is First.NONE for v in found):
            return Lifted(one, First.NONE)
        return self._call(one, given)

    def _stacked(self, nodes: tuple[fx.Node, ...]) -> Lifted:
        values = [n.meta["val"] for n in nodes]
        if len({(v.shape, v.dtype) for v in values}) > 1:
            raise Unlike
        return Lifted(self.emit(aten.stack.default, list(nodes)), First.EXPERT)

    def _argument(self, values: list[Any]) -> Any:
        one = values[0]
        if all(isinstance(v, fx.Node) for v in values):
            return self.value(values)
        if any(type(v) is not type(one) for v in values):
            raise Unlike
        if isinstance(one, list | tuple):
            if len({len(v) for v in values}) > 1:
                raise Unlike
            return [self._argument(list(v)) for v in zip(*values, strict=True)]
        if all(v == one for v in values):
            return one
        if type(one) is int and values == list(range(one, one + self.experts)):
            return _Class(one)
        raise Unlike

    def _item(self, nodes: tuple[fx.Node, ...]) -> Lifted:
        sources, indices = zip(*(n.args for n in nodes), strict=True)
        index = self._argument(list(indices))
        source = self.value(sources)
        if isinstance(index, _Class) and index.more == 0 and source.first is First.NONE:
            if source.node.target is not aten.unbind.int:
                raise Unlike
            bound = arguments(source.node)
            return self._of_own(bound["self"], bound["dim"])
        if isinstance(index, _Class):
            raise Unlike
        return Lifted(self.emit(operator.getitem, source.node, index), source.first)

    # --- one operation -----------------------------------------------------------------------

    def _call(self, node: fx.Node, given: dict[str, Any]) -> Lifted:
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload):
            raise Unlike
        if any(isinstance(v, _Class) for v in _leaves(given.values())):
            return self._of_class(target, given)
        rank = len(shape_of(node)) if isinstance(node.meta["val"], torch.Tensor) else -1
        if target is aten.linear.default:
            return self._linear(given)
        if target in (aten.matmul.default, aten.mm.default):
            return self._product(given)
        if is_pointwise(target):
            return self._pointwise(target, given, rank)
        if target in (aten.t.default, aten.numpy_T.default) and rank == 2:
            turned = given["self"]
            return Lifted(self.emit(aten.transpose.int, turned.node, 1, 2), turned.first)
        shifted = _SHIFTS.get(target)
        lifted = _tensors(given)
        if shifted is None or len({v.first for v in lifted}) > 1:
            raise Unlike
        plain = {k: _plain(v) for k, v in given.items()}
        new = {**plain, **shifted(plain, lifted[0].node, len(shape_of(lifted[0].node)) - 1)}
        first = First.NONE if target is aten.sym_size.int else lifted[0].first
        return Lifted(self._written(target, new), first)

    def _written(self, target: Any, given: Mapping[str, Any]) -> fx.Node:
        named = {a.name: given[a.name] for a in target._schema.arguments if a.kwarg_only}
        return self.emit(target, *(v for k, v in given.items() if k not in named), **named)

    def _of_class(self, target: Any, given: dict[str, Any]) -> Lifted:
        """What differs by the number of the expert."""
        source: Any = given.get("self")
        if not isinstance(source, Lifted) or source.first is not First.NONE:
            raise Unlike
        if target is aten.eq.Scalar and given["other"] == _Class(0):
            return Lifted(self._equal(source.node), First.SLOT)
        if target is aten.select.int and given["index"] == _Class(0):
            return self._of_own(source.node, given["dim"])
        one = (given.get("start"), given.get("end"), given.get("step")) == (_Class(0), _Class(1), 1)
        if target is aten.slice.Tensor and one:
            found = self._of_own(source.node, given["dim"])
            dim = given["dim"] % len(shape_of(source.node)) + 1
            return Lifted(self.emit(aten.unsqueeze.default, found.node, dim), found.first)
        raise Unlike

    def _equal(self, value: fx.Node) -> fx.Node:
        """``value == e`` for each row's own experts; its first axes are the rows."""
        shape = shape_of(value)
        rows = tuple(s for s in shape if not isinstance(s, int))
        own = self.own(shape[: len(rows)])
        for _ in shape[len(rows) :]:
            own = self.emit(aten.unsqueeze.default, own, -1)
        return self.emit(aten.eq.Tensor, value, own)

    def _of_own(self, value: fx.Node, dim: int) -> Lifted:
        """``value`` without axis `dim`, which counts the experts, at the row's own experts."""
        dim %= len(shape_of(value))
        if _is_parameter(value):
            if dim != 0 or shape_of(value)[0] != self.experts:
                raise Unlike
            return Lifted(value, First.EXPERT)
        bound = arguments(value) if isinstance(value.target, torch._ops.OpOverload) else {}
        if value.target is aten.permute.default:
            order = [d % len(bound["dims"]) for d in bound["dims"]]
            source = order.pop(dim)
            found = self._of_own(bound["self"], source)
            places = [0, *(1 + d - (d > source) for d in order)]
            return Lifted(self.emit(aten.permute.default, found.node, places), found.first)
        classes = of_classes(value, dim)
        if classes is not None:
            equal, dtype = self._equal(classes), value.meta["val"].dtype
            same = equal.meta["val"].dtype == dtype
            return Lifted(equal if same else self.emit(aten.to.dtype, equal, dtype), First.SLOT)
        if len(shape_of(value)) == 2 and dim == 1 and shape_of(value)[1] == self.experts:
            chosen = self._flat_chosen(shape_of(value)[0])
            picked = self.emit(aten.gather.default, value, 1, chosen)
            return Lifted(self.emit(aten.permute.default, picked, [1, 0]), First.SLOT)
        raise Unlike

    def _flat_chosen(self, rows: Any) -> fx.Node:
        return self.emit(aten.permute.default, self.own((rows,)), [1, 0])

    def _linear(self, given: dict[str, Any]) -> Lifted:
        x, weight, bias = given["input"], given["weight"], given["bias"]
        if weight.first is First.NONE and (bias is None or bias.first is First.NONE):
            args = (x.node, weight.node, None if bias is None else bias.node)
            return Lifted(self.emit(aten.linear.default, *args), x.first)
        if weight.first is not First.EXPERT or len(shape_of(weight.node)) != 3:
            raise Unlike
        y = self._by_expert(x, weight.node)
        if bias is None:
            return y
        added = {"self": y, "other": bias, "alpha": 1}
        return self._pointwise(aten.add.Tensor, added, len(shape_of(y.node)) - 1)

    def _product(self, given: dict[str, Any]) -> Lifted:
        x: Lifted = given["self"]
        weight: Lifted = given["other"] if "other" in given else given["mat2"]
        if weight.first is First.NONE and len(shape_of(weight.node)) == 2:
            return Lifted(self.emit(aten.matmul.default, x.node, weight.node), x.first)
        if weight.first is not First.EXPERT or len(shape_of(weight.node)) != 3:
            raise Unlike
        return self._by_expert(x, self.emit(aten.transpose.int, weight.node, 1, 2))

    def _by_expert(self, x: Lifted, weight: fx.Node) -> Lifted:
        if x.first is First.EXPERT:
            raise Unlike
        rows = shape_of(x.node)[(x.first is First.SLOT) : -1]
        own, value = self.own(rows), x.node
        if x.first is First.NONE:
            sizes = [shape_of(own)[0], *[-1] * len(shape_of(value))]
            value = self.emit(aten.unsqueeze.default, value, 0)
            value = self.emit(aten.expand.default, value, sizes)
        product = torch.ops.fxport.expert_linear.default
        return Lifted(self.emit(product, value, weight, own), First.SLOT)

    def _pointwise(self, target: Any, given: dict[str, Any], rank: int) -> Lifted:
        operands = _tensors(given)
        if all(v.first is not First.SLOT for v in operands):
            first = First.EXPERT
            if any(v.first is First.NONE and len(shape_of(v.node)) for v in operands):
                raise Unlike
        else:
            first = First.SLOT
        whole = [v.node for v in operands
                 if v.first is First.SLOT and len(shape_of(v.node)) == rank + 1]  # fmt: skip
        rows = shape_of(whole[0])[1:-1] if whole else None

        def aligned(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [aligned(v) for v in value]
            if not isinstance(value, Lifted):
                return value
            if value.first is First.NONE:
                return value.node
            if value.first is first:
                if len(shape_of(value.node)) != rank + 1:
                    raise Unlike
                return value.node
            if rows is None or len(shape_of(value.node)) != 2:
                raise Unlike
            return self.emit(aten.embedding.default, value.node, self.own(rows))

        new = {k: aligned(v) for k, v in given.items()}
        return Lifted(self._written(target, new), first)


def of_classes(value: fx.Node, dim: int) -> fx.Node | None:
    """``x`` of ``one_hot(x)`` or ``x[..., None] == arange(n)``, if `dim` is that of the classes."""
    if dim != len(shape_of(value)) - 1:
        return None
    if value.target is aten.one_hot.default:
        source: fx.Node = arguments(value)["self"]
        return source
    if value.target is not aten.eq.Tensor:
        return None
    widened, numbers = arguments(value)["self"], arguments(value)["other"]
    if numbers.target is not aten.arange.default or len(shape_of(numbers)) != 1:
        return None
    if widened.target is not aten.unsqueeze.default or shape_of(widened)[-1] != 1:
        return None
    inner: fx.Node = arguments(widened)["self"]
    return inner


def _leaves(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found += _leaves(value) if isinstance(value, list | tuple) else [value]
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.node if isinstance(value, Lifted) else value


def _tensors(given: Mapping[str, Any]) -> list[Lifted]:
    found = [v for v in _leaves(given.values()) if isinstance(v, Lifted)]
    return [v for v in found if isinstance(v.node.meta["val"], torch.Tensor)]


def _is_parameter(node: fx.Node) -> bool:
    return node.op == "placeholder" and graph_input(node).kind is InputKind.PARAMETER


def _product(sizes: tuple[Any, ...]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


# --- one axis more in front: what becomes of arguments that name axes or sizes -----------------

_Shift = Callable[[dict[str, Any], fx.Node, int], dict[str, Any]]


def _axis(*names: str) -> _Shift:
    def shift(given: dict[str, Any], _: fx.Node, rank: int) -> dict[str, Any]:
        return {name: _after(given[name]) for name in names}

    return shift


def _after(dims: Any) -> Any:
    if isinstance(dims, list | tuple):
        return [_after(d) for d in dims]
    if type(dims) is not int:
        raise Unlike
    return dims + 1 if dims >= 0 else dims


def _permuted(given: dict[str, Any], _: fx.Node, rank: int) -> dict[str, Any]:
    return {"dims": [0, *(d % rank + 1 for d in given["dims"])]}


def _sizes(name: str) -> _Shift:
    def shift(given: dict[str, Any], lifted: fx.Node, rank: int) -> dict[str, Any]:
        sizes = list(given[name])
        if len(sizes) < rank and name == "size" and "implicit" in given:
            raise Unlike  # expand adds axes in front
        return {name: [shape_of(lifted)[0], *sizes]}

    return shift


def _nothing(given: dict[str, Any], _: fx.Node, rank: int) -> dict[str, Any]:
    return {}


_DIM = _axis("dim")
_SHIFTS: Mapping[Any, _Shift] = {
    **dict.fromkeys(
        (
            aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
            aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim,
            aten.any.dim, aten.sum.dim_IntList, aten.mean.dim, aten.softmax.int, aten.cat.default,
            aten.glu.default, aten.amax.default,
        ),
        _DIM,
    ),
    aten.sym_size.int: _DIM,
    aten.transpose.int: _axis("dim0", "dim1"),
    aten.flatten.using_ints: _axis("start_dim", "end_dim"),
    aten.permute.default: _permuted,
    aten.view.default: _sizes("size"),
    aten.reshape.default: _sizes("shape"),
    aten.expand.default: _sizes("size"),
    aten.to.dtype: _nothing,
    aten.mT.default: _nothing,
    aten.rms_norm.default: _nothing,
    aten.layer_norm.default: _nothing,
}  # fmt: skip
