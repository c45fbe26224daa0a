"""Splits the proven graph into the three graphs that vLLM calls.

Before (one graph)                                 After
    tokens, positions, weights -> logits               embed: tokens -> embeddings
                                                       body:  embeddings, positions -> hidden
                                                       head:  hidden -> logits
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.location import user_location
from fxport.errors import PortError, Reason, ReasonCode
from fxport.ops.params import AttentionParams
from fxport.passes.attention.views import laid_out, overload_packet
from fxport.passes.axes import Axes, Axis, Dim
from fxport.passes.constants import evaluate, is_symbolic
from fxport.serving import AttentionLayer, Part

__all__ = [
    "Splitter",
    "attention_layers",
    "begins_with_rows",
    "ends_in_rows",
    "passes_on",
    "rows_of",
    "token_embedding",
]

aten = torch.ops.aten


_PASSING_ON = {
    aten.view, aten.reshape, aten.flatten, aten.to, aten._to_copy, aten.contiguous, aten.clone,
    aten.alias, aten.detach, aten.select, aten.slice, aten.unsqueeze, aten.squeeze,
    aten.unbind, aten.split, aten.chunk, aten.transpose, aten.t, aten.permute,
}  # fmt: skip


def token_embedding(tokens: fx.Node) -> fx.Node:
    """The first look-up of the token ids, or of what each id alone becomes, in a learned table.

    Raises:
        PortError: the ids are not looked up, so nothing can be said about a vocabulary.
    """
    same, edited = {tokens}, {tokens}  # what only passes the ids on; what is made of each id
    found: list[fx.Node] = []
    for node in tokens.graph.nodes:
        if node.target is aten.embedding.default and arguments(node)["indices"] in edited:
            found.append(node)
        elif passes_on(node, edited):
            edited.add(node)
            if node.all_input_nodes[0] in same and _shaped_like(node, tokens):
                same.add(node)
        elif _made_of_each(node, edited):
            edited.add(node)
    whole = [node for node in found if arguments(node)["indices"] in same]
    if found:
        return (whole or found)[0]
    raise PortError([_not_looked_up(tokens)])


def _not_looked_up(tokens: fx.Node) -> Reason:
    at = next((user for user in tokens.users if overload_packet(user) in _ADDING_TOKENS), None)
    code = ReasonCode.MIXES_TOKENS
    message = "tokens of the model's own are put before or behind the given ones"
    hint = "vLLM gives every token its own row: put them into the prompt instead"
    if at is None:
        at = next((user for user in tokens.users if not is_symbolic(user)), tokens)
        code = ReasonCode.NO_VOCABULARY
        message = "the token ids do not go into an embedding"
        hint = "look the token ids up with nn.Embedding or F.embedding"
    return Reason(code, message, user_location(at), hint)


_ADDING_TOKENS = {aten.cat, aten.pad, aten.constant_pad_nd}


def passes_on(node: fx.Node, ids: set[fx.Node]) -> bool:
    """``input_ids.view(-1, input_ids.size(-1))``, ``.long()``, ``.contiguous()``, ``[0]``"""
    if node.target is operator.getitem:
        return node.args[0] in ids
    if overload_packet(node) not in _PASSING_ON or arguments(node).get("self") not in ids:
        return False
    value = node.meta["val"]
    values = value if isinstance(value, list | tuple) else [value]
    return not any(v.is_floating_point() for v in values)


def _shaped_like(node: fx.Node, tokens: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor) and shape_of(node) == shape_of(tokens)


def _made_of_each(node: fx.Node, ids: set[fx.Node]) -> bool:
    """``torch.where(input_ids == IMAGE, 0, input_ids)``: one integer or bool for each id."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if torch.Tag.pointwise not in target.tags and target.overloadpacket is not aten.where:
        return False  # not every overload of `where` has the tag
    if node.meta["val"].is_floating_point():
        return False
    values = [n for n in node.all_input_nodes if not is_symbolic(n)]
    given = [n for n in values if n in ids]
    others = [n for n in values if n not in ids]
    return bool(given) and len(values) == len(node.all_input_nodes) and all(map(_single, others))


def _single(node: fx.Node) -> bool:
    """A number that is the same for every token."""
    return all(size == 1 for size in shape_of(node))


