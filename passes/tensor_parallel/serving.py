"""Divides the serving graph of a saved port over the ranks of an engine, when it is loaded.

Before (a part, all ranks)                 After (rank 0 of 2)
    y = linear(h, w0, w1)                      y = linear(h, w0[rows], w1[rows])
    a = fxport.attention(q, k, v)              a = fxport.attention(q, k, v)         its heads
    o = linear(a, w2, w3)                      o = reduce_from(linear(a, w2[:, columns])) + w3

What enters and leaves a part (embeddings, hidden states, logits) is the same on every rank.
Nothing here knows the engine: `fxport.backends.vllm` turns the result into its layers, tests run
it as it is. Serving has no backward, so that the collectives of gradients are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxport.capture.arguments import arguments
from fxport.capture.inputs import GraphInput, InputKind, graph_input
from fxport.errors import FxportError
from fxport.nested import attach
from fxport.parallel.context import ParallelContext
from fxport.parallel.modules import CopyTo, SharedGradient
from fxport.parallel.plan import Plan
from fxport.passes.tensor_parallel.boxes import Undividable
from fxport.passes.tensor_parallel.checker import check
from fxport.passes.tensor_parallel.emission import Emission, LocalHeads, WholeParameter
from fxport.passes.tensor_parallel.emit import emit
from fxport.passes.tensor_parallel.emit_rules import HEADS, LOOKUP
from fxport.passes.tensor_parallel.factors import (
    keep_beside_vocabulary,
    label,
    unit_shape,
)
from fxport.passes.tensor_parallel.labels import Labels
from fxport.passes.tensor_parallel.numbers import check_numbers
from fxport.passes.tensor_parallel.origins import check_origins
from fxport.passes.tensor_parallel.products import multiply_activations_first
from fxport.passes.tensor_parallel.records import plan_of
from fxport.passes.tensor_parallel.solver import solve
from fxport.passes.tensor_parallel.spellings import one_spelling
from fxport.passes.tensor_parallel.vocabulary import divides
from fxport.serving import AttentionLayer, Part, ServingGraph

__all__ = ["RankPart", "RankServing", "divide_serving", "whole_serving"]

aten = torch.ops.aten
_ATTENTION = torch.ops.fxport.attention.default
_POSITIONS = "positions"


@dataclass(frozen=True)
class RankPart:
    """One part of one rank.

    Attributes:
        part: as in the port, with ``call_module`` nodes for collectives.
        modules: the collectives by the name that the graph calls.
        lookups: a reduced vocabulary look-up -> (weight, token ids), all nodes of the graph.
        heads: an attention -> the heads that this rank computes.
    """

    part: Part
    modules: Mapping[str, nn.Module]
    lookups: Mapping[fx.Node, tuple[fx.Node, fx.Node]]
    heads: Mapping[fx.Node, LocalHeads]


@dataclass(frozen=True)
class RankServing:
    """The parts of one rank, and the plan of all; `plan` is None when there is one rank."""

    serving: ServingGraph
    context: ParallelContext
    embed: RankPart
    body: RankPart
    head: RankPart
    plan: Plan | None


def whole_serving(serving: ServingGraph) -> RankServing:
    """The port as it is, for one rank."""

    def rank_part(part: Part) -> RankPart:
        calls = [n for n in part.graph.nodes if n.target is _ATTENTION]
        heads = {n: _all_heads(layer) for n, layer in zip(calls, serving.attention, strict=False)}
        return RankPart(part, {}, {}, heads)

    embed, body, head = map(rank_part, (serving.embed, serving.body, serving.head))
    return RankServing(serving, ParallelContext(0, 1), embed, body, head, None)


def _all_heads(layer: AttentionLayer) -> LocalHeads:
    return LocalHeads(tuple(range(layer.num_heads)), layer.num_kv_heads)


def divide_serving(
    serving: ServingGraph, context: ParallelContext, device: torch.device
) -> RankServing:
    """The parts of ``context.rank``, planned in the same way on every rank.

    Args:
        serving: from `fxport.saved.read_serving`; its graphs are not changed.
        device: where the graphs' own tensors are made.

    Raises:
        FxportError: no division was found, or the independent check found it wrong.
    """
    sources: list[_Source] = []
    for part in (serving.embed, serving.body, serving.head):
        before = sources[-1].dtype if sources else serving.dtype
        sources.append(_Source(serving, part, context.world_size, device, before))
    whole: frozenset[str] = frozenset()
    for _ in range(sum(len(s.labels.leaves) for s in sources) + len(serving.parameters) + 1):
        try:
            emissions = [source.emit(context, whole) for source in sources]
            _agree(emissions)
        except WholeParameter as conflict:
            whole |= {conflict.name}
            continue
        solved = [(e, e.boxes.solution) for e in emissions]
        plan = plan_of(serving.parameters, solved, whole, ())
        for source, emission in zip(sources, emissions, strict=True):
            _prove(serving, source.gm.graph, emission, plan)
        embed, body, head = (
            _without_backward(source.part, emission, serving)
            for source, emission in zip(sources, emissions, strict=True)
        )
        return RankServing(serving, context, embed, body, head, plan)
    raise FxportError("no division of this port can be emitted")


def _agree(emissions: list[Emission]) -> None:
    """A parameter of several parts is cut alike in all of them."""
    found: dict[str, object] = {}
    for emission in emissions:
        for name, (_, boxes) in emission.shards.items():
            if found.setdefault(name, boxes) != boxes:
                raise WholeParameter(name)


class _Source:
    """A part with shapes for one token, and its labels.

    Args:
        state: dtype of the embeddings or the hidden state that the part takes.
    """

    def __init__(
        self,
        serving: ServingGraph,
        part: Part,
        world_size: int,
        device: torch.device,
        state: torch.dtype,
    ) -> None:
        self.part = part
        self.gm = _with_values(serving, part, device, state)
        self.labels: Labels = label(
            self.gm, world_size, without_tokens=frozenset({_POSITIONS}), equal_heads=True
        )
        self.vocabulary = tuple(
            n for n in self.gm.graph.nodes if _is_vocabulary(n, part, serving, world_size)
        )
        keep_beside_vocabulary(self.labels, self.vocabulary)

    @property
    def dtype(self) -> torch.dtype:
        """Of what the part gives."""
        (output,) = self.gm.graph.find_nodes(op="output")
        found: torch.dtype = output.args[0].meta["val"].dtype
        return found

    def emit(self, context: ParallelContext, whole: frozenset[str]) -> Emission:
        while True:
            solution = solve(self.labels, context.world_size)
            try:
                return emit(
                    self.gm, self.labels, solution, context, self.vocabulary, whole,
                    postponing=False,
                )  # fmt: skip
            except Undividable as stop:
                if not stop.atoms:
                    raise FxportError(f"cannot be divided: {stop.why}") from stop
                self.labels.full += [(atoms, stop.node, stop.why) for atoms in stop.atoms]


def _is_vocabulary(node: fx.Node, part: Part, serving: ServingGraph, world_size: int) -> bool:
    if node.target is aten.embedding.default:
        found = arguments(node)
        if found["indices"].name != "input_ids" or found["padding_idx"] >= 0:
            return False
    elif node.target is aten.linear.default and part is serving.head:
        if unit_shape(node)[-1] != serving.vocab_size:
            return False
    else:
        return False
    weight = arguments(node)["weight"]
    parameter = weight.op == "placeholder" and graph_input(weight).kind is InputKind.PARAMETER
    return parameter and divides(unit_shape(weight)[0], world_size)


def _with_values(
    serving: ServingGraph, part: Part, device: torch.device, state: torch.dtype
) -> fx.GraphModule:
    """A copy of the part whose nodes know their shape for one token."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(part.graph, copied)
    graph.output(output)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder":
                node.meta["input"] = _input(serving, part, node.name)
                node.meta["val"] = _value(serving, graph_input(node), device, state)
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)
    for node in list(graph.nodes):
        _fold_number(graph, node)
    gm = fx.GraphModule(nn.Module(), graph)
    one_spelling(gm)
    multiply_activations_first(gm)
    return gm


