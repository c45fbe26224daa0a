"""A module for each head becomes one attention with many heads, which can be divided.

Before                                          After
    a0 = attention(Q0 x, K0 x, V0 x)  [B,1,T,D]     Q = cat([Q0, Q1]);  K = ..;  V = ..
    a1 = attention(Q1 x, K1 x, V1 x)                a = attention(Q x, K x, V x)  [B,2,T,D]
    y = cat([a0, a1], -1)                           y = the heads of a, side by side
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

__all__ = ["merge_heads"]

aten = torch.ops.aten
_ATTENTION = torch.ops.fxport.attention.default
_VIEWS = (aten.view.default, aten.reshape.default)
_OPERANDS = ("q", "k", "v")


@dataclass(frozen=True)
class _Head:
    attention: fx.Node
    projections: tuple[fx.Node, ...]  # of q, k and v


def merge_heads(gm: fx.GraphModule) -> None:
    """Rewrites the graph in place; what is not exactly so is left."""
    for node in list(gm.graph.nodes):
        if node.target is aten.cat.default or node.target is aten.stack.default:
            found = arguments(node)
            heads = [_head(part) for part in found["tensors"]]
            known = [h for h in heads if h is not None]
            if len(known) == len(heads) > 1 and _alike(known):
                _merge(gm.graph, node, known)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _head(value: Any) -> _Head | None:
    """``[B, T, D]`` of an attention with one head."""
    before = value.args[0] if value.target in _VIEWS else None
    if not isinstance(before, fx.Node) or before.target is not operator.getitem:
        return None
    attention, index = before.args
    if index != 0 or not isinstance(attention, fx.Node) or attention.target is not _ATTENTION:
        return None
    shape, inside = shape_of(value), shape_of(before)
    if len(shape) != 3 or inside[1] != 1 or shape != (inside[0], inside[2], inside[3]):
        return None
    found = arguments(attention)
    projections = tuple(p for p in (_projection(found[n]) for n in _OPERANDS) if p is not None)
    own = all(len(n.users) == 1 for n in (value, before, attention))
    return _Head(attention, projections) if own and len(projections) == 3 else None


def _projection(value: fx.Node) -> fx.Node | None:
    """``[B, 1, T, D]``, a view of a projection ``[B, T, D]`` by a parameter."""
    source = value.args[0] if value.target in _VIEWS else None
    if not isinstance(source, fx.Node) or source.target is not aten.linear.default:
        return None
    shape, inside = shape_of(value), shape_of(source)
    fits = len(inside) == 3 and shape == (inside[0], 1, inside[1], inside[2])
    found = arguments(source)
    static = all(v is None or _is_parameter(v) for v in (found["weight"], found["bias"]))
    return source if fits and static else None


def _is_parameter(value: fx.Node) -> bool:
    return value.op == "placeholder" and graph_input(value).kind is InputKind.PARAMETER


def _alike(heads: Sequence[_Head]) -> bool:
    """The same input, the same options, no tensor of its own but the projections."""
    options, inputs, sizes = [], set[fx.Node](), set[Any]()
    for head in heads:
        found = {k: v for k, v in arguments(head.attention).items() if k not in _OPERANDS}
        if any(isinstance(v, fx.Node) for v in found.values()) or found["dropout_p"] != 0:
            return False
        options.append(found)
        linears = [arguments(p) for p in head.projections]
        inputs.update(a["input"] for a in linears)
        sizes.add(tuple((shape_of(a["weight"]), a["bias"] is None) for a in linears))
    return all(o == options[0] for o in options) and len(inputs) == len(sizes) == 1


def _merge(graph: fx.Graph, joined: fx.Node, heads: Sequence[_Head]) -> None:
    found = arguments(joined)
    stacked = joined.target is aten.stack.default
    rank = len(shape_of(joined))
    if found["dim"] % rank != 2:  # beside each other: the last of three; heads before channels
        return
    origin = heads[0].attention
    x = arguments(heads[0].projections[0])["input"]

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return write(graph, origin, target, *args, **kwargs)

    def together(projections: Sequence[fx.Node]) -> fx.Node:
        linears = [arguments(p) for p in projections]
        weight = call(aten.cat.default, [a["weight"] for a in linears], 0)
        biases = [a["bias"] for a in linears]
        bias = None if biases[0] is None else call(aten.cat.default, biases, 0)
        made = call(aten.linear.default, x, weight, bias)
        width = shape_of(projections[0])[-1]
        views = call(aten.view.default, made, [batch, length, len(heads), width])
        return call(aten.transpose.int, views, 1, 2)

    with graph.inserting_before(joined):
        batch, length = (call(aten.sym_size.int, x, dim) for dim in (0, 1))
        parts = [together([h.projections[i] for h in heads]) for i in range(3)]
        options = {k: v for k, v in arguments(origin).items() if k not in _OPERANDS}
        attention = call(_ATTENTION, *parts, **options)
        result = call(operator.getitem, attention, 0)
        result = call(aten.transpose.int, result, 1, 2)
        if not stacked:
            result = call(aten.reshape.default, result, [batch, length, shape_of(joined)[-1]])
    joined.replace_all_uses_with(result)
