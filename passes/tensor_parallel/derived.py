"""What is made of parameters, made of this rank's parts of them.

Before                              After, rank 0 of 2
    w = select(W [E, C, H], 0, e)       w = select(W[:, :, columns], 0, e)
    w = cat([W0, W1, W2, W3])           w = cat([W0, W1, W2[no row], W3[no row]])
    w = stack([W0, W1]) [E, H, C]       w = stack([W0[rows], W1[rows]])
    s = exp(t [H])                      s = exp(t[heads])

Only ops that move whole dimensions, or work on each position by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxport.capture.arguments import arguments
from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.tensor_parallel.boxes import Box, select
from fxport.passes.tensor_parallel.factors import unit_shape
from fxport.passes.tensor_parallel.numbers import OF
from fxport.passes.tensor_parallel.ops import KINDS, Kind
from fxport.passes.tensor_parallel.parts import WHOLE

if TYPE_CHECKING:
    from fxport.passes.tensor_parallel.emission import Emission

__all__ = ["derived"]

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
Boxes = tuple[Box, ...]  # of every rank
# (node, boxes wanted of its result) -> boxes of its operands; None: not of parts
Operands = Callable[[fx.Node, Boxes], dict[fx.Node, Boxes] | None]


def derived(e: Emission, node: fx.Node, kind: str, wanted: Boxes) -> fx.Node | None:
    """The value of a node without tokens, of this rank's parts of the parameters it is made of.

    None: some op needs more than parts. Nothing has been written then.
    """
    if not any(index is not None for box in wanted for index in box):
        return None
    return _write(e, node, kind, wanted) if _possible(e, node, wanted) else None


def _possible(e: Emission, node: fx.Node, wanted: Boxes) -> bool:
    if node.op == "placeholder":
        found = graph_input(node)
        return found.kind is not InputKind.PARAMETER or found.name not in e.whole
    if node.op != "call_function":
        return False
    if not e.is_learned(node):
        return True
    operands = _operands(node, wanted)
    return operands is not None and all(_possible(e, i, b) for i, b in operands.items())


def _write(e: Emission, node: fx.Node, kind: str, wanted: Boxes) -> fx.Node:
    if node.op == "placeholder" or not e.is_learned(node):
        return e.static(node, kind, wanted, local=True)
    operands = _operands(node, wanted)
    assert operands is not None
    new = {i: _write(e, i, kind, boxes) for i, boxes in operands.items()}
    if node.target in _VIEWS:
        sizes = [n if i is None else len(i) for n, i in zip(unit_shape(node), wanted[e.rank],
                 strict=True)]  # fmt: skip
        view = e.call(aten.reshape.default, *new.values(), sizes)
        view.meta[WHOLE] = unit_shape(node)
        return view
    args = fx.map_arg(node.args, lambda n: new.get(n, n))
    kwargs = fx.map_arg(node.kwargs, lambda n: new.get(n, n))
    made = e.call(node.target, *args, **kwargs)
    made.meta[OF] = node.name
    return made


def _operands(node: fx.Node, wanted: Boxes) -> dict[fx.Node, Boxes] | None:
    if node.target is aten.zeros_like.default:  # of the keys' bias, between those of q and v
        return _pointwise(node, wanted)
    if KINDS.get(node.target) is Kind.POINTWISE and node.target is not aten.dropout.default:
        return _pointwise(node, wanted)
    rule = _RULES.get(node.target)
    return None if rule is None else rule(node, wanted)


def _pointwise(node: fx.Node, wanted: Boxes) -> dict[fx.Node, Boxes] | None:
    found = {}
    for value in node.all_input_nodes:
        if not isinstance(value.meta.get("val"), Tensor):
            return None
        shape = unit_shape(value)
        offset = len(wanted[0]) - len(shape)
        found[value] = tuple(
            tuple(None if n == 1 else box[d + offset] for d, n in enumerate(shape))
            for box in wanted
        )
    return found


def _select(node: fx.Node, wanted: Boxes) -> dict[fx.Node, Boxes]:
    args = arguments(node)
    dim = args["dim"] % len(unit_shape(args["self"]))
    return {args["self"]: tuple((*box[:dim], None, *box[dim:]) for box in wanted)}


def _slice(node: fx.Node, wanted: Boxes) -> dict[fx.Node, Boxes] | None:
    args = arguments(node)
    if any(box[args["dim"]] is not None for box in wanted):
        return None
    return {args["self"]: wanted}


def _permuted(node: fx.Node, wanted: Boxes) -> dict[fx.Node, Boxes]:
    args = arguments(node)
    rank = len(wanted[0])
    places = _order(node, args, rank)
    boxes = []
    for box in wanted:
        before: list[Any] = [None] * rank
        for now, then in enumerate(places):
            before[then] = box[now]
        boxes.append(tuple(before))
    return {args["self"]: tuple(boxes)}


def _order(node: fx.Node, args: Mapping[str, Any], rank: int) -> list[int]:
    """Result dimension -> the operand's."""
    places = list(range(rank))
    if node.target is aten.permute.default:
        return [d % rank for d in args["dims"]]
    one, other = (args.get("dim0", -2), args.get("dim1", -1)) if rank > 1 else (0, 0)
    places[one], places[other] = places[other], places[one]
    return places


