"""A sink spelled as a factor of the result, brought into the softmax as a column.

Before                                          After
    p = softmax(s, -1)          [B, H, T, S]        c = cat([s, sink.expand(B, H, T, 1)], -1)
    o = p @ v                                       p = softmax(c, -1)[..., :-1]
    g = sigmoid(logsumexp(s, -1) - sink)            o = p @ v
    o * g[..., None]                                o

With Z the sum of exp(s), ``sigmoid(log Z - sink)`` is ``Z / (Z + exp(sink))``: what is left of the
weights when the sink has taken its share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind
from fxport.capture.memory import Memory
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.views import number, overload_packet
from fxport.passes.constants import depends_on, is_symbolic

__all__ = ["sinks_as_columns"]

aten = torch.ops.aten

_CASTS = (aten.to, aten._to_copy, aten.type_as, aten.dropout, aten.contiguous, aten.clone)
_SOFTMAXES = (aten.softmax, aten._softmax)


@dataclass(frozen=True)
class _Factor:
    """``result * sigmoid(logsumexp(scores) - sink)``, a factor for each row of the result."""

    node: fx.Node
    result: fx.Node
    softmax: fx.Node
    scores: fx.Node
    sink: fx.Node
    keeps: bool


def sinks_as_columns(gm: fx.GraphModule) -> int:
    """Rewrites the graph in place.

    Returns:
        How many attentions were respelled.
    """
    if not gm.graph.find_nodes(op="call_function", target=aten.sigmoid.default):
        return 0
    data, memory = depends_on(gm, InputKind.DATA), Memory(gm.graph)
    found = [f for n in gm.graph.nodes if (f := _factor(n)) is not None]
    found = [
        f
        for f in found
        if f.sink not in data and not any(map(memory.written_by, (f.scores, f.softmax, f.result)))
    ]
    for factor in found:
        _respell(gm, factor)
    if found:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return len(found)


def _factor(node: fx.Node) -> _Factor | None:
    if overload_packet(node) is not aten.mul:
        return None
    if len(node.all_input_nodes) < 2 or any(map(is_symbolic, node.all_input_nodes)):
        return None
    for result, gate in (node.args[:2], node.args[1::-1]):
        assert isinstance(result, fx.Node) and isinstance(gate, fx.Node)
        found = _of(node, result, gate)
        if found is not None:
            return found
    return None


def _of(node: fx.Node, result: fx.Node, gate: fx.Node) -> _Factor | None:
    if shape_of(gate) != (*shape_of(result)[:-1], 1):
        return None
    gate, added = _cast_of(gate), False
    if overload_packet(gate) is aten.unsqueeze:
        added = arguments(gate)["dim"] in (-1, len(shape_of(gate)) - 1)
        gate = _cast_of(arguments(gate)["self"])
    share = _argument(gate, aten.sigmoid)
    if share is None or overload_packet(share) is not aten.sub:
        return None
    given = arguments(share)
    total, sink = given["self"], given["other"]
    if number(given.get("alpha", 1)) != 1 or not isinstance(sink, fx.Node):
        return None
    if overload_packet(total) is not aten.logsumexp:
        return None
    summed = arguments(total)
    scores, keeps = summed["self"], bool(summed["keepdim"])
    last = len(shape_of(scores)) - 1
    softmax = _softmax_of(result)
    if keeps == added or [d % (last + 1) for d in summed["dim"]] != [last] or softmax is None:
        return None
    own = arguments(softmax)
    fits = own["self"] is scores and own["dim"] % (last + 1) == last and sink < softmax
    same = len(shape_of(sink)) == len(shape_of(total)) and shape_of(share) == shape_of(total)
    return _Factor(node, result, softmax, scores, sink, keeps) if fits and same else None


def _softmax_of(result: fx.Node) -> fx.Node | None:
    """The softmax whose weights, used for nothing else, make this product with values."""
    if overload_packet(result) is not aten.matmul or len(result.users) != 1:
        return None
    weights: fx.Node = arguments(result)["self"]
    while len(weights.users) == 1 and overload_packet(weights) in _CASTS:
        weights = arguments(weights)["self" if "self" in arguments(weights) else "input"]
    alone = len(weights.users) == 1
    return weights if alone and overload_packet(weights) in _SOFTMAXES else None


def _cast_of(node: fx.Node) -> fx.Node:
    while overload_packet(node) in _CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _argument(node: fx.Node, packet: object) -> fx.Node | None:
    if overload_packet(node) is not packet or not isinstance(node.args[0], fx.Node):
        return None
    return _cast_of(node.args[0])


def _respell(gm: fx.GraphModule, factor: _Factor) -> None:
    softmax, scores = factor.softmax, factor.scores
    emitter = Emitter(gm, softmax, [scores])
    column = factor.sink
    if not factor.keeps:
        column = emitter.call(aten.unsqueeze.default, column, -1)
    column = emitter.call(aten.expand.default, column, [*emitter.sizes(shape_of(scores)[:-1]), 1])
    dtype = scores.meta["val"].dtype
    if column.meta["val"].dtype != dtype:
        column = emitter.call(aten.to.dtype, column, dtype)
    joined = emitter.call(aten.cat.default, [scores, column], -1)
    args, kwargs = fx.node.map_arg(
        (softmax.args, dict(softmax.kwargs)), lambda n: joined if n is scores else n
    )
    target: Any = softmax.target
    weights = emitter.call(target, *args, **kwargs)
    weights = emitter.call(aten.slice.Tensor, weights, -1, 0, -1)
    softmax.replace_all_uses_with(weights)
    factor.node.replace_all_uses_with(factor.result)
