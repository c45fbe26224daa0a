"""Finds the vocabulary projection, and makes the graph compute it for every position.

Before                                     After
    h = layer_norm(x)        [B, T, C]         h = layer_norm(x)      [B, T, C]   <- the cut
    last = index(h, [:, [-1]]) [B, 1, C]
    logits = linear(last, W) [B, 1, V]         logits = linear(h, W)  [B, T, V]

vLLM's ``forward`` ends at the cut and ``compute_logits`` does the rest, so whatever follows the
projection (scale, softcap, bias, log_softmax) belongs to the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.location import module_of, user_location
from fxport.errors import PortError, Reason, ReasonCode
from fxport.passes.attention.layout import Size
from fxport.passes.constants import depends_on
from fxport.passes.graph_facts import reachable
from fxport.passes.masks.reach import is_plain_position
from fxport.report import Decision, Outcome

__all__ = ["Head", "as_rewritten", "between", "find_head", "no_projection", "uses_of"]

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
        start: from here on there must be no attention: `hidden`, or where the last position was
            chosen before it.
        decisions: for the report.
    """

    hidden: fx.Node
    projection: fx.Node
    logits: fx.Node
    start: fx.Node
    decisions: tuple[Decision, ...]


def find_head(gm: fx.GraphModule, length: sympy.Symbol) -> Head:
    """Cuts the head off and removes a choice of the last position, wherever it was made.

    Raises:
        PortError: no projection found, or the head does more than token-local work.
    """
    output = next(n for n in gm.graph.nodes if n.op == "output")
    data, order = _facts(gm)
    sources, decisions = [], []
    while (choice := _choice(output, length, data, order)) is not None:
        sources.append(arguments(choice)["self"])
        decisions.append(_all_positions(gm, choice, output, data))
        data, order = _facts(gm)
    logits = output.args[0]
    assert isinstance(logits, fx.Node)
    hidden, products = _hidden(_passed_by_all(logits, data, order), logits, data)
    vocabulary = shape_of(logits)[-1]
    wide = (n for n in products if shape_of(n)[-1] == vocabulary)
    projection = next(wide, products[0])
    first = min([hidden, *sources], key=lambda n: order[n])
    decisions.append(
        Decision(
            "head",
            Outcome.REWRITTEN,
            "vocabulary projection",
            f"compute_logits: {len(between(hidden, logits, data))} operations, V = {vocabulary}",
            module_of(projection),
            user_location(projection),
        )
    )
    return Head(hidden, projection, logits, first, tuple(decisions))


def _facts(gm: fx.GraphModule) -> tuple[set[fx.Node], dict[fx.Node, int]]:
    """What depends on the token ids, and the place of every node."""
    return depends_on(gm, InputKind.DATA), {node: i for i, node in enumerate(gm.graph.nodes)}


Uses: TypeAlias = dict[fx.Node, list[tuple[fx.Node, int]]]


def uses_of(head: Head) -> Uses:
    """Where the first values of the head are used: each user, and which of its inputs they are."""
    return {
        node: [(user, user.all_input_nodes.index(node)) for user in node.users]
        for node in (head.hidden, head.start)
    }


def as_rewritten(head: Head, before: Uses) -> Head:
    """The head after a pass that may have put other nodes there: an attention's result may be it.

    Args:
        before: the `uses_of` the head before that pass.
    """

    def now(node: fx.Node) -> fx.Node:
        left = [user.all_input_nodes[i] for user, i in before[node] if not user._erased]
        return left[0] if node._erased and left else node

    return replace(head, hidden=now(head.hidden), start=now(head.start))


def _choice(
    output: fx.Node, length: sympy.Symbol, data: set[fx.Node], order: dict[fx.Node, int]
) -> fx.Node | None:
    """The first place where only the last position goes on."""
    passed = _passed_by_all(output.args[0], data, order)  # type: ignore[arg-type]
    return next((n for n in reversed(passed) if _picks_last(n, length)), None)


def _passed_by_all(logits: fx.Node, data: set[fx.Node], order: dict[fx.Node, int]) -> list[fx.Node]:
    """What every way from the token ids to the logits goes through, last first."""
    found: list[fx.Node] = []
    pending = {logits}
    while pending:
        node = max(pending, key=order.__getitem__)
        if len(pending) == 1:
            found.append(node)
        pending.remove(node)
        pending.update(n for n in node.all_input_nodes if n in data)
    return found


def between(start: fx.Node, end: fx.Node, data: set[fx.Node]) -> list[fx.Node]:
    """What is computed of `start`, which everything passes, on the way to `end`."""
    found = reachable([end], lambda n: () if n is start else _data_inputs(n, data))
    return [n for n in found if n is not start]


