"""Ops that map summands to summands run before the reduction, so that sums are reduced once.

Before (two all-reduces)                After (one)
    a = reduce_from(linear(z, V))           p = linear(z, V)
    b = reduce_from(linear(u, W))           q = linear(u, W) * copy_to(g)
    y = x + a + b * g                       y = reduce_from(p + q) + x

Experts are weighted by their gates and added up, a low-rank adapter is added to its base, and
attention and MLP of a parallel block to each other, before anything is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.tensor_parallel.factors import unit_shape

if TYPE_CHECKING:
    from fxport.passes.tensor_parallel.emission import Emission

__all__ = ["Pending", "postpone"]

aten = torch.ops.aten
Shape = tuple[Any, ...]
_ZEROS = (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default)


@dataclass(frozen=True)
class Pending:
    """A value that is the sum of the ranks' `partial`, and `added` once.

    Attributes:
        shape: of `added`, which may have to be broadcast.
    """

    partial: fx.Node
    added: fx.Node | None = None
    shape: Shape = ()


def postpone(e: Emission, node: fx.Node) -> bool:
    """Writes the op for the summands of its pending operands; False if it needs their sum."""
    pending = [i for i in node.all_input_nodes if i in e.pending]
    # a sum that two ops want is reduced once, for both
    if not pending or any(len(i.users) > 1 for i in pending):
        return False
    rule = _RULES.get(node.target)
    if rule is None or not (_one_dtype(node) or _narrower(node) or _summed_next(node)):
        return False
    found = rule(e, node)
    if found is None:
        return False
    e.pending[node] = found
    return True


def _one_dtype(node: fx.Node) -> bool:
    values = [i.meta["val"] for i in node.all_input_nodes if _is_tensor(i)]
    kinds = {v.dtype for v in values if v.is_floating_point() or v.is_complex()}
    return len(kinds | {node.meta["val"].dtype}) == 1


def _narrower(node: fx.Node) -> bool:
    """The experts' sum in the dtype of the others; summands are rounded as a projection's are."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if node.target is not aten.to.dtype or source.target is not aten.sum.dim_IntList:
        return False
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    return bool(after.is_floating_point and after.itemsize < before.itemsize)


def _summed_next(node: fx.Node) -> bool:
    """Experts' results times gates of a wider dtype, which are added up before they are sent."""
    if node.target is not aten.mul.Tensor or not node.meta["val"].is_floating_point():
        return False
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target is aten.sum.dim_IntList:
            return _one_dtype(node)
        if _RULES.get(node.target) is not _move:
            return False
    return False


def _elements(value: fx.Node) -> int:
    return math.prod(unit_shape(value))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)


def _add(e: Emission, node: fx.Node) -> Pending | None:
    found = arguments(node)
    operands = [found["self"], found["other"]]
    if found["alpha"] == 1 and found["other"] == 0 and shape_of(operands[0]) == shape_of(node):
        return e.pending[operands[0]]  # a sum begun with Python's 0
    if found["alpha"] != 1 or not all(map(_is_tensor, operands)):
        return None
    partial: fx.Node | None = None
    added, shape = None, ()
    for value in operands:
        if value in e.pending:
            if shape_of(value) != shape_of(node):
                return None
        elif value in e.local:
            return None
    for value in operands:
        if value in e.pending:
            one = e.pending[value]
            partial = one.partial if partial is None else _sum(e, partial, one.partial)
            if one.added is None:
                continue
            other, its_shape = one.added, one.shape
        else:
            other, its_shape = _whole(e, value, local=False), shape_of(value)
        added, shape = (
            (other, its_shape)
            if added is None
            else (_sum(e, added, other), _broadcast(shape, its_shape))
        )
    assert partial is not None
    return Pending(partial, added, shape)


def _sum(e: Emission, one: fx.Node, other: fx.Node) -> fx.Node:
    return e.call(aten.add.Tensor, one, other)


def _broadcast(one: Shape, other: Shape) -> Shape:
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    offset = len(longer) - len(shorter)
    tail = (b if a == 1 else a for a, b in zip(longer[offset:], shorter, strict=True))
    return (*longer[:offset], *tail)


def _whole(e: Emission, value: fx.Node, local: bool) -> fx.Node:
    """A value that every rank has; in local work its gradient is summed."""
    if value in e.labels.atoms:
        return e.entering(value) if local else e.env[value]
    boxes = e.all_boxes(lambda _: (None,) * len(unit_shape(value)))
    return e.static(value, "replicated", boxes, local=local)


def _scale(e: Emission, node: fx.Node) -> Pending | None:
    found = arguments(node)
    value, factor = found["self"], found["other"]
    if value not in e.pending and node.target is aten.mul.Tensor:
        value, factor = factor, value
    if value not in e.pending or factor in e.pending or factor in e.local:
        return None
    if shape_of(value) != shape_of(node):
        return None
    one = e.pending[value]
    if not _is_tensor(factor):
        numbers = fx.map_arg(factor, e.env.__getitem__)
        added = None if one.added is None else e.call(node.target, one.added, numbers)
        return Pending(e.call(node.target, one.partial, numbers), added, one.shape)
    partial = e.call(node.target, one.partial, _whole(e, factor, local=True))
    if one.added is None:
        return Pending(partial)
    added = e.call(node.target, one.added, _whole(e, factor, local=False))
    return Pending(partial, added, _broadcast(one.shape, shape_of(factor)))


