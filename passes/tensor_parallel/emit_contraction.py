"""How a product of an activation and a weight is written for one rank's part.

Before                                  After, rank 0 of 2
    y = einsum("btd,edh->bteh", x, W)       y = einsum(.., copy_to(x), W[:, :, h of rank 0])
    z = einsum("bteh,ehd->bted", y, V)      z = reduce_from(einsum(.., y, V[:, h of rank 0]))
    u = expert_linear(x, W, experts)        u = expert_linear(copy_to(x), W[:, h ..], experts)
"""

from __future__ import annotations

from torch import fx

from fxport.passes.tensor_parallel.boxes import Box, Undividable
from fxport.passes.tensor_parallel.contraction import Contraction, contraction
from fxport.passes.tensor_parallel.emission import Emission

__all__ = ["emit_contraction"]


def emit_contraction(e: Emission, node: fx.Node) -> None:
    """Column-parallel if the result is divided, row-parallel if what is summed is."""
    found = contraction(node, e.labels.atoms)
    if found is None:
        atoms = [e.labels.atoms[i] for i in node.all_input_nodes if i in e.labels.atoms]
        raise Undividable(node, f"no rule for {node.target} on a divided value", atoms)
    inputs = [dict(zip(found.of_data, e.box(found.data, r), strict=True)) for r in _ranks(e)]
    results = [dict(zip(found.of_result, e.box(node, r), strict=True)) for r in _ranks(e)]
    summed = any(box[c] is not None for box in inputs for c in found.summed)

    def part(rank: int) -> Box:
        return tuple(
            inputs[rank][c] if c in found.summed else results[rank].get(c) for c in found.of_weight
        )

    kind = "row" if summed else "column"
    if summed:
        _require_sum(e, node, found)
    weight = e.static(found.weight, kind, e.all_boxes(part), local=True)
    data = e.env[found.data] if summed else _operand(e, node, found, inputs, results)
    new = {**_experts(e, node, found), found.data: data, found.weight: weight}
    value = e.call(node.target, *fx.map_arg(node.args, new.__getitem__))
    if summed:
        e.sum_of(node, value)
    else:
        e.env[node] = value
        e.local.add(node)


def _ranks(e: Emission) -> range:
    return range(e.world_size)


def _experts(e: Emission, node: fx.Node, found: Contraction) -> dict[fx.Node, fx.Node]:
    """What is no factor: which expert's weight each row takes, the same on every rank."""
    others = [n for n in node.all_input_nodes if n not in (found.data, found.weight)]
    if any(n in e.local for n in others):
        atoms = [e.labels.atoms[n] for n in others if n in e.labels.atoms]
        raise Undividable(node, "the choice of experts is divided", atoms)
    return {n: e.env[n] for n in others}


def _require_sum(e: Emission, node: fx.Node, found: Contraction) -> None:
    if not e.held_once(found.data):
        raise Undividable(
            node, "a sum over positions of several ranks", [e.labels.atoms[found.data]]
        )
    if not e.boxes.complete(e.labels.atoms[node]):
        raise Undividable(node, "divided on both sides", [e.labels.atoms[node]])


def _operand(
    e: Emission,
    node: fx.Node,
    found: Contraction,
    inputs: list[dict[str, tuple[int, ...] | None]],
    results: list[dict[str, tuple[int, ...] | None]],
) -> fx.Node:
    """The activation, with the rows and shared positions of this rank's result."""
    value = e.entering(found.data)
    for dim, letter in enumerate(found.of_data):
        if letter in found.summed:
            continue
        pairs = [(i[letter], r[letter]) for i, r in zip(inputs, results, strict=True)]
        differing = [after for before, after in pairs if before != after]
        if not differing:
            continue
        if found.data in e.local or None in differing:
            atoms = [e.labels.atoms[found.data], e.labels.atoms[node]]
            raise Undividable(node, "operands are divided differently", atoms)
        if results[e.rank][letter] is not None:
            value = e.take(value, dim, tuple(after for _, after in pairs))
    return value