@dataclass(frozen=True)
class Splitter:
    """Cuts parts out of one proven graph.

    Attributes:
        gm: the graph.
        tokens: its token placeholder; sizes taken from it become 1 (batch) and N (length).
        constant_name: qualified name under which a get_attr constant is saved.
    """

    gm: fx.GraphModule
    tokens: fx.Node
    constant_name: Callable[[fx.Node], str]

    def part(
        self, inputs: Sequence[tuple[str, fx.Node]], output: fx.Node, length: tuple[str, int]
    ) -> Part:
        """The subgraph that computes `output` from `inputs`.

        Args:
            inputs: (placeholder name, node it stands for); the token ids only if needed.
            length: the input and its dimension that hold N.

        Raises:
            PortError: the output depends on positions, and they are no input.
        """
        given = {node for _, node in inputs}
        needed = self._needed(output, given)
        self._require_known(needed, given)
        kept = [(n, i) for n, i in inputs if i is not self.tokens or i in needed]
        graph = fx.Graph()
        copied: dict[fx.Node, Any] = {node: graph.placeholder(name) for name, node in kept}
        weights = self._weights(graph, needed, copied)
        reference = next(copied[node] for name, node in kept if name == length[0])
        size = graph.call_function(aten.sym_size.int, (reference, length[1]))
        for node in self.gm.graph.nodes:
            if self._is_size(node):
                copied[node] = 1 if node.args[1] == 0 else size
            elif node in needed and node not in copied:
                copied[node] = _copy(graph, node, copied)
        graph.output(copied[output])
        if not size.users:
            graph.erase_node(size)
        return Part(graph, tuple(name for name, _ in kept), weights)

    def _is_size(self, node: fx.Node) -> bool:
        return node.target is aten.sym_size.int and node.args[0] is self.tokens

    def _needed(self, output: fx.Node, stop: set[fx.Node]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        pending = [output]
        while pending:
            node = pending.pop()
            if node not in found and not self._is_size(node):
                found.add(node)
                if node not in stop or node is output:
                    pending.extend(node.all_input_nodes)
        return found

    def _require_known(self, needed: set[fx.Node], given: set[fx.Node]) -> None:
        for node in self.gm.graph.find_nodes(op="placeholder"):
            if node in needed - given and "input" not in node.meta:
                after = {node}
                for other in self.gm.graph.nodes:  # what was put in for positions has no line
                    if other in needed and after & set(other.all_input_nodes):
                        after.add(other)
                lines = (user_location(n) for n in self.gm.graph.nodes if n in after)
                reason = Reason(
                    ReasonCode.UNSUPPORTED_FEATURE,
                    "the logits depend on the position of a token otherwise than through its "
                    "last hidden state, and vLLM makes them of that alone",
                    next((line for line in lines if line is not None), None),
                    "let positions enter before the projection to the vocabulary",
                )
                raise PortError([reason])

    def _weights(
        self, graph: fx.Graph, needed: set[fx.Node], copied: dict[fx.Node, Any]
    ) -> dict[str, str]:
        weights: dict[str, str] = {}
        for node in self.gm.graph.nodes:
            if node.op in ("placeholder", "get_attr") and node in needed and node not in copied:
                copied[node] = graph.placeholder(f"w{len(weights)}")
                given = node.op == "placeholder"
                name = graph_input(node).name if given else self.constant_name(node)
                weights[copied[node].name] = name
        return weights


def _copy(graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, Any]) -> fx.Node:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: copied[n])
    new = graph.create_node(node.op, node.target, args, kwargs, node.name)
    kept = ("stack_trace", "nn_module_stack", "custom", "val")
    new.meta = {key: node.meta[key] for key in kept if key in node.meta}
    return new


def rows_of(state: fx.Node, axes: Axes) -> tuple[Dim, ...] | None:
    """How embeddings or a hidden state lie in memory where that is not ``[B, T, C]``; else None.

    vLLM takes a row for each token: with one sequence, ``[T, B, C]``, ``[B * T, C]`` and
    ``[B, T, H, D]`` are such rows too, once they are reshaped.

    Raises:
        PortError: the features of a token do not lie beside each other.
    """
    if len(axes) == 3 and axes[:2] == ((Axis.BATCH,), (Axis.TOKEN,)):
        return None
    factors = [f for dim in axes for f in dim if f is not Axis.BATCH]
    alone = all(len(dim) - (Axis.BATCH in dim) == 1 for dim in axes if Axis.TOKEN in dim)
    if factors and factors[0] is Axis.TOKEN and alone:
        return axes
    reason = Reason(
        ReasonCode.UNSUPPORTED_FEATURE,
        "the features of a token do not lie beside each other here, where the model is cut",
        user_location(state),
        "project [B, T, C] onto the vocabulary",
    )
    raise PortError([reason])