def _move(e: Emission, node: fx.Node) -> Pending | None:
    """Views, casts, and sums over one dimension."""
    found = arguments(node)
    source = found.pop("self")
    if source not in e.pending:
        return None
    one = e.pending[source]
    if one.added is not None and one.shape != shape_of(source):
        return None
    target: Any = node.target
    if target is aten.view.default:
        target, found = aten.reshape.default, {"shape": found["size"]}
    rest = {k: fx.map_arg(v, e.env.__getitem__) for k, v in found.items()}
    added = None if one.added is None else e.call(target, one.added, **rest)
    return Pending(e.call(target, one.partial, **rest), added, shape_of(node))


def _masked(e: Emission, node: fx.Node) -> Pending | None:
    """Zero where an expert has no business."""
    found = arguments(node)
    where = "condition" in found
    source, mask = found["self"], found["condition" if where else "mask"]
    filled = found["other" if where else "value"]
    if source not in e.pending or filled != 0 or shape_of(source) != shape_of(node):
        return None
    one, condition = e.pending[source], e.env[mask]

    def masked(value: fx.Node) -> fx.Node:
        args = {k: value if k == "self" else v for k, v in found.items()}
        return e.call(node.target, *(condition if v is mask else v for v in args.values()))

    added = None if one.added is None else masked(one.added)
    shape = () if added is None else _broadcast(one.shape, shape_of(mask))
    return Pending(masked(one.partial), added, shape)


def _index_add(e: Emission, node: fx.Node) -> Pending | None:
    """Results of an expert go back to its tokens, onto those of the experts before it."""
    found = arguments(node)
    base, source = found["self"], found["source"]
    first = base not in e.pending
    if found["alpha"] != 1 or source not in e.pending or (first and base.target not in _ZEROS):
        return None
    one = e.pending[source]
    rest = found["dim"], e.env[found["index"]]

    def onto(value: fx.Node | None, more: fx.Node) -> fx.Node:
        if value is None:
            value = e.call(aten.zeros_like.default, like)
        return e.call(aten.index_add.default, value, *rest, more)

    like = e.env[base] if first else e.pending[base].partial
    partial = onto(None if first else e.pending[base].partial, one.partial)
    added = None if first else e.pending[base].added
    if added is not None:
        added = e.call(aten.expand_as.default, added, partial)
    if one.added is not None:
        added = onto(added, e.call(aten.expand_as.default, one.added, one.partial))
    return Pending(partial, added, () if added is None else shape_of(node))


def _weighted(e: Emission, node: fx.Node) -> Pending | None:
    """Experts' results added up by a product with their gates: ``einsum("tac,ta->tc", y, w)``."""
    operands = sorted(node.all_input_nodes, key=lambda i: i not in e.pending)
    if len(operands) != 2 or operands[1] in e.pending or operands[1] in e.local:
        return None
    source, gates = operands
    if gates not in e.labels.atoms or _elements(node) >= _elements(source):
        return None
    one = e.pending[source]

    def product(value: fx.Node, local: bool) -> fx.Node:
        new = {source: value, gates: _whole(e, gates, local)}
        return e.call(node.target, *fx.map_arg(node.args, new.__getitem__))

    partial = product(one.partial, local=True)
    if one.added is None:
        return Pending(partial)
    added = e.call(aten.expand_as.default, one.added, one.partial)
    return Pending(partial, product(added, local=False), shape_of(node))


def _linear(e: Emission, node: fx.Node) -> Pending | None:
    """The second half of a low-rank adapter, if its result is added to one that is pending."""
    found = arguments(node)
    value, weight, bias = found["input"], found["weight"], found["bias"]
    whole = e.boxes.complete(e.labels.atoms[node])
    if value not in e.pending or weight in e.labels.atoms or not whole or not _joins(e, node):
        return None
    one = e.pending[value]
    partial = e.call(aten.linear.default, one.partial, _whole(e, weight, local=True))
    own_bias = None if bias is None else _whole(e, bias, local=False)
    if one.added is None:
        return Pending(partial, own_bias, shape_of(node)[-1:])
    added = e.call(aten.linear.default, one.added, _whole(e, weight, local=False), own_bias)
    return Pending(partial, added, (*one.shape[:-1], shape_of(node)[-1]))


def _joins(e: Emission, node: fx.Node) -> bool:
    """Whether the result, scaled or not, is added to a pending sum, and goes nowhere else."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target is aten.add.Tensor:
            return any(i in e.pending for i in user.all_input_nodes)
        if user.target not in (aten.mul.Tensor, aten.div.Tensor):
            return False
        node = user
    return False


_RULES: Mapping[Any, Callable[[Emission, fx.Node], Pending | None]] = {
    aten.add.Tensor: _add,
    aten.mul.Tensor: _scale,
    aten.div.Tensor: _scale,
    aten.linear.default: _linear,
    aten.einsum.default: _weighted,
    aten.matmul.default: _weighted,
    aten.bmm.default: _weighted,
    aten.where.ScalarOther: _masked,
    aten.masked_fill.Scalar: _masked,
    aten.index_add.default: _index_add,
    aten.sum.dim_IntList: _move,
    aten.view.default: _move,
    aten.reshape.default: _move,
    aten.view_as.default: _move,
    aten.transpose.int: _move,
    aten.permute.default: _move,
    aten.unsqueeze.default: _move,
    aten.squeeze.dim: _move,
    aten.to.dtype: _move,
}
