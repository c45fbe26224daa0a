"""A wrong rewrite, injected into one of eight layers, is located to its node."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxport.capture.dynamo import lower
from fxport.diff.check import Check, check_pairs
from fxport.errors import FxportError
from fxport.passes.pipeline import training_pipeline
from tests.backends.models_training import GPT, Llama, Sizes

aten = torch.ops.aten
ATTENTION = torch.ops.fxport.attention.default
LAYERS = 8


def lowered(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(lower(gm).graph)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=keep, fullgraph=True, dynamic=False)(*inputs)
    (graph,) = graphs
    return graph


class Rewritten:
    """A graph before and after the training pipeline, with corresponding nodes."""

    def __init__(self, before: fx.GraphModule) -> None:
        self.before = before
        self.after = copy.deepcopy(before)
        partner = dict(zip(self.after.graph.nodes, before.graph.nodes, strict=True))
        replaced: dict[fx.Node, str] = {}
        self.after._register_replace_node_hook(
            lambda old, new, user: replaced.__setitem__(old, new)
        )
        training_pipeline(self.after)
        self.after._unregister_replace_node_hook(self.after._replace_hooks[0])
        alive = {n.name: n for n in self.after.graph.nodes}
        self.pairs = [(partner[n], n) for n in alive.values() if n in partner]
        for old in partner:
            new = old
            while new in replaced and replaced[new] in alive and new is not alive[replaced[new]]:
                new = alive[replaced[new]]
            if new is not old and old in partner:
                self.pairs.append((partner[old], new))

    def spoiled(self) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node], list[Any]]:
        """A copy of `after` to break, the copies of its nodes, and the pairs with it."""
        after = copy.deepcopy(self.after)
        copies = dict(zip(self.after.graph.nodes, after.graph.nodes, strict=True))
        return after, copies, [(b, copies[a]) for b, a in self.pairs]


@cache
def rewritten(kind: str) -> tuple[Rewritten, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    tokens = torch.randint(0, 61, (2, 11))
    if kind == "gpt":
        model: nn.Module = GPT(Sizes(layers=LAYERS))
    else:
        model = Llama(Sizes(layers=LAYERS, heads=4, width=32), kv_heads=2)
    for parameter in model.parameters():  # zero biases would hide a forgotten one
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    return Rewritten(lowered(model, tokens)), (tokens,)


def calls(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=target))


# --- faults: each breaks one layer and gives the node that is wrong ---------------------------

Fault = Callable[[fx.GraphModule, int], fx.Node]


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    if names.index(name) < len(node.args):
        node.update_arg(names.index(name), value)
    else:
        node.update_kwarg(name, value)


def wrong_scale(gm: fx.GraphModule, layer: int) -> fx.Node:
    node = calls(gm, ATTENTION)[layer]
    set_argument(node, "scale", 0.3)
    return node


def causal_off(gm: fx.GraphModule, layer: int) -> fx.Node:
    node = calls(gm, ATTENTION)[layer]
    set_argument(node, "causal", False)
    return node


def wrong_heads(gm: fx.GraphModule, layer: int) -> fx.Node:
    node = calls(gm, ATTENTION)[layer]
    with gm.graph.inserting_before(node):
        flipped = gm.graph.call_function(aten.flip.default, (node.args[1], [1]))
    node.update_arg(1, flipped)
    return flipped


def swapped_operands(gm: fx.GraphModule, layer: int) -> fx.Node:
    node = calls(gm, ATTENTION)[layer]
    q, k = node.args[:2]
    node.update_arg(0, k)
    node.update_arg(1, q)
    return node


def forgotten_bias(gm: fx.GraphModule, layer: int) -> fx.Node:
    node = calls(gm, aten.linear.default)[4 * layer + 1]  # the projection behind attention
    node.args = node.args[:2]
    return node


def wrong_order(gm: fx.GraphModule, layer: int) -> fx.Node:
    """Heads and tokens in each other's place behind the attention."""
    attention = calls(gm, ATTENTION)[layer]
    (out,) = [u for u in attention.users if u.args[1] == 0]
    user = next(iter(out.users))
    set_argument(user, "dim0", 1)
    set_argument(user, "dim1", 3)
    with gm.graph.inserting_after(user):
        back = gm.graph.call_function(aten.reshape.default, (user, [2, 11, 3, 8]))
    user.replace_all_uses_with(back, delete_user_cb=lambda u: u is not back)
    return user


