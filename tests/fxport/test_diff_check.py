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
from fxport.diff import GraphDiff
from fxport.diff.check import Check, check_pairs
from fxport.errors import FxportError
from fxport.passes.pipeline import training_pipeline
from tests.backends.models_training import GPT, Llama, Sizes

aten = torch.ops.aten
ATTENTION = torch.ops.fxport.attention.default
LAYERS = 8
Fault = Callable[[fx.GraphModule, int], fx.Node]


def lowered(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(lower(gm).graph)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=keep, fullgraph=True, dynamic=False)(*inputs)
    (graph,) = graphs
    return graph


@cache
def captured(kind: str) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """A model of eight layers as the training door captures it, and its inputs."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 61, (2, 11))
    if kind == "gpt":
        model: nn.Module = GPT(Sizes(layers=LAYERS))
    else:
        model = Llama(Sizes(layers=LAYERS, heads=4, width=32), kv_heads=2)
    for parameter in model.parameters():  # zero biases would hide a forgotten one
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    return lowered(model, tokens), (tokens,)


def nothing(gm: fx.GraphModule, layer: int) -> fx.Node:
    return gm.graph.output_node()


def rewritten(kind: str, fault: Fault, layer: int, how: str) -> tuple[GraphDiff, fx.Node]:
    """The training pipeline, with a fault behind it, through a diff; the node that is wrong."""
    before, _ = captured(kind)
    after = copy.deepcopy(before)
    with GraphDiff(after) as diff:
        with diff.pass_("attention"):
            training_pipeline(after)
        with diff.pass_("fault"):
            wrong = fault(after, layer)
    after.graph.lint()
    return (diff if how == "recorded" else GraphDiff.between(before, after)), wrong


def calls(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=target))


# --- faults: each breaks one layer and gives the node that is wrong ---------------------------


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


def wrong_window(gm: fx.GraphModule, layer: int) -> fx.Node:
    node = calls(gm, ATTENTION)[layer]
    set_argument(node, "window_left", 2)
    return node


def swapped_operation(gm: fx.GraphModule, layer: int) -> fx.Node:
    """silu for gelu: close, and no pass of ours."""
    node = calls(gm, aten.gelu.default)[layer]
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(aten.silu.default, node.args[:1])
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return new


VALUES = [
    wrong_scale,
    causal_off,
    wrong_window,
    wrong_heads,
    swapped_operands,
    swapped_operation,
    forgotten_bias,
    wrong_order,
]
# Every layer as recorded; three of them with nobody watching.
PLACES = [(layer, "recorded") for layer in range(LAYERS)]
PLACES += [(layer, "between") for layer in (0, 3, LAYERS - 1)]


def located(kind: str, fault: Fault, layer: int, how: str) -> tuple[Check, list[str]]:
    """The check, and the name of the node that is wrong."""
    diff, wrong = rewritten(kind, fault, layer, how)
    found = diff.check(*captured(kind)[1], grads=fault not in VALUES or layer == 3)
    return found, [wrong.name]


@pytest.mark.parametrize(("layer", "how"), PLACES)
@pytest.mark.parametrize("fault", VALUES)
def test_a_wrong_value_is_located(fault: Fault, layer: int, how: str) -> None:
    found, wrong = located("gpt", fault, layer, how)
    assert found.value is not None and found.first is found.value
    assert found.value.node.name in wrong, str(found)
    assert wrong[0] in [n.name for n in found.value.suspects]
    assert len(found.value.suspects) <= 8  # one layer has several times as many


@pytest.mark.parametrize(("layer", "how"), PLACES)
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_a_wrong_gradient_is_located(kind: str, layer: int, how: str) -> None:
    found, wrong = located(kind, broken_backward, layer, how)
    assert found.value is None
    assert found.gradient is not None and found.first is found.gradient
    assert found.gradient.node.name in wrong, str(found)


@pytest.mark.parametrize("layer", [0, 5])
@pytest.mark.parametrize("fault", [wrong_scale, wrong_heads])
def test_grouped_heads(fault: Fault, layer: int) -> None:
    found, wrong = located("llama", fault, layer, "recorded")
    assert found.value is not None
    assert found.value.node.name in wrong, str(found)


@pytest.mark.parametrize("how", ["recorded", "between"])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_a_right_rewrite_passes(kind: str, how: str) -> None:
    diff, _ = rewritten(kind, nothing, 0, how)
    assert len(calls(diff.after, ATTENTION)) == LAYERS
    tokens = captured(kind)[1]
    found = diff.check(*tokens)
    assert found.ok, str(found)
    assert found.dtype is torch.float64
    compared = [row for row in found.rows if row.value is not None]
    assert len(compared) > 10 * LAYERS
    assert sum(row.gradient is not None for row in compared) > 10 * LAYERS
    assert all(len(line) <= 80 for line in str(found).splitlines())
    own = diff.check(*tokens, dtype=None)
    assert own.ok and own.dtype is None, str(own)


def test_the_text_names_the_line() -> None:
    found, _ = located("gpt", wrong_scale, 3, "recorded")
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
    diff, _ = rewritten("gpt", nothing, 0, "recorded")
    with pytest.raises(FxportError, match="0 inputs were passed, but 1 are taken"):
        diff.check()


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