def _fold_number(graph: fx.Graph, node: fx.Node) -> None:
    """``1 * heads``, where 1 was the batch size, is a number like any other."""
    value = node.meta.get("val")
    if node.op != "call_function" or node.all_input_nodes or not isinstance(value, int):
        return
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: value if n is node else n)
    graph.erase_node(node)


def _input(serving: ServingGraph, part: Part, name: str) -> GraphInput:
    if name not in part.weights:
        return GraphInput(InputKind.DATA, name)
    found = part.weights[name]
    parameter = found in serving.parameters
    return GraphInput(InputKind.PARAMETER if parameter else InputKind.BUFFER, found)


def _value(
    serving: ServingGraph, given: GraphInput, device: torch.device, state: torch.dtype
) -> Tensor:
    if given.kind is InputKind.PARAMETER:
        dtype = serving.dtype_of(given.name)
        return torch.empty(serving.parameters[given.name], dtype=dtype, device=device)
    if given.kind is InputKind.BUFFER:
        spec = serving.constants[given.name]
        return torch.empty(spec.shape, dtype=spec.dtype, device=device)
    if given.name == _POSITIONS:
        return torch.empty(1, dtype=torch.int64, device=device)
    if given.name == "input_ids":
        return torch.empty(1, 1, dtype=torch.int64, device=device)
    return torch.empty(1, 1, serving.hidden_size, dtype=state, device=device)


