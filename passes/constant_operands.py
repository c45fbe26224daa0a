"""Constants that the body of a higher-order operation is given, made inside of it.

Before                                          After
    m = tril(ones([T, T]))                          o = checkpoint(body, q, k, v, m)
    o = checkpoint(body, q, k, v, m)                body(q, k, v, _):
    body(q, k, v, m):                                   m = tril(ones([T, T]))
        s = masked_fill(q @ k.mT, ~m, -inf)             s = masked_fill(q @ k.mT, ~m, -inf)

A mask that is made once for all checkpointed layers is proven in each of them then, and most are
not made at all any more. Only what depends on nothing but sizes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import Argument

from fxport.capture.arguments import shape_of_tensor
from fxport.passes.attention.bodies import Body, body_of
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.site import Left
from fxport.passes.constants import is_symbolic
from fxport.passes.graph_facts import GraphFacts, Source, reachable

__all__ = ["make_constants_inside"]


def make_constants_inside(gm: fx.GraphModule) -> None:
    """Changes the bodies that a graph's operations run, in place; inner bodies as well."""
    bodies = [body for node in gm.graph.nodes if (body := body_of(gm, node)) is not None]
    facts = GraphFacts(gm) if bodies else None
    for body in bodies:
        if sum(other.gm is body.gm for other in bodies) > 1:
            continue  # another call may give it something else
        assert facts is not None
        for operand, placeholder in _constants(facts, body):
            _make_inside(body.gm, operand, placeholder)
        make_constants_inside(body.gm)
        body.gm.recompile()


def _constants(facts: GraphFacts, body: Body) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Operands that are constants, each with the placeholder that stands for it."""
    for operand in dict.fromkeys(o for o in body.operands if isinstance(o, fx.Node)):
        if is_symbolic(operand) or not isinstance(operand.meta.get("val"), FakeTensor):
            continue
        made = reachable([operand], _without_sizes)
        if facts.source(operand) is not Source.CONSTANT:
            continue
        if all(n.op == "call_function" for n in made):
            for placeholder in body.entered(operand):
                if placeholder.users and isinstance(placeholder.meta.get("val"), FakeTensor):
                    yield operand, placeholder


def _without_sizes(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if not is_symbolic(n)]


def _make_inside(gm: fx.GraphModule, operand: fx.Node, placeholder: fx.Node) -> None:
    given = gm.graph.find_nodes(op="placeholder")
    tensors = [n for n in given if isinstance(n.meta.get("val"), FakeTensor)]
    if len(tensors) == 1:
        return  # no other to tell sizes by
    emitter = Emitter(gm, min(placeholder.users), [n for n in tensors if n is not placeholder])
    known: dict[fx.Node, Argument] = {}
    try:
        for node in sorted(reachable([operand], _without_sizes)):
            args, kwargs = fx.node.map_arg(
                (node.args, dict(node.kwargs)), lambda n: _inside(emitter, n, known)
            )
            known[node] = emitter.call(node.target, *args, **kwargs)  # type: ignore[arg-type]
    except (Left, KeyError):  # no operand has a dimension of this size
        emitter.undo()
        return
    made = known[operand]
    assert isinstance(made, fx.Node)
    if shape_of_tensor(made.meta["val"]) != shape_of_tensor(placeholder.meta["val"]):
        emitter.undo()
        return
    placeholder.replace_all_uses_with(made)


def _inside(emitter: Emitter, node: fx.Node, known: dict[fx.Node, Argument]) -> Argument:
    if not is_symbolic(node):
        return known[node]
    value = node.meta["val"]
    if isinstance(value, int | float | bool):
        return value
    if not isinstance(value, torch.SymInt):
        raise KeyError(node)
    return emitter.size(value.node.expr)
