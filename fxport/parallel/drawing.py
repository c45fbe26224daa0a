"""A plan as a graph diff: the model's graph, and what the first rank runs in its place.

before                                  after
    linear(x, blocks.0.up.weight)           copy_to(x), linear(.., blocks.0.up.weight)
    linear(y, blocks.0.down.weight)         linear(..), reduce_from
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fxport.capture.inputs import graph_input
from fxport.capture.location import module_of, user_location
from fxport.diff.record import GraphDiff
from fxport.parallel.plan import ParameterShard, Plan
from fxport.passes.tensor_parallel.build import Divided
from fxport.report import Decision, Outcome

__all__ = ["drawn"]

_NAME = "tensor parallel"


def drawn(divided: Divided) -> GraphDiff:
    """The diff, with one decision for each parameter and each collective."""
    before = divided.prepared.graph.graph
    after, copies = _with_inputs(divided, before)
    output = next(n for n in before.nodes if n.op == "output")
    pairs = {output: next(n for n in after.nodes if n.op == "output")}
    taken: set[fx.Node] = set()
    for old, new in dict.items(divided.emission.env):
        if new in copies and new not in taken:
            pairs[old] = copies[new]
            taken.add(new)
    diff = GraphDiff.between(before, after, _NAME, pairs)
    diff.note(_decisions(divided.plan, before))
    return diff


def _with_inputs(divided: Divided, before: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """The rank's graph with parameters and buffers as inputs, as they are in the model's."""
    inputs = {graph_input(n).name: n for n in before.nodes if n.op == "placeholder"}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in divided.emission.graph.nodes:
        known = inputs.get(str(node.target)) if node.op == "get_attr" else None
        if known is None:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        else:
            copies[node] = graph.placeholder(known.name)
            copies[node].meta = dict(known.meta)
    return graph, copies


def _decisions(plan: Plan, before: fx.Graph) -> Iterator[Decision]:
    """Each at the line that uses the parameter, or that the collective serves."""
    inputs = {graph_input(n).name: n for n in before.nodes if n.op == "placeholder"}
    for shard in plan.parameters:
        user = next(iter(inputs[shard.name].users), None) if shard.name in inputs else None
        outcome = Outcome.PROVEN if shard.kind == "replicated" else Outcome.REWRITTEN
        module = "" if user is None else module_of(user)
        line = None if user is None else user_location(user)
        yield Decision(_NAME, outcome, shard.name, _in_words(shard), module, line)
    for record in plan.collectives:
        detail = f"{record.elements_per_token} elements, {record.bytes_per_token} bytes a token"
        yield Decision(
            _NAME,
            Outcome.REWRITTEN,
            f"{record.kind} {record.direction}",
            detail,
            record.module,
            record.location,
        )


def _in_words(shard: ParameterShard) -> str:
    full, here = (" x ".join(map(str, s)) for s in (shard.shape, shard.local_shape(0)))
    if shard.kind == "replicated":
        return f"whole, {full}: {shard.reason}" if shard.reason else f"whole, {full}"
    return f"{shard.kind}, {here} of {full}"