def _hidden(
    passed: list[fx.Node], logits: fx.Node, data: set[fx.Node]
) -> tuple[fx.Node, list[fx.Node]]:
    """The last value of all with a product behind it, and the products behind it."""
    for node in passed:
        if node is logits or node.op != "call_function" or not _is_state(node):
            continue
        products = [n for n in between(node, logits, data) if n.target in _PRODUCTS]
        if products:
            return node, products
    forks = [n for n in between(passed[-1], logits, data) if len(_data_inputs(n, data)) > 1]
    node = forks[0] if forks else logits
    raise PortError([no_projection(node, len(_data_inputs(node, data)))])


def _is_state(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1


def _data_inputs(node: fx.Node, data: set[fx.Node]) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if n in data]


def no_projection(node: fx.Node, count: int) -> Reason:
    """The refusal of logits that are made of several values at `node`."""
    return Reason(
        ReasonCode.NO_VOCABULARY,
        "the vocabulary projection was not found: "
        f"the output is computed from {count} values at `{node.name}`",
        user_location(node),
        "compute the logits from the last hidden state alone",
    )


_CHOICES = {aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten.narrow.default}


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
    """Whether an index tensor is the constant -1, or holds it alone."""
    node = index
    while node.target in (aten.lift_fresh_copy.default, aten.clone.default, aten.alias.default):
        node = node.all_input_nodes[0]
    if node.op != "placeholder" or graph_input(node).kind is not InputKind.BUFFER:
        return False
    value = graph_input(node).value
    return value is not None and value.flatten().tolist() == [-1]


def _all_positions(
    gm: fx.GraphModule, node: fx.Node, output: fx.Node, data: set[fx.Node]
) -> Decision:
    """Removes the choice, and brings the shapes behind it up to date."""
    source = arguments(node)["self"]
    location, module = user_location(node), module_of(node)
    every = _after_the_batch(gm, node, source)
    shapes = {every: shape_of(node)}  # what the operations behind have seen
    node.replace_all_uses_with(every)
    gm.graph.erase_node(node)
    behind = set(between(every, output.args[0], data))  # type: ignore[arg-type]
    for later in list(gm.graph.nodes):
        if later not in behind:
            continue
        shapes[later] = shape_of(later)
        if (
            _squeezes_the_last(later, shapes)
            or _has_its_axis_back(later, shapes)
            or _takes_every_row(later)
        ):
            later.replace_all_uses_with(later.all_input_nodes[0])
            gm.graph.erase_node(later)
        else:
            _refresh(later)
    return Decision(
        "head",
        Outcome.REWRITTEN,
        "logits of the last position only",
        "logits of every position; vLLM picks the ones it needs",
        module,
        location,
    )


def _after_the_batch(gm: fx.GraphModule, choice: fx.Node, source: fx.Node) -> fx.Node:
    """`source`, ``[T, B, C]`` of which ``[B, C]`` was selected, as ``[B, T, C]``."""
    sizes = shape_of(source)
    if choice.target is not aten.select.int or arguments(choice)["dim"] % len(sizes) != 0:
        return source
    if len(sizes) < 2 or isinstance(sizes[1], int):
        return source
    order = [1, 0, *range(2, len(sizes))]
    with gm.graph.inserting_before(choice):
        turned = gm.graph.call_function(aten.permute.default, (source, order))
    turned.meta.update(choice.meta)
    _refresh(turned)
    return turned


def _squeezes_the_last(node: fx.Node, before: Mapping[fx.Node, tuple[Size, ...]]) -> bool:
    """Whether nothing but the one position that was chosen is squeezed: it is all of them now."""
    if node.target not in (aten.squeeze.dim, aten.squeeze.dims):
        return False
    given = arguments(node)
    was, now = before[given["self"]], shape_of(given["self"])
    asked = [given["dim"]] if isinstance(given["dim"], int) else given["dim"]
    dims = [d % len(was) for d in asked]
    return len(was) == len(now) and all(was[d] == 1 != now[d] for d in dims)


def _has_its_axis_back(node: fx.Node, before: Mapping[fx.Node, tuple[Size, ...]]) -> bool:
    """``x[:, -1].unsqueeze(1)``: the axis is where it was, and never left now."""
    if node.target is not aten.unsqueeze.default:
        return False
    given = arguments(node)
    was, now = before.get(given["self"], ()), shape_of(given["self"])
    at = given["dim"] % (len(was) + 1)
    return len(now) == len(was) + 1 and now[:at] + now[at + 1 :] == was


def _takes_every_row(node: fx.Node) -> bool:
    """``x[arange(B)]``, which is what is left of ``x[arange(B), -1]``."""
    if node.target is not aten.index.Tensor:
        return False
    given = arguments(node)
    index, rows = given["indices"][0], shape_of(given["self"])[0]
    alone = len(given["indices"]) == 1 and index is not None
    return alone and shape_of(index) == (rows,) and is_plain_position(index)


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
