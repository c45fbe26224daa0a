"""Finds the vocabulary projection, and makes the graph compute it for every position.

Before                                     After
    h = layer_norm(x)        [B, T, C]         h = layer_norm(x)      [B, T, C]   <- the cut
    last = index(h, [:, [-1]]) [B, 1, C]
    logits = linear(last, W) [B, 1, V]         logits = linear(h, W)  [B, T, V]

vLLM's ``forward`` ends at the cut and ``compute_logits`` does the rest, so whatever follows the
projection (scale, softcap, bias, log_softmax) belongs to the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.location import module_of, user_location
from fxport.errors import PortError, Reason, ReasonCode
from fxport.passes.constants import depends_on
from fxport.report import Decision, Outcome

__all__ = ["Head", "find_head"]

aten = torch.ops.aten
_PRODUCTS = {
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.einsum.default,
}


@dataclass(frozen=True)
class Head:
    """Where the model ends and the head begins.

    Attributes:
        hidden: the last hidden state, ``[B, T, C]``.
        projection: the product with the vocabulary weight.
        logits: the graph's output, ``[B, T, V]``.
        decisions: for the report.
    """

    hidden: fx.Node
    projection: fx.Node
    logits: fx.Node
    decisions: tuple[Decision, ...]


def find_head(gm: fx.GraphModule, length: sympy.Symbol) -> Head:
    """Cuts the head off and removes a choice of the last position, wherever it was made.

    Raises:
        PortError: no projection found, or the head does more than token-local work.
    """
    output = next(n for n in gm.graph.nodes if n.op == "output")
    data = depends_on(gm, InputKind.DATA)
    path = _path(output.args[0], data)
    chosen = [n for n in path if _picks_last(n, length)]
    erased: set[fx.Node] = set()
    decisions = [_all_positions(gm, node, path, erased) for node in chosen]
    logits = output.args[0]
    assert isinstance(logits, fx.Node)
    path = _path(logits, data)
    projection = next(n for n in reversed(path) if n.target in _PRODUCTS)
    hidden = next(n for n in projection.all_input_nodes if n in data)
    vocabulary = shape_of(logits)[-1]
    decisions.append(
        Decision(
            "head",
            Outcome.REWRITTEN,
            "vocabulary projection",
            f"compute_logits: {len(path) - path.index(projection)} operations, V = {vocabulary}",
            module_of(projection),
            user_location(projection),
        )
    )
    return Head(hidden, projection, logits, tuple(decisions))


def _path(logits: fx.Node, data: set[fx.Node]) -> list[fx.Node]:
    """From just before the projection's input choice to the logits, in order of computation."""
    path: list[fx.Node] = []
    node, projected = logits, False
    while True:
        sources = [n for n in node.all_input_nodes if n in data]
        is_projection = node.target in _PRODUCTS and len(sources) == 1
        if len(sources) != 1 or node.op != "call_function":
            if projected:
                return list(reversed(path))
            reason = Reason(
                ReasonCode.NO_VOCABULARY,
                "the vocabulary projection was not found: "
                f"the output is computed from {len(sources)} values at `{node.name}`",
                user_location(node),
                "the logits must be one product of the last hidden state with a weight",
            )
            raise PortError([reason])
        if projected and not _reshapes_tokens(node):
            return list(reversed(path))
        path.append(node)
        projected = projected or is_projection
        node = sources[0]


_CHOICES = {aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten.narrow.default}


def _reshapes_tokens(node: fx.Node) -> bool:
    """Before the projection only a choice of positions belongs to the head."""
    return node.target in _CHOICES


def _picks_last(node: fx.Node, length: sympy.Symbol) -> bool:
    """Whether the node keeps the last position of a token axis and nothing else."""
    if node.target not in _CHOICES:
        return False
    bound = arguments(node)
    before = shape_of(bound["self"])
    if node.target is aten.index.Tensor:
        used = [(i, n) for i, n in enumerate(bound["indices"]) if n is not None]
        return len(used) == 1 and before[used[0][0]] == length and _is_last(used[0][1])
    dim = bound["dim"] % len(before)
    if before[dim] != length:
        return False
    if node.target is aten.select.int:
        return _equals_last(bound["index"], length)
    if node.target is aten.slice.Tensor:
        return shape_of(node)[dim] == 1 and _equals_last(bound["start"], length)
    return bound["length"] == 1 and _equals_last(bound["start"], length)


def _equals_last(index: object, length: sympy.Symbol) -> bool:
    if isinstance(index, fx.Node):
        value = index.meta["val"]
        return isinstance(value, torch.SymInt) and value.node.expr == length - 1
    return index == -1


def _is_last(index: fx.Node) -> bool:
    """Whether an index tensor is the constant ``[-1]``."""
    node = index
    while node.target in (aten.lift_fresh_copy.default, aten.clone.default, aten.alias.default):
        node = node.all_input_nodes[0]
    if node.op != "placeholder" or graph_input(node).kind is not InputKind.BUFFER:
        return False
    value = graph_input(node).value
    return value is not None and value.tolist() == [-1]


def _all_positions(
    gm: fx.GraphModule, node: fx.Node, path: list[fx.Node], erased: set[fx.Node]
) -> Decision:
    """Removes the choice, and brings the shapes behind it up to date."""
    source = arguments(node)["self"]
    location, module = user_location(node), module_of(node)
    behind = path[path.index(node) + 1 :]
    node.replace_all_uses_with(source)
    gm.graph.erase_node(node)
    erased.add(node)
    for later in behind:
        if later not in erased:
            _refresh(later)
    return Decision(
        "head",
        Outcome.REWRITTEN,
        "logits of the last position only",
        "logits of every position; vLLM picks the ones it needs",
        module,
        location,
    )


def _refresh(node: fx.Node) -> None:
    fake = next(
        v.fake_mode for n in node.all_input_nodes if hasattr(v := n.meta["val"], "fake_mode")
    )
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    try:
        # torch 2.11's matmul takes symbolic sizes in its Python implementation only.
        with enable_python_dispatcher(), fake, torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, IndexError) as error:
        reason = Reason(
            ReasonCode.NO_LOGITS,
            "only the last position's logits are returned, and this line works on "
            f"that one position only: {error}",
            user_location(node),
            "return the logits of every position",
        )
        raise PortError([reason]) from error
