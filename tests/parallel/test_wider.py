"""Products without nn.Linear, experts, adapters: divided, exact, and at what price."""

from __future__ import annotations

import pytest

import fxport
from fxport.parallel.plan import Plan
from tests.parallel.models import HEAD, HIDDEN, LAYERS, VOCAB, WIDTH
from tests.parallel.simulation import compare, make_once, randomised
from tests.parallel.wider import CHOSEN, WIDER
from tests.zoo.chosen_experts import LOOK_UPS, of_styles
from tests.zoo.experts import EXACT, decoder

# name -> all-reduces of one block: forward, backward of values, backward of parameters. A gate's
# gradient is one number per expert; an adapter's are of its 3 features.
PRICE = {
    "einsum": (2, 2, 0),
    "inferred sizes, type_as": (2, 2, 0),
    "dense experts": (2, 3, 0),
    "oss experts": (2, 3, 0),
    "looped experts": (2, 3, 0),
    "routed experts and a shared one": (2, 3, 0),
    "adapters": (2, 2 + 4, 2),
    "torch's attention": (2, 2, 0),
    "parallel": (1, 1, 0),
    "learned bias": (2, 2, 0),
    "unit length, torch's GLU": (2, 2, 0),
    "value tables": (2, 2, 0),
    "squares summed for each head": (2, 2, 0),
}
# Three ranks: head counts that do not divide. Four: fewer heads than ranks.
RANKS = {"einsum": (2, 8), "oss experts": (2, 4)}


@pytest.mark.parametrize("name", WIDER)
def test_outputs_and_every_gradient_at_the_price(name: str) -> None:
    model = randomised(WIDER[name]()).requires_grad_()
    for ranks in make_once(model, *RANKS.get(name, (2, 3))):
        errors = compare(model, ranks)
        assert errors.output < 1e-12 and errors.gradient < 1e-12, errors
        if len(ranks.modules) == 2:
            pay(ranks.modules[0].plan, *PRICE[name])


def pay(plan: Plan, forward: int, values: int, parameters: int) -> None:
    # one more each way for the divided vocabulary: embedding forward, head backward
    assert plan.count("forward") == forward * LAYERS + 1
    assert plan.count("backward") == values * LAYERS + 1
    assert plan.count("backward", "all_reduce of a parameter's gradient") == parameters * LAYERS


def test_experts_that_get_their_tokens() -> None:
    """A router; each expert works on the tokens it got, however many."""
    model = randomised(decoder(EXACT["indexed add"], layers=1))
    (ranks,) = make_once(model, 2)
    errors = compare(model, ranks)
    assert errors.output < 1e-12 and errors.gradient < 1e-12, errors
    # what the experts add to their rows is added up before it is sent
    assert ranks.modules[0].plan.count("forward") == 2 * 4 + 1


def test_experts_whose_weights_are_looked_up_for_each_row() -> None:
    model = randomised(of_styles(LOOK_UPS))
    two, three = make_once(model, 2, 3)
    for ranks in (two, three):
        errors = compare(model, ranks)
        assert errors.output < 1e-12 and errors.gradient < 1e-12, errors
    # attention; experts, after their weighted sum; the vocabulary
    assert two.modules[0].plan.count("forward") == 2 * LAYERS + 1
    # two heads are not for three ranks
    assert three.modules[0].plan.count("forward") == LAYERS + 1


def test_gates_of_a_wider_dtype_do_not_cost_more() -> None:
    model = WIDER["routed experts and a shared one"]().eval()
    (ranks,) = make_once(model, 2)
    errors = compare(model, ranks)
    assert errors.output < 1e-5 and errors.gradient < 1e-5, errors
    plan = ranks.modules[0].plan
    pay(plan, *PRICE["routed experts and a shared one"])
    sums = {c.elements_per_token for c in plan.collectives if c.kind == "all_reduce"}
    assert sums == {WIDTH, CHOSEN}


def local(plan: Plan, name: str) -> tuple[int, ...]:
    return plan.shard(name).local_shape(0)


def test_weights_of_every_layout_are_divided() -> None:
    plan = fxport.plan(WIDER["einsum"](), 2)
    assert local(plan, "blocks.0.attention.qkv") == (3, WIDTH, 3, 8)  # of 5 heads
    assert local(plan, "blocks.0.attention.out") == (3, 8, WIDTH)
    assert local(plan, "blocks.0.mlp.up") == (WIDTH, HIDDEN // 2)
    assert local(plan, "blocks.0.mlp.down") == (HIDDEN // 2, WIDTH)
    plan = fxport.plan(WIDER["oss experts"](), 2)  # the same part of each of 3 experts
    assert local(plan, "blocks.0.mlp.up") == (3, WIDTH, HIDDEN)
    assert local(plan, "blocks.0.mlp.down") == (3, HIDDEN // 2, WIDTH)


def test_a_dtype_taken_from_the_residual_stream_does_not_tie_the_heads_to_it() -> None:
    plan = fxport.plan(WIDER["inferred sizes, type_as"](), 2)
    for name in ("q", "k", "v", "out"):
        assert plan.shard(f"blocks.0.attention.{name}.weight").kind in ("column", "row")


def test_a_table_of_values_is_cut_with_the_heads_and_the_token_embedding_is_not() -> None:
    plan = fxport.plan(WIDER["value tables"](), 2)
    assert local(plan, "tables.0.weight") == (VOCAB, 2 * HEAD)
    assert plan.shard("embed.weight").kind == "vocabulary"
    plan = fxport.plan(WIDER["unit length, torch's GLU"](), 2)
    assert local(plan, "blocks.0.mlp.gate_up.weight") == (HIDDEN, WIDTH)
    assert plan.shard("blocks.0.attention.q.weight").kind == "column"
