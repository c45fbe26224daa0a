"""What is known of a bias that is computed from parameters, with data (products) or without.

How low it may be, by what it is computed from besides parameters:

table[index].masked_fill(mask, -inf)       -inf        table[index] - 1e9 * (1 - mask)    -1e9
table[index] + buffer[:T, :T]              the lowest in the buffer
table.relu().log()                         -inf        table[index]                          0
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from fxport.capture.arguments import arguments
from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.attention.made import filled_with
from fxport.passes.attention.products import as_product
from fxport.passes.attention.terms import LARGEST_FACTOR
from fxport.passes.attention.views import is_pointwise, moved_input, number, overload_packet
from fxport.passes.graph_facts import GraphFacts, Source, reachable, value_inputs
from fxport.passes.masks.values import constant_value

__all__ = ["is_learned_product", "lowest_of"]

aten = torch.ops.aten

_LOGARITHMS = {aten.log, aten.log2, aten.log10, aten.logit, aten.xlogy}
_MADE_OF = {aten.full, aten.full_like, aten.new_full, aten.scalar_tensor, aten.fill}


def lowest_of(bias: fx.Node) -> float:
    """What no entry is far below, if parameters are numbers as they usually are.

    Large numbers count as negative: they may be multiplied by what is.
    """
    found = [0.0]
    for node in reachable([bias], _floating_inputs):
        found += _numbers_in(node)
    return min(found)


def _floating_inputs(node: fx.Node) -> list[fx.Node]:
    """Not masks and indices: they choose, and are no part of the sum."""
    values = ((n, n.meta.get("val")) for n in value_inputs(node))
    return [n for n, v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _numbers_in(node: fx.Node) -> Iterator[float]:
    packet = overload_packet(node)
    if packet in _LOGARITHMS:
        yield -math.inf
    if is_pointwise(node) or packet in _MADE_OF:
        given = (number(a) for a in (*node.args, *node.kwargs.values()))
        yield from (-abs(a) for a in given if a is not None)
    if node.op == "get_attr" or _is_buffer(node):
        yield _smallest(node)


def _is_buffer(node: fx.Node) -> bool:
    return node.op == "placeholder" and graph_input(node).kind is InputKind.BUFFER


def _smallest(node: fx.Node) -> float:
    try:
        value = constant_value(node, {})
    except ValueError:
        return -math.inf
    return float(value.min()) if value.numel() else 0.0


_MOVES_VALUES = {
    aten.gather, aten.slice, aten.select, aten.index, aten.index_select, aten.narrow, aten.neg,
    aten.sum,
}  # fmt: skip


def is_learned_product(facts: GraphFacts, node: fx.Node | None) -> bool:
    """Whether a bias is made of products like q.k, of weights and data: relative positions.

    Or of squares of what is: -|q - k|^2 as 2 q.k - |q|^2 - |k|^2.
    """
    if node is None:
        return False
    packet, inputs = overload_packet(node), node.args
    if packet is aten.linear or as_product(node) is not None:
        return Source.DATA | Source.PARAMETER in facts.source(node)
    if packet is aten.cat:  # shifted by a column of zeros
        parts = arguments(node)["tensors"]
        return all(filled_with(n) == 0 or is_learned_product(facts, n) for n in parts)
    if packet in (aten.add, aten.sub) and not node.kwargs:
        return all(
            is_learned_product(facts, n) if isinstance(n, fx.Node) else number(n) == 0
            for n in inputs[:2]
        )
    if packet is aten.mul and inputs[0] is inputs[1]:
        moved: object = inputs[0]
    elif packet in (aten.mul, aten.div):
        factor = _fixed_number(facts, inputs[1])
        size = None if not factor else abs(factor if packet is aten.mul else 1 / factor)
        moved = None if size is None or size > LARGEST_FACTOR else inputs[0]
    elif packet is aten.pow:
        moved = inputs[0] if number(inputs[1]) == 2 else None
    else:
        moved = inputs[0] if packet in _MOVES_VALUES else moved_input(node)
    return isinstance(moved, fx.Node) and is_learned_product(facts, moved)


def _fixed_number(facts: GraphFacts, value: object) -> float | None:
    if not isinstance(value, fx.Node):
        return number(value)
    found = value.meta.get("val")
    if not isinstance(found, Tensor) or found.dim() or not facts.only_lifted(value):
        return None
    if facts.source(value) & ~Source.BUFFER:
        return None
    try:
        return float(constant_value(value, {}))
    except ValueError:  # a size enters it
        return None
