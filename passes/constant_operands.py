"""Constants that the body of a higher-order operation is given, made inside of it.

Before                                          After
    m = tril(ones([T, T]))                          o = checkpoint(body, q, k, v, m)
    o = checkpoint(body, q, k, v, m)                body(q, k, v, _):
    body(q, k, v, m):                                   m = tril(ones([T, T]))
        s = masked_fill(q @ k.mT, ~m, -inf)             s = masked_fill(q @ k.mT, ~m, -inf)

    m = buffer[:T, :T]                              o = checkpoint(body, q, k, v, m, buffer)
    o = checkpoint(body, q, k, v, m)                body(q, k, v, _, buffer):
    body(q, k, v, m):                                   m = buffer[:T, :T]

A mask that is made once for all checkpointed layers is proven in each of them then, and most are
not made at all any more. Only what depends on nothing but sizes, and on buffers in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import Argument

from fxport.capture.arguments import shape_of_tensor
from fxport.capture.inputs import InputKind, add_input, graph_input
from fxport.passes.attention.bodies import Body, body_of
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.site import Left
from fxport.passes.constants import is_symbolic
from fxport.passes.graph_facts import GraphFacts, Source, reachable

__all__ = ["make_constants_inside"]

# Their operands are what the body takes, one by one, and nothing else refers to them.
_OPEN = {"tag_activation_checkpoint", "wrap_activation_checkpoint"}


def make_constants_inside(gm: fx.GraphModule) -> None:
    """Changes the bodies that a graph's operations run, in place; inner bodies as well."""
    bodies = [body for node in gm.graph.nodes if (body := body_of(gm, node)) is not None]
    facts = GraphFacts(gm) if bodies else None
    for body in bodies:
        if sum(other.gm is body.gm for other in bodies) > 1:
            continue  # another call may give it something else
        assert facts is not None
        entered = {o: body.entered(o)[0] for o in body.operands if isinstance(o, fx.Node)}
        for operand, placeholder in list(_constants(facts, body)):
            _make_inside(body, operand, placeholder, entered)
        make_constants_inside(body.gm)
        body.gm.recompile()


def _constants(facts: GraphFacts, body: Body) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Operands that are constants, each with the placeholder that stands for it."""
    is_open = body.node.target.name() in _OPEN  # type: ignore[union-attr]
    known = Source.BUFFER if is_open else Source.CONSTANT
    for operand in dict.fromkeys(o for o in body.operands if isinstance(o, fx.Node)):
        if is_symbolic(operand) or not isinstance(operand.meta.get("val"), FakeTensor):
            continue
        if operand.op == "placeholder" or facts.source(operand) not in known:
            continue
        made = reachable([operand], _without_sizes)
        if all(n.op == "call_function" or _is_buffer(n) for n in made):
            for placeholder in body.entered(operand):
                if placeholder.users and isinstance(placeholder.meta.get("val"), FakeTensor):
                    yield operand, placeholder


def _is_buffer(node: fx.Node) -> bool:
    return node.op == "placeholder" and graph_input(node).kind is InputKind.BUFFER


def _without_sizes(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if not is_symbolic(n)]


def _make_inside(
    body: Body, operand: fx.Node, placeholder: fx.Node, entered: dict[fx.Node, fx.Node]
) -> None:
    """Makes it there, if it can be.

    Args:
        entered: the placeholders by what stands for them outside; buffers are added.
    """
    given = body.gm.graph.find_nodes(op="placeholder")
    tensors = [n for n in given if isinstance(n.meta.get("val"), FakeTensor)]
    if len(tensors) == 1:
        return  # no other to tell sizes by
    emitter = Emitter(body.gm, min(placeholder.users), [n for n in tensors if n is not placeholder])
    nodes = sorted(reachable([operand], _without_sizes))
    buffers = [n for n in nodes if n.op == "placeholder"]
    more = {b: _add_placeholder(body.gm, b) for b in buffers if b not in entered}
    known: dict[fx.Node, Argument] = {b: (entered | more)[b] for b in buffers}
    try:
        for node in nodes:
            if node in known:
                continue
            args, kwargs = fx.node.map_arg(
                (node.args, dict(node.kwargs)), lambda n: _inside(emitter, n, known)
            )
            known[node] = emitter.call(node.target, *args, **kwargs)  # type: ignore[arg-type]
        made = known[operand]
        assert isinstance(made, fx.Node)
        if shape_of_tensor(made.meta["val"]) != shape_of_tensor(placeholder.meta["val"]):
            raise KeyError(operand)
    except (Left, KeyError):  # no operand has a dimension of this size
        emitter.undo()
        for new in more.values():
            body.gm.graph.erase_node(new)
        return
    placeholder.replace_all_uses_with(made)
    entered |= more
    body.node.args = (*body.node.args, *more)


def _add_placeholder(gm: fx.GraphModule, outside: fx.Node) -> fx.Node:
    """One more, after all others."""
    last = gm.graph.find_nodes(op="placeholder")[-1]
    with gm.graph.inserting_after(last):
        new = add_input(gm.graph, outside.name)
    new.meta = {key: outside.meta[key] for key in ("val", "input")}
    return new


def _inside(emitter: Emitter, node: fx.Node, known: dict[fx.Node, Argument]) -> Argument:
    if not is_symbolic(node):
        return known[node]
    value = node.meta["val"]
    if isinstance(value, int | float | bool):
        return value
    if not isinstance(value, torch.SymInt):
        raise KeyError(node)
    return emitter.size(value.node.expr)
