"""Products of several activations and a weight, one step at a time.

Before                                        After
    y = einsum("bteh,ehd,bte->btd", x, W, g)      p = x * unsqueeze(g, 3)
                                                  y = einsum("bteh,ehd->btd", p, W)

The activations come first, so that what is left is one projection, which can be divided.
"""

from __future__ import annotations

import torch
from torch import fx

from fxport.capture.arguments import arguments
from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.tensor_parallel.writing import write

__all__ = ["multiply_activations_first"]

aten = torch.ops.aten


def multiply_activations_first(gm: fx.GraphModule) -> None:
    """Rewrites every einsum of two or more activations and one weight, in place."""
    activations: set[fx.Node] = set()
    for node in list(gm.graph.nodes):
        given = node.op == "placeholder" and graph_input(node).kind is InputKind.DATA
        if given or any(i in activations for i in node.all_input_nodes):
            activations.add(node)
        if node.target is aten.einsum.default:
            _rewrite(gm.graph, node, activations)
    gm.recompile()


def _rewrite(graph: fx.Graph, node: fx.Node, activations: set[fx.Node]) -> None:
    found = arguments(node)
    operands, equation = found["tensors"], found["equation"].replace(" ", "")
    weights = [i for i, n in enumerate(operands) if n not in activations]
    if len(operands) < 3 or len(weights) != 1 or "->" not in equation or "." in equation:
        return
    inputs, result = equation.split("->")
    letters = inputs.split(",")
    if any(len(set(part)) != len(part) for part in letters):
        return
    weight, of_weight = operands[weights[0]], letters[weights[0]]
    data = [(n, part) for n, part in zip(operands, letters, strict=True) if n is not weight]
    merged = "".join(dict.fromkeys("".join(part for _, part in data)))
    with graph.inserting_before(node):
        product = _aligned(graph, node, *data[0], merged)
        for value, part in data[1:]:
            aligned = _aligned(graph, node, value, part, merged)
            product = write(graph, node, aten.mul.Tensor, product, aligned)
    activations.add(product)
    node.args = (f"{merged},{of_weight}->{result}", [product, weight])
    node.kwargs = {}


def _aligned(graph: fx.Graph, origin: fx.Node, value: fx.Node, part: str, merged: str) -> fx.Node:
    """The operand with one dimension for every letter of `merged`, of size 1 where it has none."""
    order = [part.index(c) for c in merged if c in part]
    if order != sorted(order):
        value = write(graph, origin, aten.permute.default, value, order)
    for dim, letter in enumerate(merged):
        if letter not in part:
            value = write(graph, origin, aten.unsqueeze.default, value, dim)
    return value
