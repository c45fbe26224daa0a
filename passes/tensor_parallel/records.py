"""From emitted graphs to the plan: shards, collectives, and what is replicated and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from fxport.capture.arguments import arguments
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.location import module_of, user_location
from fxport.parallel.modules import CopyTo, Gather, SharedGradient
from fxport.parallel.plan import CollectiveRecord, ParameterShard, Plan, Replicated
from fxport.passes.graph_facts import reachable
from fxport.passes.tensor_parallel.contraction import letters
from fxport.passes.tensor_parallel.emission import Emission
from fxport.passes.tensor_parallel.factors import unit_shape
from fxport.passes.tensor_parallel.ops import KINDS, Kind
from fxport.passes.tensor_parallel.solver import Solution

__all__ = ["plan_of"]

_WEIGHTS = (Kind.LINEAR, Kind.EMBEDDING)


def plan_of(
    shapes: Mapping[str, tuple[int, ...]],
    parts: Sequence[tuple[Emission, Solution]],
    whole: frozenset[str],
    left: tuple[Replicated, ...],
) -> Plan:
    """The plan of a model whose graph was emitted in one or more parts.

    Args:
        shapes: of the full parameters.
        parts: of one model and one number of ranks; a parameter has the same boxes in all.
        whole: parameters that two uses want different parts of.
        left: what earlier passes already left to every rank.
    """
    world_size = parts[0][1].world_size
    emissions = [e for e, _ in parts]
    gradients = [_sharing(e) for e in emissions]
    shards = tuple(_shard(n, s, emissions, gradients, whole) for n, s in shapes.items())
    divided = {s.name for s in shards if s.kind != "replicated"}
    replicated = [
        Replicated(" ".join(sorted({module_of(n) or n.name for n in c.leaves})), c.kept)
        for emission, solution in parts
        for c in solution.components
        if c.kept and not set(c.leaves) <= set(emission.vocabulary)
        if _unknown_weights(c.leaves) or (c.weight and not _written_by_divided(c.leaves, divided))
    ]
    collectives = tuple(c for emission, _ in parts for c in _collectives(emission))
    return Plan(world_size, shards, collectives, (*left, *replicated))


def _unknown_weights(leaves: Sequence[fx.Node]) -> bool:
    """Whether parameters are whole because an op without a rule reads them."""
    return any(
        KINDS.get(leaf.target) is None and any(_made_of(i) for i in leaf.all_input_nodes)
        for leaf in leaves
    )


def _written_by_divided(leaves: Sequence[fx.Node], divided: set[str]) -> bool:
    """Whether it is only the sum of divided projections: the residual stream, as it should be."""
    names = []
    for leaf in leaves:
        kind = KINDS.get(leaf.target)
        weight = arguments(leaf).get("weight") if kind in _WEIGHTS else None
        if kind is Kind.CONTRACTION:
            found = letters(leaf)
            weight = next((n for n in found[0] if _made_of(n)), None) if found else None
        if weight is not None:
            names += _made_of(weight)
    return bool(names) and set(names) <= divided


def _made_of(value: fx.Node) -> list[str]:
    """The parameters that a weight is made of; none: it depends on something else, too."""
    ends = [n for n in reachable([value]) if not n.all_input_nodes]
    sources = [graph_input(n) for n in ends if n.op == "placeholder"]
    parameters = [s.name for s in sources if s.kind is InputKind.PARAMETER]
    return parameters if len(parameters) == len(ends) else []


def _shard(
    name: str,
    shape: tuple[int, ...],
    emissions: Sequence[Emission],
    gradients: Sequence[set[str]],
    whole: frozenset[str],
) -> ParameterShard:
    full = ((None,) * len(shape),) * emissions[0].world_size
    found = [e.shards[name] for e in emissions if name in e.shards]
    kind, boxes = found[0] if found else ("replicated", full)
    divided = any(index is not None for box in boxes for index in box)
    reason = "" if divided else "used by replicated work, or by all heads"
    if name in whole:
        reason = "two uses want different parts"
    shared = any(name in sharing for sharing in gradients)
    return ParameterShard(name, shape, kind if divided else "replicated", boxes, shared, reason)


def _sharing(emission: Emission) -> set[str]:
    """The parameters whose gradients some ranks share."""
    shared = [
        n.args[0]
        for n in emission.graph.find_nodes(op="call_module", sort=False)
        if isinstance(emission.modules[str(n.target)], SharedGradient)
    ]
    return {str(n.target) for n in shared if isinstance(n, fx.Node) and n.op == "get_attr"}


def _collectives(emission: Emission) -> list[CollectiveRecord]:
    records = []
    callers = {n.target: n for n in emission.graph.find_nodes(op="call_module", sort=False)}
    for key, origin in emission.calls:
        module = emission.modules[key]
        backward = isinstance(module, (CopyTo, SharedGradient))
        kind = "all_gather" if isinstance(module, Gather) else "all_reduce"
        source = callers[key].args[0]
        parameter = isinstance(source, fx.Node) and source.op == "get_attr"
        if backward and parameter:
            kind = "all_reduce of a parameter's gradient"
        shape = unit_shape(origin) if isinstance(origin.meta["val"], torch.Tensor) else (0,)
        if (
            backward
            and isinstance(source, fx.Node)
            and isinstance(source.meta.get("val"), torch.Tensor)
        ):
            shape = unit_shape(source)
        elements = int(torch.Size(shape).numel())
        value = origin.meta["val"]
        size = value.element_size() if isinstance(value, torch.Tensor) else 4
        records.append(
            CollectiveRecord(
                kind,
                "backward" if backward else "forward",
                elements,
                elements * size,
                module_of(origin),
                user_location(origin),
            )
        )
    return records
