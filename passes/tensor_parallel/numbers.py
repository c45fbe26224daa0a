"""Checks that no rank computes with other numbers than the model, and holds others than it should.

Every op of a rank's graph says which op of the model it was written for (`OF`). It is that op with
the same numbers, or one of those that a mean or a norm over all ranks is made of:

    y = rms_norm(x [.., 64], w, eps)        s = reduce_from(sum(x * x) / 64);  rsqrt(s + eps)

Sizes and positions are not looked at: `checker` and `origins` do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxport.capture.arguments import arguments
from fxport.parallel.dropout import AttentionRate, KeyedDropout, StepSeed
from fxport.parallel.plan import Plan
from fxport.passes.tensor_parallel.boxes import select
from fxport.passes.tensor_parallel.factors import unit_shape, unit_value
from fxport.passes.tensor_parallel.ops import KINDS, Kind

__all__ = ["OF", "check_numbers", "check_values"]

aten = torch.ops.aten
OF = "of"  # of an emitted op: the name of the model's
_POSITIONS = {"head_offset", "padding_idx"}  # of this rank's heads and rows
_COMPUTING = {
    Kind.POINTWISE, Kind.LINEAR, Kind.NORM, Kind.MEAN, Kind.CAST, Kind.HALVES, Kind.ATTENTION,
}  # fmt: skip


def check_numbers(whole: fx.Graph, module: fx.GraphModule) -> list[str]:
    """Every number of one rank's graph that is not the unsharded graph's."""
    sources = {node.name: node for node in whole.nodes}
    calls = {
        n: module.get_submodule(str(n.target)) for n in module.graph.find_nodes(op="call_module")
    }
    errors = []
    for node in module.graph.nodes:
        source = sources.get(node.meta.get(OF, ""))
        if isinstance(calls.get(node), KeyedDropout):
            fine = source is not None and calls[node].p == arguments(source)["p"]
        elif node.op != "call_function" or KINDS.get(node.target) not in _COMPUTING:
            continue
        elif source is None:  # a place in the graph, which the seed of dropout depends on
            fine = isinstance(calls.get(node.args[0]), StepSeed)
        else:
            fine = _same(node, source, calls) or _written_for(node, source)
        if not fine:
            errors.append(f"{node.name} ({node.target}): other numbers than the model's")
    return errors


def check_values(
    whole: Mapping[str, Tensor], module: nn.Module, plan: Plan, rank: int
) -> list[str]:
    """Every parameter of one rank that is not the model's, where the plan says."""
    errors = []
    for shard in plan.parameters:
        wanted = select(whole[shard.name].detach(), shard.indices[rank])
        found = module.get_parameter(shard.name).detach()
        if not (found.is_meta or torch.equal(_bytes(wanted), _bytes(found))):
            errors.append(f"{shard.name}: other values than the model's")
    return errors


def _bytes(value: Tensor) -> Tensor:
    """Weights that are not filled in yet may be NaN."""
    return value.reshape(-1).view(torch.uint8)


def _same(node: fx.Node, source: fx.Node, calls: Mapping[fx.Node, nn.Module]) -> bool:
    if node.target is not source.target:
        return False
    one, other = ({k: _number(v, calls) for k, v in arguments(n).items()} for n in (node, source))
    return all(one[k] == other[k] for k in one.keys() - _POSITIONS)


def _number(value: Any, calls: Mapping[fx.Node, nn.Module]) -> str:
    """As text, where NaN is NaN; "" for what is computed, and for sizes."""
    if isinstance(value, fx.Node) and isinstance(calls.get(value), AttentionRate):
        return repr(calls[value].p)
    return "" if isinstance(value, fx.Node | list | tuple) else repr(value)


def _written_for(node: fx.Node, source: fx.Node) -> bool:
    """An op of another kind, for which there are no numbers but those of a mean."""
    given = [v for v in (*node.args, *node.kwargs.values()) if type(v) in (int, float)]
    kind = KINDS.get(source.target)
    if not given or kind is Kind.EMBEDDING:  # the rows of a look-up are the checker's
        return True
    if kind not in (Kind.NORM, Kind.MEAN) or len(given) > 1:
        return False
    found = arguments(source)
    if node.target is aten.div.Tensor:
        return bool(given[0] == _summands(source, found))
    if node.target is aten.add.Tensor and kind is Kind.NORM:
        eps, dtype = found["eps"], source.meta["val"].dtype
        return bool(given[0] == (torch.finfo(dtype).eps if eps is None else eps))
    return False


def _summands(source: fx.Node, found: dict[str, Any]) -> int:
    if "normalized_shape" in found:
        return math.prod(unit_value(n) for n in found["normalized_shape"])
    shape = unit_shape(found["self"])
    return math.prod(shape[dim] for dim in found["dim"])
