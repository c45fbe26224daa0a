"""Per-head modules, latent attention, weights of all experts in one tensor: divided and exact."""

from __future__ import annotations

import pytest
import torch

import fxport
from fxport.parallel.modules import CopyTo, ReduceFrom
from fxport.passes.tensor_parallel.build import prepare
from fxport.passes.tensor_parallel.checker import check
from fxport.passes.tensor_parallel.parts import WHOLE
from tests.parallel.further import FURTHER, Heads, Narrow, OneLayer, OtherHeads, convolved
from tests.parallel.models import HEAD, HIDDEN, VOCAB, WIDTH, Mlp, Separate
from tests.parallel.simulation import Ranks, compare, make_once, randomised
from tests.parallel.wider import EXPERTS

aten = torch.ops.aten
ATTENTION = torch.ops.fxport.attention.default

# name -> all-reduces of the layer: forward, backward
PRICE = {
    "turned weights": (2, 2),
    "head modules": (2, 2),
    "latent": (2, 4),  # queries, the latent vector and the part for all heads
    "falcon": (2, 2),
    "scaled": (2, 2),
    "grouped": (2, 2),
    "convolutions over one": (2, 2),
    "normed weights": (2, 4),  # and the gradients of two whole weights
    "result by head": (2, 2),
    "tied by a product": (2, 2),
    "parts of one weight": (2, 2),
    "stacked weights": (2, 2),
    "gated heads": (2, 2),
    "gates by masks": (2, 3),
    "experts that add to their rows": (2, 3),
    "selected experts": (2, 3),  # a gate is one number per expert and token
    "stacked experts": (2, 3),
    "experts in one matrix": (2, 3),
    "head gates": (2, 2),
    "weighed experts": (2, 3),
    "narrow experts": (2 + 2, 3 + 2),  # and both moments of the attention's results
}
# of 3 ranks: one could not work on its heads, so none does
UNEVEN = {"grouped": (1, 1)}
DIVIDED = {
    "turned weights": ("attention.q.weight", (WIDTH, 2 * HEAD)),
    "head modules": ("attention.heads.3.q.weight", (0, WIDTH)),  # on the other rank
    "latent": ("attention.up.weight", (2 * 2 * HEAD, 12)),
    "falcon": ("attention.qkv.weight", (2 * 4 * HEAD, WIDTH)),
    "scaled": ("attention.heat", (2,)),
    "grouped": ("attention.out.weight", (WIDTH, 3 * HEAD)),
    "convolutions over one": ("mlp.down.conv.weight", (WIDTH, HIDDEN // 2, 1)),
    "normed weights": ("mlp.up.parametrizations.weight.original1", (HIDDEN, WIDTH)),
    "result by head": ("attention.out", (2, HEAD, WIDTH)),
    "tied by a product": ("mlp.up.weight", (HIDDEN // 2, WIDTH)),
    "parts of one weight": ("attention.bias", (3 * 2 * HEAD,)),
    "stacked weights": ("attention.qkv", (3, 2 * HEAD, WIDTH)),
    "gated heads": ("attention.turn", (2, HEAD, HEAD)),
    "gates by masks": ("mlp.up", (EXPERTS, WIDTH, HIDDEN // 2)),
    "experts that add to their rows": ("mlp.experts.0.up.weight", (HIDDEN // 2, WIDTH)),
    "selected experts": ("mlp.up", (EXPERTS, WIDTH, HIDDEN // 2)),
    "stacked experts": ("mlp.down", (EXPERTS, WIDTH, HIDDEN // 2)),
    "experts in one matrix": ("mlp.down", (EXPERTS * HIDDEN // 2, WIDTH)),
    "head gates": ("attention.gate.weight", (4, WIDTH)),
    "weighed experts": ("mlp.down", (EXPERTS, HIDDEN // 2, WIDTH)),
    "narrow experts": ("mlp.up", (EXPERTS, WIDTH, HIDDEN // 4 - 5)),
}


@pytest.mark.parametrize("name", FURTHER)
def test_outputs_and_every_gradient_at_the_price(name: str) -> None:
    model = randomised(FURTHER[name]())
    for ranks in make_once(model, 2, 3):
        errors = compare(model, ranks)
        assert errors.output < 1e-12 and errors.gradient < 1e-12, errors
        plan = ranks.modules[0].plan
        # one more each way for the divided vocabulary: embedding forward, head backward
        price = UNEVEN.get(name, PRICE[name]) if plan.world_size == 3 else PRICE[name]
        assert (plan.count("forward") - 1, plan.count("backward") - 1) == price
        assert plan.shard("embed.weight").kind == "vocabulary"
        if plan.world_size == 2:
            parameter, shape = DIVIDED[name]
            assert plan.shard(f"block.{parameter}").local_shape(0) == shape


def _attentions(model: torch.nn.Module) -> int:
    return sum(n.target is ATTENTION for n in prepare(model).graph.graph.nodes)


def test_heads_that_are_alike_become_one_attention_and_others_do_not() -> None:
    assert _attentions(OneLayer(Heads(), Mlp())) == 1
    model = randomised(OneLayer(OtherHeads(), Mlp()))
    assert _attentions(model) == 4
    (ranks,) = make_once(model, 2)
    assert compare(model, ranks).gradient < 1e-12
    assert any("fewer units" in r.reason for r in ranks.modules[0].plan.replicated)


@pytest.mark.parametrize(("features", "price"), [(WIDTH // 4, 2), (WIDTH // 4 + 1, 3)])
def test_what_is_narrow_is_not_worth_a_reduction(features: int, price: int) -> None:
    model = randomised(OneLayer(Separate(), Narrow(features)))
    (ranks,) = make_once(model, 2)
    assert compare(model, ranks).gradient < 1e-12
    plan = ranks.modules[0].plan
    assert plan.count("forward") - 1 == price
    whole = plan.shard("block.mlp.less.weight").kind == "replicated"
    said = any(r.reason == "less to gain than to send" for r in plan.replicated)
    assert whole == said == (price == 2)
    # `rate` is one number
    full = fxport.gather_state_dict(plan, [m.state_dict() for m in ranks.modules])
    for name, value in model.state_dict().items():
        assert torch.equal(full[name], value), name


def test_what_an_op_without_a_rule_reads_is_whole_and_said_to_be() -> None:
    """A convolution over several tokens; the attention beside it is divided."""
    model = randomised(OneLayer(Separate(), convolved(Mlp(), 3)))
    (ranks,) = make_once(model, 2)
    assert compare(model, ranks).gradient < 1e-12
    plan = ranks.modules[0].plan
    assert plan.shard("block.mlp.up.conv.weight").kind == "replicated"
    assert plan.shard("block.attention.q.weight").kind == "column"
    said = {what: r.reason for r in plan.replicated for what in r.what.split()}
    assert "no rule for aten.conv1d" in said["block.mlp.up.conv"], said
    assert "no rule for aten.pad" in said["block.mlp.down.conv"], said


def _drop(ranks: Ranks, kind: type, index: int = 0) -> None:
    for module in ranks.modules:
        calls = [
            n
            for n in module.graph.nodes
            if n.op == "call_module" and isinstance(module.get_submodule(n.target), kind)
        ]
        calls[index].replace_all_uses_with(calls[index].args[0])
        module.graph.erase_node(calls[index])
        module.recompile()


def _seen(ranks: Ranks) -> list[str]:
    module = ranks.modules[0]
    return check(module, module.plan, 0)


def test_a_sum_over_the_experts_that_is_not_reduced_is_seen() -> None:
    model = randomised(FURTHER["stacked experts"]())
    (ranks,) = make_once(model, 2)
    _drop(ranks, ReduceFrom, -1)
    assert _seen(ranks) and compare(model, ranks).output > 1e-6


@pytest.mark.parametrize("shape", [(2 * EXPERTS, HIDDEN // 2, WIDTH), (HIDDEN, EXPERTS, WIDTH)])
def test_a_view_of_a_part_that_is_not_what_it_says_is_seen(shape: tuple[int, ...]) -> None:
    (ranks,) = make_once(randomised(FURTHER["experts in one matrix"]()), 2)
    assert not _seen(ranks)
    for node in ranks.modules[0].graph.nodes:
        if WHOLE in node.meta:
            node.meta[WHOLE] = shape
    assert _seen(ranks)


def test_gates_that_do_not_enter_are_seen() -> None:
    model = randomised(FURTHER["selected experts"]())
    (ranks,) = make_once(model, 2)
    _drop(ranks, CopyTo, -2)
    assert _seen(ranks) and compare(model, ranks).gradient > 1e-6


def test_a_late_reduction_past_a_nonlinearity_is_seen() -> None:
    """silu(sum of the ranks) is not the sum of silu: the reduction may not move behind it."""
    model = randomised(FURTHER["latent"]())
    (ranks,) = make_once(model, 2)
    for module in ranks.modules:
        reduced = [n for n in module.graph.nodes if n.op == "call_module" and
                   isinstance(module.get_submodule(n.target), ReduceFrom)][1]  # fmt: skip
        summand = reduced.args[0]
        with module.graph.inserting_before(reduced):
            bent = module.graph.call_function(aten.silu.default, (summand,))
        reduced.args = (bent,)
        module.recompile()
    assert _seen(ranks)


def test_padding_learns_nothing() -> None:
    model = randomised(FURTHER["falcon"]())
    (ranks,) = make_once(model, 2)
    model.zero_grad()

    def work(rank: int) -> torch.Tensor | None:
        ranks.modules[rank](torch.full((1, 3), 5)).sum().backward()
        return ranks.modules[rank].get_parameter("embed.weight").grad

    first, second = ranks.contexts[0].group.run(work)
    assert first.shape[0] + second.shape[0] == VOCAB
    assert not first[5].any()
