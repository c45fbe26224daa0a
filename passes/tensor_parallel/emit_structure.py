"""How views, splits, slices and permutations are written for one rank's part.

Before                                  After, rank 0 of 2
    q = view(y [B, T, 96], B, T, 4, 24)     q = reshape(y [B, T, 48], B, T, 2, 24)

What one rank cannot do, no rank does: the op is checked with the sizes of every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from fxport.capture.arguments import arguments, shape_of, shape_of_tensor
from fxport.passes.tensor_parallel.boxes import Box, Undividable, select
from fxport.passes.tensor_parallel.emission import Emission
from fxport.passes.tensor_parallel.factors import unit_shape, unit_value
from fxport.passes.tensor_parallel.mixed import (
    LocalSize,
    is_mixed,
    keeps_order,
    local_size,
    size_expression,
)

__all__ = ["emit_structure"]

aten = torch.ops.aten
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


@dataclass(frozen=True)
class _Local:
    """An op as one rank has it.

    Attributes:
        args: nodes of the original graph, numbers, and `LocalSize`s.
        inputs: operands with labels.
        values: their atoms on this rank.
    """

    rank: int
    target: Any
    args: dict[str, Any]
    inputs: tuple[fx.Node, ...]
    values: dict[fx.Node, Tensor]


def emit_structure(e: Emission, node: fx.Node) -> None:
    """The same op with this rank's sizes; checked on the labels, position by position."""
    if node in e.labels.spread:
        _copies(e, node)
        return
    ranks = [_local(e, node, rank) for rank in range(e.world_size)]
    for local in ranks:
        _check_positions(e, node, local)
        mixed = any(map(is_mixed, (*local.inputs, node)))
        if mixed and not _order_kept(e, node, local):
            raise Undividable(node, "heads and batch share a dimension in another order",
                              [e.labels.atoms[i] for i in local.inputs])  # fmt: skip
    mine = ranks[e.rank]
    e.env[node] = e.call(mine.target, **_written(e, mine.args))
    e.local.add(node)


def _local(e: Emission, node: fx.Node, rank: int) -> _Local:
    atoms = e.labels.atoms[node]
    target, args = node.target, arguments(node)
    inputs = [i for i in node.all_input_nodes if i in e.labels.atoms]
    if target in (aten.view.default, aten.reshape.default, aten.expand.default):
        key = "shape" if "shape" in args else "size"
        args[key] = _sized(e, node, args[key], _shape(e.box(node, rank), tuple(atoms.shape)))
        if target is aten.view.default:
            target = aten.reshape.default
            args = {"self": args["self"], "shape": args[key]}
    elif target is aten.view_as.default:
        target, args = aten.reshape.default, _like(e, node, args, rank)
        inputs = [args["self"]]
    elif target is aten.unflatten.int:
        local = _shape(e.box(node, rank), tuple(atoms.shape))
        dim = args["dim"] % len(e.labels.atoms[args["self"]].shape)
        args["sizes"] = list(local[dim : dim + len(args["sizes"])])
    elif target in _SPLITS:
        dim = args["dim"]
        boxes = [e.boxes.of_ranks(node, part)[rank] for part in atoms]
        sizes = [_shape(b, tuple(p.shape))[dim] for b, p in zip(boxes, atoms, strict=True)]
        target = aten.split_with_sizes.default
        args = {"self": args["self"], "split_sizes": sizes, "dim": dim}
    elif target is aten.slice.Tensor:
        args = _sliced(e, node, args, rank)
    elif target is aten.cat.default:
        args["tensors"] = _nonempty(e, args["tensors"])
    values = {i: select(e.labels.atoms[i], e.box(i, rank)) for i in inputs}
    return _Local(rank, target, args, tuple(inputs), values)


def _shape(box: Box, full: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n if i is None else len(i) for i, n in zip(box, full, strict=True))


def _sized(e: Emission, node: fx.Node, sizes: Any, local: tuple[int, ...]) -> list[Any]:
    result: list[Any] = []
    for size, here, before in zip(sizes, local, unit_shape(node), strict=True):
        if isinstance(size, fx.Node):
            found = local_size(size, here, before)
            if found is None:
                raise Undividable(node, "a divided size is an expression", [e.labels.atoms[node]])
            result.append(found)
        else:
            result.append(size if size == -1 else here)
    return result


def _copies(e: Emission, node: fx.Node) -> None:
    """As many copies as this rank has heads."""
    source = arguments(node)["self"]
    atoms = e.labels.atoms[node]
    if source in e.local:
        raise Undividable(node, "a divided vector for all heads", [e.labels.atoms[source], atoms])
    if e.divided(node, -1):
        raise Undividable(node, "the vector's own positions are divided", [atoms])
    before, here = e.labels.atoms[source].shape, _shape(e.box(node), tuple(atoms.shape))
    sizes = [-1 if n == m else k for n, m, k in zip(before, atoms.shape, here, strict=True)]
    e.env[node] = e.call(aten.expand.default, e.entering(source), sizes)
    e.local.add(node)


