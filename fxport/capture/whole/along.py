"""From which axis of its operands each axis of a result comes, where its entries stay apart.

    gelu(x [B, T, C])                 axis 1 of the result: axis 1 of x
    linear(x [B, T, C], w)            axis 1: axis 1 of x, and all of w;  axis 2: not known
    matmul(a [B, H, T, D], b)         axis 2: axis 2 of a, and all of b
    view(x [B, T, C], [B, T, H, D])   axis 1: axis 1 of x

Entry i along the axis of the result is made of entry i of those axes, and of all of the others.
Of an operation that is not listed nothing is said.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of

__all__ = ["KEEPING", "SPLITS", "Along", "along", "draws", "rank_of"]

aten = torch.ops.aten

# By name of the argument: an axis, None for all of an operand, a list where it takes a list.
Along = dict[str, Any]
_Rule = Callable[[fx.Node, int, dict[str, Any]], Along | None]
_RULES: dict[Any, _Rule] = {}
# Where the values stay what they are, entry by entry.
KEEPING = (aten.to, aten._to_copy, aten.contiguous, aten.clone, aten.alias, aten.dropout)
SPLITS = (aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split)
_SEVERAL = (*SPLITS, aten.unbind, aten.topk, aten.sort)


def along(node: fx.Node, dim: int) -> Along | None:
    """For axis `dim` (from 0) of a tensor of plain sizes; None where nothing is known."""
    if node.target is operator.getitem:
        return _one_of_several(node, dim)
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return None
    if draws(node):
        return None
    if not isinstance(node.meta["val"], torch.Tensor) and target.overloadpacket not in _SEVERAL:
        return None
    rule = _RULES.get(target.overloadpacket)
    if rule is None and torch.Tag.pointwise in target.tags:
        rule = _pointwise
    return rule(node, dim, arguments(node)) if rule is not None else None


def rank_of(node: fx.Node) -> int:
    return len(shape_of(node))


def draws(node: fx.Node) -> bool:
    """Whether random numbers are drawn; dropout in eval mode draws none."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = arguments(node)
    return given.get("train") is not False and given.get("dropout_p") != 0.0


def _rule(*packets: Any) -> Callable[[_Rule], _Rule]:
    def register(function: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(packets, function))
        return function

    return register


def _one_of_several(node: fx.Node, dim: int) -> Along | None:
    made = node.args[0]
    assert isinstance(made, fx.Node)
    packet = getattr(made.target, "overloadpacket", None)
    if packet in (*SPLITS, aten.topk, aten.sort):
        given = arguments(made)
        return None if given["dim"] % rank_of(given["self"]) == dim else {"0": dim}
    if packet is aten.unbind:
        given = arguments(made)
        gone = given["dim"] % rank_of(given["self"])
        return {"0": dim + (dim >= gone)}
    return None


# --- entry by entry -------------------------------------------------------------------------------