def _prove(serving: ServingGraph, whole: fx.Graph, emission: Emission, plan: Plan) -> None:
    """Runs the independent checks on the graph as it would be trained.

    Raises:
        FxportError: with everything that is wrong.
    """
    root = nn.Module()
    for shard in plan.parameters:
        dtype = serving.dtype_of(shard.name)
        local = torch.empty(shard.local_shape(emission.rank), device="meta", dtype=dtype)
        attach(root, shard.name, nn.Parameter(local, requires_grad=False))
    for name, spec in serving.constants.items():
        attach(root, name, spec.to("meta"), persistent=True)
    for key, module in emission.modules.items():
        root.add_module(key, module)
    gm = fx.GraphModule(root, emission.graph)
    for shard in plan.parameters:  # GraphModule keeps only what the graph names
        attach(gm, shard.name, root.get_parameter(shard.name))
    found = check(gm, plan, emission.rank)
    found += check_origins(whole, gm, plan, emission.rank)
    found += check_numbers(whole, gm)
    if found:
        raise FxportError("the division of this port is wrong:\n" + "\n".join(found))


def _without_backward(part: Part, emission: Emission, serving: ServingGraph) -> RankPart:
    """A part again: weights as placeholders, no collective that only gradients need."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    weights: dict[str, str] = {}
    by_name = {name: key for key, name in part.weights.items()}
    for node in emission.graph.nodes:
        if node.op == "placeholder":
            copied[node] = graph.node_copy(node)
        elif node.op == "get_attr":
            copied[node] = graph.placeholder(by_name[str(node.target)])
            weights[copied[node].name] = str(node.target)
    lookups: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    heads: dict[fx.Node, LocalHeads] = {}
    modules: dict[str, nn.Module] = {}
    for node in emission.graph.nodes:
        if node in copied:
            continue
        if node.op == "call_module":
            module = emission.modules[str(node.target)]
            if isinstance(module, CopyTo | SharedGradient):
                copied[node] = copied[node.all_input_nodes[0]]
                continue
            modules[str(node.target)] = module
        copied[node] = graph.node_copy(node, copied.__getitem__)
        if LOOKUP in node.meta:
            weight, tokens = node.meta[LOOKUP]
            lookups[copied[node]] = copied[weight], copied[tokens]
        if node.target is _ATTENTION:
            layer = serving.attention[len(heads)]
            heads[copied[node]] = node.meta.get(HEADS, _all_heads(layer))
    return RankPart(Part(graph, part.inputs, weights), modules, lookups, heads)