def _like(e: Emission, node: fx.Node, args: dict[str, Any], rank: int) -> dict[str, Any]:
    """``x.view_as(y)``: y may be whole where x is divided, so only its other sizes are read."""
    box, other = e.box(node, rank), args["other"]
    theirs = e.box(other, rank) if other in e.labels.atoms else (None,) * len(box)
    shape: list[Any] = []
    for dim, (mine, their) in enumerate(zip(box, theirs, strict=True)):
        if mine is None and their is not None:
            raise Undividable(node, "a size of a divided value", [e.labels.atoms[other]])
        shape.append(_size_of(other, dim) if mine is None else len(mine))
    return {"self": args["self"], "shape": shape}


def _size_of(value: fx.Node, dim: int) -> LocalSize:
    here = unit_shape(value)[dim]

    def write(e: Emission) -> fx.Node:
        new = e.call(aten.sym_size.int, e.env[value], dim)
        new.meta["val"] = here
        return new

    return LocalSize(here, shape_of(value)[dim], write)


def _nonempty(e: Emission, parts: Sequence[fx.Node]) -> list[fx.Node]:
    """Without ``x[..., 64:]`` of 64 features: it has no position that says who holds its heads."""
    kept = [p for p in parts if p not in e.labels.atoms or e.labels.atoms[p].numel()]
    same = len({p.meta["val"].dtype for p in parts}) == 1
    return kept if kept and same else list(parts)


def _sliced(e: Emission, node: fx.Node, args: dict[str, Any], rank: int) -> dict[str, Any]:
    index = e.box(args["self"], rank)[args["dim"]]
    if index is None:
        return args
    size = e.labels.atoms[args["self"]].shape[args["dim"]]
    chosen = set(
        range(size)[slice(unit_value(args["start"]), unit_value(args["end"]), args["step"])]
    )
    here = [i for i, position in enumerate(index) if position in chosen]
    step = here[1] - here[0] if len(here) > 1 else 1
    if not here or here != list(range(here[0], here[-1] + 1, step)):
        raise Undividable(node, "a slice takes scattered positions", [e.labels.atoms[args["self"]]])
    return {**args, "start": here[0], "end": here[-1] + 1, "step": step}


def _written(e: Emission, args: dict[str, Any]) -> dict[str, Any]:
    def new(value: Any) -> Any:
        if isinstance(value, LocalSize):
            return value.write(e)
        if not isinstance(value, fx.Node):
            return value
        return e.entering(value) if value in e.labels.atoms else e.env[value]

    return {k: map_aggregate(v, new) for k, v in args.items()}


def _check_positions(e: Emission, node: fx.Node, local: _Local) -> None:
    atoms = e.labels.atoms[node]

    def number(value: Any) -> Any:
        if isinstance(value, LocalSize):
            return value.here
        if not isinstance(value, fx.Node):
            return value
        return local.values[value] if value in local.values else unit_value(value)

    where = [e.labels.atoms[i] for i in local.inputs]
    try:
        got = local.target(**{k: map_aggregate(v, number) for k, v in local.args.items()})
    except (RuntimeError, IndexError) as error:
        raise Undividable(node, f"not possible on a part: {error}", where) from error
    pairs = zip(got, atoms, strict=True) if isinstance(atoms, tuple) else [(got, atoms)]
    for found, wanted in pairs:
        if not wanted.numel() and not found.numel():
            continue
        box = e.boxes.of_ranks(node, wanted)[local.rank]
        if not torch.equal(found, select(wanted, box)):
            raise Undividable(node, "a part of the input gives another part of the output", where)


def _order_kept(e: Emission, node: fx.Node, local: _Local) -> bool:
    """Of the whole op, and of this rank's."""
    atoms, value = e.labels.atoms[node], node.meta["val"]
    parts, tensors = (atoms, value) if isinstance(atoms, tuple) else ((atoms,), (value,))
    of_parts = [shape_of_tensor(tensor) for tensor in tensors]
    boxes = [e.boxes.of_ranks(node, part)[local.rank] for part in parts]

    def size(value: Any) -> Any:
        if isinstance(value, LocalSize):
            return value.expression
        if not isinstance(value, fx.Node) or value in local.values:
            return value
        return size_expression(value)

    shapes: dict[fx.Node, Sequence[Any]] = {i: shape_of(i) for i in local.inputs}
    whole = {i: e.labels.atoms[i] for i in local.inputs}
    mine = [select(part, box) for part, box in zip(parts, boxes, strict=True)]
    named = {k: map_aggregate(v, size) for k, v in arguments(node).items()}
    if "size" in named and local.target is aten.reshape.default:  # a view
        named["shape"] = named.pop("size")
    here = {k: map_aggregate(v, size) for k, v in local.args.items()}
    return keeps_order(
        node.target if isinstance(atoms, tuple) else local.target,
        named, whole, shapes, list(zip(parts, of_parts, strict=True)),
    ) and keeps_order(
        local.target, here, local.values, shapes, list(zip(mine, of_parts, strict=True))
    )  # fmt: skip
