"""Slots of tokens that are numbered through: the token and its slot, apart.

Before (K slots of each of N tokens)            After
    row, slot = where(mask [N, K])
    number = row * K + slot
    index(x [N * K, C], [number])                   index(view(x, [N, K, C]), [row, slot])
    index_add(y [N * K, C], 0, number, z)           view(index_put(view(y, [N, K, C]),
                                                        [row, slot], z, True), [N * K, C])

Only where K is how many slots the mask has: another factor numbers something else.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.frames import ADDS, Builder

__all__ = ["slots_apart"]

aten = torch.ops.aten

_TAKES = (aten.index.Tensor, aten.index_select.default)
_PUTS = (aten.index_put.default, aten.index_add.default, aten.index_copy.default)

# The mask, and which of its axes each of the two numbers counts.
_Pair = tuple[fx.Node, fx.Node]


def slots_apart(gm: fx.GraphModule) -> None:
    """Rewrites the graph in place."""
    numbers: dict[fx.Node, _Pair] = {}
    build = Builder(gm.graph)
    for node in list(gm.graph.nodes):
        if node.target is aten.add.Tensor and (pair := _numbered(node)) is not None:
            numbers[node] = pair
        elif numbers and node.target in (*_TAKES, *_PUTS):
            _apart(build, node, numbers)
    if numbers:
        gm.graph.eliminate_dead_code()


def _numbered(node: fx.Node) -> _Pair | None:
    """``row * K + slot`` of the elements where a mask holds."""
    given = arguments(node)
    for product, slot in ((given["self"], given["other"]), (given["other"], given["self"])):
        scaled = isinstance(product, fx.Node) and product.target is aten.mul.Tensor
        if given["alpha"] != 1 or not scaled:
            continue
        row, factor = arguments(product)["self"], arguments(product)["other"]
        one, other = _found(row), _found(slot)
        if one is None or other is None or one[0] is not other[0] or type(factor) is not int:
            continue
        sizes = shape_of(arguments(one[0])["condition"])
        if len(sizes) == 2 and {one[1], other[1]} == {0, 1} and sizes[other[1]] == factor:
            return row, slot
    return None


def _found(node: Any) -> tuple[fx.Node, int] | None:
    """The ``where(mask)`` that an index tensor comes from, and which of them it is."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return None
    source, axis = node.args
    assert isinstance(source, fx.Node) and isinstance(axis, int)
    return (source, axis) if source.target is aten.where.default else None


def _apart(build: Builder, node: fx.Node, numbers: dict[fx.Node, _Pair]) -> None:
    given = arguments(node)
    value: fx.Node = given["self"]
    indices = given["indices"] if "indices" in given else [given["index"]]
    pair = numbers.get(indices[0]) if len(indices) == 1 and given.get("dim", 0) == 0 else None
    if pair is None or given.get("alpha", 1) != 1:
        return
    row, slot = pair
    mask = arguments(_where(row))["condition"]
    if not _fits(value, mask):
        return
    build.at = node
    sizes = [build.size(mask, _axis(n)) for n in pair]
    rest = build.sizes(value)[1:]
    by_slot = build.call(aten.reshape.default, value, [*sizes, *rest])
    if node.target in _TAKES:
        new = build.call(aten.index.Tensor, by_slot, [row, slot])
        new.meta["val"] = node.meta["val"]
    else:
        adds = bool(given.get("accumulate", node.target is aten.index_add.default))
        put = given["values"] if "values" in given else given["source"]
        new = build.call(aten.index_put.default, by_slot, [row, slot], put, adds)
        new = build.call(aten.reshape.default, new, build.sizes(value))
        new.meta[ADDS] = value, mask
    node.replace_all_uses_with(new)
    build.graph.erase_node(node)


def _where(found: fx.Node) -> fx.Node:
    source = found.args[0]
    assert isinstance(source, fx.Node)
    return source


def _axis(found: fx.Node) -> int:
    axis = found.args[1]
    assert isinstance(axis, int)
    return axis


def _fits(value: fx.Node, mask: fx.Node) -> bool:
    one, other = shape_of(mask)
    return bool(shape_of(value)[0] == one * other)
