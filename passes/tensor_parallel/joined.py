"""Projections by parts of one parameter become one projection, whose results are taken apart.

Before                                          After
    w = chunk(W [3N, C], 3);  c = chunk(b, 3)       y = linear(x, W, b)
    q = linear(x, w[0], c[0])                       q = slice(y, -1, 0, N)
    k = linear(x, w[1], c[1])                       k = slice(y, -1, N, 2N)
    v = linear(x, w[2], c[2])                       v = slice(y, -1, 2N, 3N)

Parts are made by split, chunk, unbind, select and slice, of rows ``[R, C]`` or ``[3, N, C]``. How
the parameter is divided then follows from its one use, as of any fused projection. Left are the
gates of stacked experts, ``chunk(linear(x, W[e]), 2)``: each is divided by itself, where the rows
of the whole stack would be scattered.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.tensor_parallel.writing import write

__all__ = ["join_projections"]

aten = torch.ops.aten
_CUTS = {
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    aten.select.int, aten.slice.Tensor,
}  # fmt: skip
_VIEWS = {aten.view.default, aten.reshape.default, aten.unflatten.int}


@dataclass(frozen=True)
class _Part:
    """Rows ``[first, stop)`` of a parameter, of `size` over all of its leading dimensions."""

    parameter: fx.Node
    first: int
    stop: int
    size: int


@dataclass(frozen=True)
class _Projection:
    node: fx.Node
    weight: _Part
    bias: _Part | None

    @property
    def stacked(self) -> bool:
        return len(shape_of(self.weight.parameter)) > 2


def join_projections(gm: fx.GraphModule) -> None:
    """Rewrites the graph in place; what is not exactly so is left."""
    groups: dict[tuple[fx.Node, fx.Node], list[_Projection]] = {}
    for node in gm.graph.nodes:
        found = _projection(node) if node.target is aten.linear.default else None
        if found is not None:
            key = arguments(node)["input"], found.weight.parameter
            groups.setdefault(key, []).append(found)
    for group in groups.values():
        weights, biases = [p.weight for p in group], [p.bias for p in group]
        given = [b for b in biases if b is not None]
        if len(group) < 2 or any(p.stacked and _cut_again(p.node) for p in group):
            continue
        if _all_once(weights) and (not given or _same(weights, biases)):
            _join(gm.graph, group)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _cut_again(value: fx.Node) -> bool:
    return any(u.target in _CUTS or (u.target in _VIEWS and _cut_again(u)) for u in value.users)


def _projection(node: fx.Node) -> _Projection | None:
    found = arguments(node)
    weight = _part(found["weight"], columns=1)
    bias = None if found["bias"] is None else _part(found["bias"], columns=0)
    if weight is None or (found["bias"] is not None and bias is None):
        return None
    return _Projection(node, weight, bias)


def _part(value: fx.Node, columns: int) -> _Part | None:
    """Which rows of a parameter a value is; the last `columns` dimensions are no rows."""
    found = _rows(value, columns)
    if found is None:
        return None
    parameter, rows, size = found
    if rows.dim() != 1 or not rows.numel():
        return None
    first, stop = int(rows[0]), int(rows[-1]) + 1
    in_order = torch.equal(rows, torch.arange(first, stop))
    return _Part(parameter, first, stop, size) if in_order else None


def _rows(value: fx.Node, columns: int) -> tuple[fx.Node, Any, int] | None:
    """(the parameter, the numbers of those of its rows that are left, of how many)."""
    if value.op == "placeholder" and graph_input(value).kind is InputKind.PARAMETER:
        shape = shape_of(value)
        rows = torch.Size(shape[: len(shape) - columns])  # type: ignore[arg-type]
        return value, torch.arange(rows.numel()).reshape(rows), rows.numel()
    if value.target is not operator.getitem and value.target not in _CUTS:
        return None
    source, target = value.args[0], value.target
    found = _rows(source, columns) if isinstance(source, fx.Node) else None
    if found is None or len(value.all_input_nodes) > 1:
        return None
    parameter, rows, size = found
    if target is operator.getitem:
        return parameter, rows[value.args[1]], size
    args = arguments(value)
    dim = args["dim"] % (rows.dim() + columns)
    if dim >= rows.dim():
        return None
    cut: Any = target
    return parameter, cut(**{**args, "self": rows, "dim": dim}), size


def _all_once(parts: Sequence[_Part]) -> bool:
    """Whether the parts are all rows of the parameter, each once."""
    held = sorted((part.first, part.stop) for part in parts)
    stops = [0, *(stop for _, stop in held)]
    return [first for first, _ in held] == stops[:-1] and stops[-1] == parts[0].size


def _same(weights: Sequence[_Part], biases: Sequence[_Part | None]) -> bool:
    """Whether each bias is the part of one parameter that its weight is of another."""
    parameters = {None if b is None else b.parameter for b in biases}
    rows = [None if b is None else (b.first, b.stop, b.size) for b in biases]
    return len(parameters) == 1 and rows == [(w.first, w.stop, w.size) for w in weights]


def _join(graph: fx.Graph, group: Sequence[_Projection]) -> None:
    one = group[0]
    weight, bias = one.weight.parameter, None if one.bias is None else one.bias.parameter
    x, last = arguments(one.node)["input"], len(shape_of(one.node)) - 1

    def flat(parameter: fx.Node, shape: Sequence[Any]) -> fx.Node:
        if len(shape_of(parameter)) == len(shape):
            return parameter
        return write(graph, one.node, aten.reshape.default, parameter, shape)

    with graph.inserting_before(one.node):
        rows = flat(weight, [one.weight.size, shape_of(weight)[-1]])
        offset = None if bias is None else flat(bias, [one.weight.size])
        made = write(graph, one.node, aten.linear.default, x, rows, offset)
    for part in group:
        with graph.inserting_before(part.node):
            stop = part.weight.stop
            own = write(graph, part.node, aten.slice.Tensor, made, last, part.weight.first, stop, 1)
        part.node.replace_all_uses_with(own)
