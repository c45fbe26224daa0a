"""Puts what the user's forward ran under `torch.utils.checkpoint` under it again.

Before                                   After
    a = norm(x, w)                           y = checkpointed_0(x, w, v)
    b = reduce_from(linear(a, v))
    y = add(x, b)                            body: the three operations

The last step for one rank's graph, after the checks. All ranks make the same parts: which
operations belong to one was noted when the model was captured.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch import fx

from fxport.capture.checkpoints import CheckpointCall, checkpoints_of
from fxport.capture.location import user_location
from fxport.errors import FxportError
from fxport.parallel.checkpointed import Checkpointed
from fxport.parallel.modules import Gather, ReduceFrom
from fxport.parallel.plan import Plan

__all__ = ["checkpoint_again", "require_plain_checkpoints"]


def require_plain_checkpoints(graph: fx.Graph) -> None:
    """Refuses checkpoints that keep what the user's code chooses: it chooses by operation, and
    a divided graph has others.

    Raises:
        FxportError: with the user's line.
    """
    for node in graph.nodes:
        if any(call.selective for call in checkpoints_of(node)):
            raise FxportError(
                f"{user_location(node) or node.name}: runs under "
                "torch.utils.checkpoint.checkpoint(.., context_fn=..), which chooses by operation "
                "what is kept; a divided model has other operations. Leave context_fn out"
            )


def checkpoint_again(module: fx.GraphModule, plan: Plan) -> None:
    """Rewrites the module of one rank in place.

    Raises:
        FxportError: operations of one call cannot run next to each other.
    """
    divided = {s.name for s in plan.parameters if any(i for box in s.indices for i in box)}
    kept = {id(module.get_parameter(name)) for name in divided}
    own = [
        n for n in module.graph.find_nodes(op="get_attr")
        if id(operator.attrgetter(str(n.target))(module)) in kept
    ]  # fmt: skip
    _fold(module, 0, set(own))


def _fold(gm: fx.GraphModule, depth: int, divided: set[fx.Node]) -> None:
    """`divided`: parameters of which other ranks have other parts."""
    parts: dict[CheckpointCall, set[fx.Node]] = {}
    for node in gm.graph.nodes:
        calls = checkpoints_of(node)
        if len(calls) > depth and node.op in ("call_function", "call_module"):
            parts.setdefault(calls[depth], set()).add(node)
    taken = {n for part in parts.values() for n in part}
    for part in parts.values():
        _complete(gm.graph, part, taken)
        taken |= part
    for number, part in enumerate(parts.values()):
        _fold_one(gm, f"checkpointed_{number}", part, depth, divided)
    if parts:
        gm.graph.lint()
        gm.recompile()


def _complete(graph: fx.Graph, part: set[fx.Node], taken: set[fx.Node]) -> None:
    """Adds what is between two operations of a call, and what only they read."""
    before, after = _reaching(reversed(graph.nodes), part), _reached(graph.nodes, part)
    for node in reversed(graph.nodes):
        if node in part or node.op not in ("call_function", "call_module"):
            continue
        if node in before and node in after:
            if node in taken:
                raise FxportError(
                    f"{user_location(node) or node.name}: is between operations of another "
                    "call of torch.utils.checkpoint.checkpoint, which cannot run as one"
                )
            part.add(node)
        elif node not in taken and _only_for(part, node):
            part.add(node)


def _only_for(part: set[fx.Node], node: fx.Node) -> bool:
    """Whether a node that stands for no operation of the user's is read in a part alone."""
    return "custom" not in node.meta and bool(node.users) and part.issuperset(node.users)


def _reaching(nodes: Iterable[fx.Node], part: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in nodes:
        if any(u in part or u in found for u in node.users):
            found.add(node)
    return found


def _reached(nodes: Iterable[fx.Node], part: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in nodes:
        if any(i in part or i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _fold_one(
    gm: fx.GraphModule, name: str, part: set[fx.Node], depth: int, divided: set[fx.Node]
) -> None:
    ordered = [n for n in gm.graph.nodes if n in part]
    inputs = list(dict.fromkeys(i for n in ordered for i in n.all_input_nodes if i not in part))
    outputs = [n for n in ordered if not part.issuperset(n.users)]
    if not outputs:
        return
    body = fx.Graph()
    made = {node: body.placeholder(node.name) for node in inputs}
    for old, new in made.items():
        new.meta = {k: v for k, v in old.meta.items() if k == "val"}
    for node in ordered:
        made[node] = body.node_copy(node, made.__getitem__)
    body.output(tuple(made[n] for n in outputs))
    inner = fx.GraphModule(gm, body)
    early_stop = _stops_alike(inner, {made[n] for n in divided if n in made})
    _fold(inner, depth + 1, {made[n] for n in divided if n in made})
    gm.add_module(name, Checkpointed(inner, early_stop))
    _replace(gm.graph, name, ordered, inputs, outputs)
    for node in ordered:
        if node.op == "call_module":
            gm.delete_submodule(str(node.target))


def _stops_alike(body: fx.GraphModule, divided: set[fx.Node]) -> bool:
    """Whether all ranks, when they compute a part again, may stop at its last needed result.

    They run the same collectives if nothing after the last of them is this rank's own: a part of
    a weight is a slice on one rank, which keeps nothing, and a selection on another.
    """
    for node in reversed(body.graph.nodes):
        if node.op == "call_module":
            return isinstance(body.get_submodule(str(node.target)), ReduceFrom | Gather)
        if divided & set(node.all_input_nodes):
            return False
    return True


def _replace(
    graph: fx.Graph,
    name: str,
    ordered: list[fx.Node],
    inputs: list[fx.Node],
    outputs: list[fx.Node],
) -> None:
    """The call at the place of the last operation; what reads its results moves behind it."""
    last, part = ordered[-1], set(ordered)
    reached = _reached(graph.nodes, part) - part
    nodes = list(graph.nodes)
    behind = [n for n in nodes[: nodes.index(last)] if n in reached]
    with graph.inserting_after(last):
        call = graph.call_module(name, tuple(inputs))
    at = call
    for index, old in enumerate(outputs):
        with graph.inserting_after(at):
            new = graph.call_function(operator.getitem, (call, index))
        new.meta = {k: v for k, v in old.meta.items() if k == "val"}
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in part)
        at = new
    for node in behind:
        at.append(node)
        at = node
    for node in reversed(ordered):
        graph.erase_node(node)
