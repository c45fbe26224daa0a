"""Label, solve, emit, until every divided value meets only ops that have a rule for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from fxport.capture.arguments import arguments
from fxport.capture.export import Captured, capture
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.location import user_location
from fxport.errors import FxportError
from fxport.nested import attach
from fxport.parallel.context import ParallelContext
from fxport.parallel.plan import Plan, Replicated
from fxport.passes.attention.rewrite import rewrite_attention
from fxport.passes.empty_parts import drop_empty_parts
from fxport.passes.experts.products import multiply_by_expert
from fxport.passes.functional import functionalise
from fxport.passes.head import find_head
from fxport.passes.known_values import fold_known_values
from fxport.passes.lookups import look_up_first
from fxport.passes.table_lookups import look_up_in_tables
from fxport.passes.tensor_parallel.boxes import Undividable, select
from fxport.passes.tensor_parallel.dropout import key_dropout
from fxport.passes.tensor_parallel.emission import Emission, WholeParameter
from fxport.passes.tensor_parallel.emit import emit
from fxport.passes.tensor_parallel.enter_once import enter_once
from fxport.passes.tensor_parallel.factors import keep_beside_vocabulary, label, unit_shape
from fxport.passes.tensor_parallel.heads import merge_heads
from fxport.passes.tensor_parallel.joined import join_projections
from fxport.passes.tensor_parallel.products import multiply_activations_first
from fxport.passes.tensor_parallel.records import plan_of
from fxport.passes.tensor_parallel.solver import solve
from fxport.passes.tensor_parallel.spellings import one_spelling
from fxport.passes.tensor_parallel.vocabulary import divides
from fxport.report import Outcome

__all__ = ["Divided", "Prepared", "divide", "prepare", "rank_module"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Prepared:
    """A captured model after the attention rewrite, ready to be divided."""

    captured: Captured
    graph: fx.GraphModule
    vocabulary: tuple[fx.Node, ...]
    left: tuple[Replicated, ...]


@dataclass(frozen=True)
class Divided:
    """The graph of one rank, and the plan of all of them."""

    prepared: Prepared
    emission: Emission
    plan: Plan


def prepare(model: nn.Module, *, own_modes: bool = False) -> Prepared:
    """Captures a model in eval mode and rewrites its attention.

    Args:
        own_modes: in the modes that its modules are in, with their dropout.

    Raises:
        PortError: the model cannot be captured.
    """
    captured = capture(model, own_modes=own_modes)
    gm = captured.graph
    functionalise(gm)
    drop_empty_parts(gm)
    fold_known_values(gm)
    tokens = next(n for n in gm.graph.nodes if n.name == captured.tokens)
    look_up_in_tables(gm, tokens)
    look_up_first(gm, tokens)
    head = find_head(gm, captured.length)
    result = rewrite_attention(gm)
    one_spelling(gm)
    merge_heads(gm)
    join_projections(gm)
    multiply_activations_first(gm)
    multiply_by_expert(gm)
    left = tuple(
        Replicated(d.module or d.subject, f"attention left as it is: {d.reason.message}")
        for d in result.decisions
        if d.outcome is Outcome.LEFT and d.reason is not None
    )
    vocabulary = [n for n in gm.graph.nodes if _is_lookup(n, captured.tokens)]
    if head.projection.target is aten.linear.default and _is_parameter(head.projection):
        vocabulary.append(head.projection)
    return Prepared(captured, gm, tuple(vocabulary), left)


def _is_parameter(node: fx.Node) -> bool:
    weight = arguments(node)["weight"]
    return weight.op == "placeholder" and graph_input(weight).kind is InputKind.PARAMETER


def _is_lookup(node: fx.Node, tokens: str) -> bool:
    if node.target is not aten.embedding.default or not _is_parameter(node):
        return False
    found = arguments(node)
    plain = not found["scale_grad_by_freq"] and not found["sparse"]
    return plain and bool(found["indices"].name == tokens)


def divide(prepared: Prepared, context: ParallelContext) -> Divided:
    """Plans for ``context.world_size`` ranks and emits the graph of ``context.rank``.

    Raises:
        FxportError: nothing that was tried could be emitted.
    """
    labels = label(prepared.graph, context.world_size)
    vocabulary = tuple(
        n for n in prepared.vocabulary
        if divides(unit_shape(arguments(n)["weight"])[0], context.world_size)
    )  # fmt: skip
    keep_beside_vocabulary(labels, vocabulary)
    whole: frozenset[str] = frozenset()
    for _ in range(len(labels.leaves) + len(prepared.captured.parameters) + 1):
        solution = solve(labels, context.world_size)
        try:
            found = emit(
                prepared.graph, labels, solution, context, vocabulary, whole, postponing=True
            )
        except WholeParameter as conflict:
            whole |= {conflict.name}
            continue
        except Undividable as stop:
            where = user_location(stop.node)
            why = stop.why + (f" ({where})" if where else "")
            labels.full += [(atoms, stop.node, why) for atoms in stop.atoms]
            if not stop.atoms:
                raise FxportError(f"cannot be divided: {why}") from stop
            continue
        enter_once(found)
        key_dropout(found)
        shapes = {n: tuple(p.shape) for n, p in prepared.captured.parameters.items()}
        plan = plan_of(shapes, [(found, solution)], whole, prepared.left)
        plan = replace(plan, unseen=prepared.captured.unseen)
        return Divided(prepared, found, plan)
    raise FxportError("no division of this model can be emitted")


def rank_module(divided: Divided) -> fx.GraphModule:
    """The module of one rank: shards as parameters under the original qualified names."""
    prepared, emission = divided.prepared, divided.emission
    rank = emission.rank
    root = nn.Module()
    for shard in divided.plan.parameters:
        value = prepared.captured.parameters[shard.name]
        part = select(value.detach(), shard.indices[rank]).clone()
        attach(root, shard.name, nn.Parameter(part, value.requires_grad))
    for alias, first in prepared.captured.aliases.items():
        attach(root, alias, root.get_parameter(first))
    state = set(prepared.captured.state)
    for node in prepared.graph.graph.nodes:
        if node.op == "placeholder" and graph_input(node).kind is InputKind.BUFFER:
            found = graph_input(node)
            assert found.value is not None
            attach(root, found.name, found.value, persistent=found.name in state)
        elif node.op == "get_attr":
            attach(root, str(node.target), getattr(prepared.graph, str(node.target)))
    for key, module in emission.modules.items():
        root.add_module(key, module)
    gm = fx.GraphModule(root, emission.graph)
    _keep_all(gm, root)
    return gm


def _keep_all(gm: fx.GraphModule, root: nn.Module) -> None:
    """GraphModule copies only what the graph names; parameters it does not use stay too."""
    for name, child in root.named_children():
        gm.add_module(name, child)
    for name, parameter in root.named_parameters(recurse=False):
        gm.register_parameter(name, parameter)
    for name, buffer in root.named_buffers(recurse=False):
        gm.register_buffer(name, buffer, persistent=name in root.state_dict())