def _view(node: fx.Node, wanted: Boxes) -> dict[fx.Node, Boxes] | None:
    """Read off numbered positions: a rank's must be a rectangle of the operand, too."""
    source = arguments(node)["self"]
    if any(i is not source for i in node.all_input_nodes):  # sizes that depend on the tokens
        return None
    shape, size = list(unit_shape(source)), list(unit_shape(node))
    kept = 0  # dimensions at the end that are the same, and whole
    while shape and size and shape[-1] == size[-1]:
        if any(box[len(size) - 1] is not None for box in wanted):
            break
        shape.pop(), size.pop()
        kept += 1
    before = torch.arange(math.prod(shape)).reshape(shape)
    boxes = []
    for box in wanted:
        part = _rectangle(before, select(before.reshape(size), box[: len(size)]))
        if part is None:
            return None
        boxes.append((*part, *[None] * kept))
    return {source: tuple(boxes)}


def _rectangle(before: Tensor, places: Tensor) -> Box | None:
    """The positions of `before` that are `places`, in that order; None: no rectangle."""
    held, part = torch.isin(before, places), []
    for dim in range(before.dim()):
        others = [d for d in range(before.dim()) if d != dim]
        line = held.amax(others) if others else held
        whole = bool(line.all())
        part.append(None if whole else tuple(line.nonzero().reshape(-1).tolist()))
    mine = select(before, tuple(part)).reshape(-1)
    return tuple(part) if torch.equal(mine, places.reshape(-1)) else None


def _unsqueezed(node: fx.Node, wanted: Boxes) -> dict[fx.Node, Boxes]:
    args = arguments(node)
    dim = args["dim"] % len(wanted[0])
    return {args["self"]: tuple((*box[:dim], *box[dim + 1 :]) for box in wanted)}


def _cat(node: fx.Node, wanted: Boxes) -> dict[fx.Node, Boxes] | None:
    args = arguments(node)
    parts, dim = args["tensors"], args["dim"] % len(wanted[0])
    if len(set(parts)) != len(parts):
        return None
    found, first = {}, 0
    for part in parts:
        size = unit_shape(part)[dim]
        boxes = []
        for box in wanted:
            index = box[dim]
            if index is not None:
                index = tuple(i - first for i in index if first <= i < first + size)
            boxes.append((*box[:dim], None if index and len(index) == size else index,
                          *box[dim + 1 :]))  # fmt: skip
        found[part] = tuple(boxes)
        first += size
    return found


def _stack(node: fx.Node, wanted: Boxes) -> dict[fx.Node, Boxes] | None:
    args = arguments(node)
    parts, dim = args["tensors"], args["dim"] % len(wanted[0])
    if len(set(parts)) != len(parts) or any(box[dim] is not None for box in wanted):
        return None
    boxes = tuple((*box[:dim], *box[dim + 1 :]) for box in wanted)
    return dict.fromkeys(parts, boxes)


_RULES: Mapping[Any, Operands] = {
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.t.default: _permuted,
    aten.mT.default: _permuted,
    aten.numpy_T.default: _permuted,
    aten.transpose.int: _permuted,
    aten.permute.default: _permuted,
    aten.unsqueeze.default: _unsqueezed,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    **dict.fromkeys(_VIEWS, _view),
}