@_rule(aten.where, aten.masked_fill, aten.softplus, aten.hardswish, aten.rsub, aten.polar)
def _pointwise(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    return {k: _broadcast(node, dim, v) for k, v in given.items() if isinstance(v, fx.Node)}


def _broadcast(node: fx.Node, dim: int, operand: fx.Node) -> int | None:
    """The axis of an operand that meets axis `dim` of the result; None where it is repeated."""
    axis = dim - rank_of(node) + rank_of(operand)
    if axis < 0 or shape_of(operand)[axis] != shape_of(node)[dim]:
        return None
    return axis


@_rule(
    aten.contiguous, aten.clone, aten.alias, aten.detach, aten.to, aten._to_copy, aten.dropout,
    aten.lift_fresh_copy, aten.zeros_like, aten.ones_like, aten.full_like, aten.type_as,
)  # fmt: skip
def _same(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    first = next(name for name, value in given.items() if isinstance(value, fx.Node))
    if any(isinstance(v, fx.Node) for k, v in given.items() if k not in (first, "other")):
        return None
    return {first: dim, **({"other": None} if isinstance(given.get("other"), fx.Node) else {})}


# --- over other axes ------------------------------------------------------------------------------


@_rule(
    aten.softmax, aten.log_softmax, aten.cumsum, aten.cumprod, aten.topk, aten.sort, aten.argsort,
)  # fmt: skip
def _over_one(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    return None if given["dim"] % rank_of(given["self"]) == dim else {"self": dim}


@_rule(
    aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.std, aten.argmax, aten.logsumexp,
    aten.linalg_vector_norm, aten.any, aten.all,
)  # fmt: skip
def _reduced(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    named = given.get("dim")
    if named is None or named == []:
        return None
    rank = rank_of(given["self"])
    gone = {d % rank for d in ([named] if isinstance(named, int) else named)}
    if given.get("keepdim", False):
        return None if dim in gone else {"self": dim}
    return {"self": [d for d in range(rank) if d not in gone][dim]}


@_rule(aten.layer_norm, aten.rms_norm)
def _normed(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    if dim >= rank_of(node) - len(given["normalized_shape"]):
        return None
    own = {name: None for name in ("weight", "bias") if isinstance(given.get(name), fx.Node)}
    return {"input": dim, **own}


# --- products -------------------------------------------------------------------------------------


@_rule(aten.linear)
def _linear(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    if dim == rank_of(node) - 1:
        return None
    bias = {"bias": None} if isinstance(given.get("bias"), fx.Node) else {}
    return {"input": dim, "weight": None, **bias}


@_rule(aten.matmul, aten.bmm, aten.mm)
def _matmul(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    names = [name for name, value in given.items() if isinstance(value, fx.Node)]
    left, right = (given[name] for name in names)
    if rank_of(left) < 2 or rank_of(right) < 2:
        return None
    back = rank_of(node) - dim
    if back == 1:
        return {names[0]: None, names[1]: rank_of(right) - 1}
    if back == 2:
        return {names[0]: rank_of(left) - 2, names[1]: None}
    return {name: _broadcast(node, dim, given[name]) for name in names}


@_rule(aten.scaled_dot_product_attention)
def _attention(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    """Rows of queries; nothing is said of what is causal by their number."""
    rank = rank_of(node)
    if dim != rank - 2 or given["is_causal"] or rank_of(given["query"]) != rank:
        return None
    mask = given["attn_mask"]
    masked = {"attn_mask": _broadcast(node, dim, mask)} if isinstance(mask, fx.Node) else {}
    return {"query": dim, "key": None, "value": None, **masked}


@_rule(aten.embedding)
def _embedding(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    return {"indices": dim, "weight": None} if dim < rank_of(node) - 1 else None


@_rule(aten.einsum)
def _einsum(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    if "." in given["equation"] or "->" not in given["equation"]:
        return None
    left, result = given["equation"].replace(" ", "").split("->")
    letter, terms = result[dim], left.split(",")
    if any(term.count(letter) > 1 for term in terms):
        return None
    return {"tensors": [term.index(letter) if letter in term else None for term in terms]}


# --- views and parts ------------------------------------------------------------------------------


@_rule(aten.transpose, aten.swapaxes)
def _transposed(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    values = [v for k, v in given.items() if k != "self"]
    one, other = (d % rank_of(node) for d in values)
    return {"self": {one: other, other: one}.get(dim, dim)}


@_rule(aten.mT, aten.t, aten.numpy_T)
def _turned(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    rank = rank_of(node)
    if node.target.overloadpacket is aten.mT:  # type: ignore[union-attr]
        return {"self": {rank - 1: rank - 2, rank - 2: rank - 1}.get(dim, dim)}
    return {"self": rank - 1 - dim}


@_rule(aten.permute)
def _permuted(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    return {"self": given["dims"][dim] % rank_of(node)}


@_rule(
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.unsqueeze,
    aten.squeeze,
)  # fmt: skip
def _regrouped(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    """An axis that is whole before and after has as many entries in front of it."""
    before, after = shape_of(given["self"]), shape_of(node)
    if after[dim] == 1:  # which one of several was meant?
        return None
    front = math.prod(after[:dim])
    axis = next(
        (
            a
            for a in range(len(before))
            if math.prod(before[:a]) == front and before[a] == after[dim]
        ),
        None,
    )
    return None if axis is None else {"self": axis}


@_rule(aten.expand, aten.expand_as, aten.broadcast_to)
def _expanded(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    return {"self": _broadcast(node, dim, given["self"])}


@_rule(aten.slice, aten.narrow, aten.glu)
def _cut(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    return None if given["dim"] % rank_of(node) == dim else {"self": dim}


@_rule(aten.select)
def _selected(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    gone = given["dim"] % rank_of(given["self"])
    return {"self": dim + (dim >= gone)}


@_rule(*SPLITS, aten.unbind)
def _split(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    """Of the whole list: the axis of its operand; see `_one_of_several`."""
    return None if given["dim"] % rank_of(given["self"]) == dim else {"self": dim}


@_rule(aten.cat, aten.concat)
def _joined(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    if given["dim"] % rank_of(node) == dim or len(set(map(rank_of, given["tensors"]))) > 1:
        return None
    return {"tensors": [dim] * len(given["tensors"])}


@_rule(aten.stack)
def _stacked(node: fx.Node, dim: int, given: dict[str, Any]) -> Along | None:
    made = given["dim"] % rank_of(node)
    if made == dim:
        return None
    return {"tensors": [dim - (dim > made)] * len(given["tensors"])}