class Backwards(torch.autograd.Function):
    """The identity, whose gradient is half of what it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad / 2


def halved(x: Tensor) -> Tensor:
    result: Tensor = Backwards.apply(x)  # type: ignore[no-untyped-call]
    return result


def broken_backward(gm: fx.GraphModule, layer: int) -> fx.Node:
    node = calls(gm, ATTENTION)[layer]
    with gm.graph.inserting_before(node):
        half = gm.graph.call_function(halved, (node.args[2],))
    node.update_arg(2, half)
    return half


VALUES = [wrong_scale, causal_off, wrong_heads, swapped_operands, forgotten_bias, wrong_order]


def located(kind: str, fault: Fault, layer: int) -> tuple[Check, fx.Node]:
    graphs, inputs = rewritten(kind)
    after, _, pairs = graphs.spoiled()
    wrong = fault(after, layer)
    after.graph.lint()
    after.recompile()
    return check_pairs(graphs.before, after, pairs, *inputs), wrong


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("fault", VALUES)
def test_a_wrong_value_is_located(fault: Fault, layer: int) -> None:
    found, wrong = located("gpt", fault, layer)
    assert found.value is not None and found.first is found.value
    assert wrong in found.value.suspects
    assert found.value.node in (wrong, *wrong.users), str(found)
    assert len(found.value.suspects) <= 8  # one layer has several times as many


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_a_wrong_gradient_is_located(kind: str, layer: int) -> None:
    found, wrong = located(kind, broken_backward, layer)
    assert found.value is None
    assert found.gradient is not None and found.first is found.gradient
    assert found.gradient.node is wrong, str(found)


@pytest.mark.parametrize("layer", [0, 5])
@pytest.mark.parametrize("fault", [wrong_scale, wrong_heads])
def test_grouped_heads(fault: Fault, layer: int) -> None:
    found, wrong = located("llama", fault, layer)
    assert found.value is not None
    assert found.value.node in (wrong, *wrong.users), str(found)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_a_right_rewrite_passes(kind: str) -> None:
    graphs, inputs = rewritten(kind)
    assert len(calls(graphs.after, ATTENTION)) == LAYERS
    found = check_pairs(graphs.before, graphs.after, graphs.pairs, *inputs)
    assert found.ok, str(found)
    assert found.dtype is torch.float64
    compared = [row for row in found.rows if row.value is not None]
    assert len(compared) > 10 * LAYERS
    assert sum(row.gradient is not None for row in compared) > 10 * LAYERS
    assert all(len(line) <= 80 for line in str(found).splitlines())
    own = check_pairs(graphs.before, graphs.after, graphs.pairs, *inputs, dtype=None)
    assert own.ok and own.dtype is None, str(own)


def test_the_text_names_the_line() -> None:
    found, _ = located("gpt", wrong_scale, 3)
    assert "models_training.py" in str(found) and "value differs first at" in str(found)
    assert all(len(line) <= 80 for line in str(found).splitlines())


def test_random_numbers_are_refused() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 61, (2, 11))
    graph = lowered(GPT(Sizes(layers=4, dropout=0.2)), tokens)
    pairs = [(n, n) for n in graph.graph.nodes if n.op == "call_function"]
    with pytest.raises(FxportError, match=r"draws random numbers .*models_training\.py"):
        check_pairs(graph, graph, pairs, tokens)


def test_a_missing_input_is_named() -> None:
    graphs, _ = rewritten("gpt")
    with pytest.raises(FxportError, match="0 inputs were passed, but 1 are taken"):
        check_pairs(graphs.before, graphs.after, graphs.pairs)


def test_changes_in_place_are_compared_as_they_were() -> None:
    """`h += x` on one side, `h + x` on the other: equal, gradients of the old value included."""
    x = torch.randn(3, 5)

    def graph(add: Any) -> fx.GraphModule:
        g = fx.Graph()
        a = g.placeholder("x")
        h = g.call_function(aten.mul.Tensor, (a, 2.0))
        s = g.call_function(add, (h, a))
        g.output(g.call_function(aten.exp.default, (s,)))
        return fx.GraphModule(nn.Module(), g)

    before, after = graph(aten.add_.Tensor), graph(aten.add.Tensor)
    pairs = list(zip(before.graph.nodes, after.graph.nodes, strict=True))
    found = check_pairs(before, after, pairs, x)
    assert found.ok and found.rows[1].gradient is not None, str(found)