def ends_in_rows(part: Part, length: tuple[str, int], width: int) -> None:
    """Has a part return ``[1, N, width]``.

    Args:
        length: the input and its dimension that hold N.
    """
    output = next(n for n in part.graph.nodes if n.op == "output")
    with part.graph.inserting_before(output):
        size = part.graph.call_function(aten.sym_size.int, (_input(part, length[0]), length[1]))
        state: Any = output.args[0]
        rows = part.graph.call_function(aten.reshape.default, (state, [1, size, width]))
        output.args = (rows,)


def begins_with_rows(part: Part, name: str, axes: tuple[Dim, ...]) -> None:
    """Has a part take ``[1, N, C]`` and bring it into the form that the model has."""
    given = _input(part, name)
    last = [n for n in part.graph.nodes if n.op == "placeholder"][-1]
    users = [u for u in given.users if u.target is not aten.sym_size.int]  # N is asked of it
    with part.graph.inserting_after(last):
        size = part.graph.call_function(aten.sym_size.int, (given, 1))
    form = [
        size if Axis.TOKEN in d else math.prod(f for f in d if isinstance(f, int)) for d in axes
    ]
    with part.graph.inserting_after(size):
        shaped = part.graph.call_function(aten.reshape.default, (given, form))
    for user in users:
        user.replace_input_with(given, shaped)


def _input(part: Part, name: str) -> fx.Node:
    return next(n for n in part.graph.nodes if n.op == "placeholder" and n.name == name)


def attention_layers(gm: fx.GraphModule) -> tuple[AttentionLayer, ...]:
    """Geometry of every ``fxport::attention`` call, in graph order."""
    target = torch.ops.fxport.attention.default
    return tuple(_layer(n) for n in gm.graph.nodes if n.target is target)


def _layer(node: fx.Node) -> AttentionLayer:
    bound: dict[str, Any] = arguments(node)
    _, heads, _, size = shape_of(bound["q"])
    _, kv_heads, _, size_v = shape_of(bound["v"])
    params = AttentionParams(
        scale=bound["scale"],
        causal=bound["causal"],
        window_left=bound["window_left"],
        window_right=bound["window_right"],
        softcap=bound["softcap"],
        chunk=bound["chunk"],
    )
    return AttentionLayer(
        int(heads),
        int(kv_heads),
        int(size),
        int(size_v),
        params,
        _sinks(node, bound["sinks"]),
        _slopes(node, bound["alibi_slopes"]),
    )


def _sinks(node: fx.Node, sinks: fx.Node | None) -> str | tuple[float, ...] | None:
    if sinks is None:
        return None
    stored = _stored_vector(sinks)
    if stored.op == "placeholder" and graph_input(stored).kind is InputKind.PARAMETER:
        return graph_input(stored).name
    return _numbers(node, sinks, "sinks that are computed, not a parameter `[num_heads]`")


_IN_ORDER = {
    aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze,
    aten.contiguous, aten.clone, aten.alias,
}  # fmt: skip


def _stored_vector(node: fx.Node) -> fx.Node:
    """What a vector is laid out of, in the same order, and with one dimension that counts."""
    found = node
    while overload_packet(node) in _IN_ORDER and (before := laid_out(node)) is not None:
        node = before
        if [n for n in shape_of(node) if n != 1] == [n for n in shape_of(found) if n != 1]:
            found = node
    return found


def _slopes(node: fx.Node, slopes: fx.Node | None) -> tuple[float, ...] | None:
    return None if slopes is None else _numbers(node, slopes, "ALiBi slopes that are learned")


def _numbers(node: fx.Node, constant: fx.Node, otherwise: str) -> tuple[float, ...]:
    """One number a head, for vLLM's layer."""
    try:
        return tuple(float(x) for x in evaluate(constant, {}).tolist())
    except ValueError as error:
        raise PortError([_refusal(node, otherwise)]) from error


def _refusal(node: fx.Node, what: str) -> Reason:
    return Reason(
        ReasonCode.UNSUPPORTED_FEATURE,
        f"attention with {what} cannot be expressed by vLLM's attention layer",
        user_location(node),
    )
