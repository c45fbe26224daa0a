"""Broken emissions: each is caught, and the test says by which check."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from fxport.parallel.context import ParallelContext
from fxport.parallel.modules import CopyTo, Gather, ReduceFrom, SharedGradient
from fxport.passes.tensor_parallel.boxes import select
from fxport.passes.tensor_parallel.build import Prepared, prepare
from fxport.passes.tensor_parallel.checker import check
from fxport.passes.tensor_parallel.numbers import check_numbers, check_values
from fxport.passes.tensor_parallel.origins import check_origins
from fxport.passes.tensor_parallel.taken import TAKEN
from tests.parallel.further import FURTHER
from tests.parallel.models import HEAD, MODELS
from tests.parallel.simulation import Ranks, compare, make_once, randomised
from tests.parallel.wider import WIDER

aten = torch.ops.aten


def _drop(kind: type, parameter: bool = False) -> Callable[[fx.GraphModule], None]:
    def mutate(module: fx.GraphModule) -> None:
        for node in module.graph.nodes:
            if node.op != "call_module" or not isinstance(module.get_submodule(node.target), kind):
                continue
            if (node.args[0].op == "get_attr") is parameter:
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
                return
        raise AssertionError("nothing to drop")

    return mutate


def _bias_before_reduce(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.target is not aten.add.Tensor or node.args[1].op != "get_attr":
            continue
        stream, bias = node.args
        for user in node.users:  # stream + bias + the reduced sum
            linear = user.args[0].args[0] if user.args[0].op == "call_module" else None
            if linear is not None and linear.target is aten.linear.default:
                linear.args = (*linear.args[:2], bias)
                linear.prepend(bias)
                node.replace_all_uses_with(stream)
                return
    raise AssertionError("no row-parallel bias")


def _wrong_kv_mapping(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.target is torch.ops.fxport.attention.default:
            with module.graph.inserting_before(node):
                k = module.graph.call_function(aten.flip.default, (node.kwargs["k"], [1]))
            node.kwargs = {**node.kwargs, "k": k}
            return
    raise AssertionError("no attention")


def _other_columns(module: fx.GraphModule) -> None:
    """The hidden features in another order than the columns of the weight."""
    for node in module.graph.nodes:
        if node.target is aten.linear.default and "down" in str(node.args[1].target):
            with module.graph.inserting_before(node):
                flipped = module.graph.call_function(aten.flip.default, (node.args[0], [-1]))
            node.args = (flipped, *node.args[1:])
            return
    raise AssertionError("no MLP")


def _rows_of_another_rank(module: fx.GraphModule) -> None:
    """The token ids are shifted by one row too many."""
    for node in module.graph.nodes:
        if node.target is aten.embedding.default and "embed" in node.args[0].target:
            shift = next(n for n in module.graph.nodes if n.target is aten.sub.Tensor)
            shift.args = (shift.args[0], shift.args[1] + 1)
            return
    raise AssertionError("no divided table")


def _not_padded(module: fx.GraphModule) -> None:
    """41 logits on 2 ranks, as if both had 20."""
    for child in module.children():
        if isinstance(child, Gather):
            child.sizes = (20, 20)
            return
    raise AssertionError("no divided head")


def _other_group(module: fx.GraphModule) -> None:
    """The first gradient is summed over one rank."""
    next(m for m in module.children() if isinstance(m, CopyTo)).context = ParallelContext(0, 1)


def _moment_of_a_part(module: fx.GraphModule) -> None:
    """A mean over this rank's features, not over all."""
    for node in module.graph.nodes:
        if node.target is aten.sum.dim_IntList:
            divided = next(iter(node.users))
            divided.args = (divided.args[0], divided.args[1] // 2)
            return
    raise AssertionError("no moment")


def _shifted_kv(module: fx.GraphModule) -> None:
    """Every query head is attended with the key head beside its own."""
    for node in module.graph.nodes:
        if node.target is torch.ops.fxport.attention.default:
            with module.graph.inserting_before(node):
                k = module.graph.call_function(aten.roll.default, (node.kwargs["k"], [1], [1]))
            node.kwargs = {**node.kwargs, "k": k}
            return
    raise AssertionError("no attention")


def _reduced_late(module: fx.GraphModule) -> None:
    """The nonlinearity of what should have been summed first."""
    for node in module.graph.nodes:
        if node.op == "call_module" and isinstance(module.get_submodule(node.target), ReduceFrom):
            with module.graph.inserting_before(node):
                node.args = (module.graph.call_function(aten.gelu.default, node.args),)
            return
    raise AssertionError("no reduction")


def _rolled(name: str, dim: int = 0) -> Callable[[fx.GraphModule], None]:
    """A divided parameter, one position on."""

    def mutate(module: fx.GraphModule) -> None:
        node = next(n for n in module.graph.nodes if n.op == "get_attr" and name in n.target)
        with module.graph.inserting_after(node):
            rolled = module.graph.call_function(aten.roll.default, (node, [1], [dim]))
        node.replace_all_uses_with(rolled, delete_user_cb=lambda user: user is not rolled)

    return mutate


def _gate_beside_another_up(module: fx.GraphModule) -> None:
    node = next(n for n in module.graph.nodes if n.target is aten.silu.default)
    with module.graph.inserting_before(node):
        gate = module.graph.call_function(aten.roll.default, (node.args[0], [1], [-1]))
    node.args = (gate,)


def _sum_of_fewer(module: fx.GraphModule) -> None:
    """Of a moment: only the first head's."""
    node = next(n for n in module.graph.nodes if n.target is aten.sum.dim_IntList)
    with module.graph.inserting_before(node):
        fewer = module.graph.call_function(aten.slice.Tensor, (node.args[0], -1, 0, HEAD, 1))
    node.args = (fewer, *node.args[1:])


def _heads_added_up(module: fx.GraphModule) -> None:
    """A sum within each head, over the ranks, too."""
    calls = {k: v for k, v in module.named_children() if isinstance(v, CopyTo | ReduceFrom)}
    reduce, enter = (
        next(k for k in calls if isinstance(calls[k], t)) for t in (ReduceFrom, CopyTo)
    )
    node = next(n for n in module.graph.nodes if n.target is aten.einsum.default)
    with module.graph.inserting_before(node):
        total = module.graph.call_function(aten.sum.dim_IntList, (node.args[1][0], [-1]))
        total = module.graph.call_module(reduce, (total,))
        total = module.graph.call_module(enter, (total,))
    node.replace_all_uses_with(total)


def _divided_by_ranks(module: fx.GraphModule) -> None:
    """A mean over the ranks where there should be a sum."""
    for node in module.graph.nodes:
        if node.op == "call_module" and isinstance(module.get_submodule(node.target), ReduceFrom):
            users = list(node.users)
            with module.graph.inserting_after(node):
                mean = module.graph.call_function(aten.div.Tensor, (node, 2))
            for user in users:
                user.replace_input_with(node, mean)
            return
    raise AssertionError("no reduction")


def _bias_forgotten(module: fx.GraphModule) -> None:
    node = next(n for n in module.graph.nodes if n.op == "get_attr" and "out.bias" in n.target)
    for user in list(node.users):
        user.replace_all_uses_with(user.args[0] if user.args[1] is node else user.args[1])
    module.graph.eliminate_dead_code()


def _parts(module: fx.GraphModule) -> list[fx.Node]:
    """Of whole values; along their rows."""
    return [n for n in module.graph.nodes if TAKEN in n.meta and n.args[1] == 0]


def _part_of_another_rank(module: fx.GraphModule) -> None:
    for node in _parts(module):
        first = next(held for held in node.meta[TAKEN] if held[0] != node.args[2])
        node.args = (node.args[0], 0, first[0], first[-1] + 1, 1)


def _one_part_on_all(module: fx.GraphModule) -> None:
    """Columns of a whole weight that is summed over."""
    node = next(n for n in module.graph.nodes if TAKEN in n.meta and n.args[1] == 1)
    first = node.meta[TAKEN][0]
    node.meta[TAKEN] = (first, first)
    node.args = (*node.args[:2], first[0], first[-1] + 1, 1)


STATES, ORIGINS, NUMBERS = {"states"}, {"origins"}, {"numbers"}
# name -> (models, mutation, which static checks see it; the simulation sees all)
MUTANTS: dict[str, tuple[tuple[str, ...], Callable[[fx.GraphModule], None], set[str]]] = {
    "forward collective dropped": (
        ("separate", "interleaved", "multi-query"), _drop(ReduceFrom), STATES,
    ),
    "backward collective dropped": (("separate", "unbind, packed GLU"), _drop(CopyTo), STATES),
    "bias before the reduce": (("separate", "chunk", "grouped"), _bias_before_reduce, STATES),
    "replicated gradient not summed": (("norm by head",), _drop(CopyTo, parameter=True), STATES),
    "shared kv gradient not summed": (
        ("grouped, few kv heads", "norm over all heads, few"), _drop(SharedGradient, True), STATES,
    ),
    "wrong kv mapping": (
        ("grouped", "split, tied", "turned weights", "einsum"), _wrong_kv_mapping, ORIGINS,
    ),
    "columns of other features": (("separate", "unbind, packed GLU"), _other_columns, ORIGINS),
    "mask off by one row": (("separate", "split, tied"), _rows_of_another_rank, STATES),
    "head not padded": (("separate", "split, tied"), _not_padded, STATES),
    "collective of another group": (("separate",), _other_group, STATES),
    "kv mapping shifted": (("grouped", "interleaved"), _shifted_kv, ORIGINS),
    "nonlinearity before the reduce": (("separate",), _reduced_late, STATES | NUMBERS),
    "moment of a part": (("norm over all heads",), _moment_of_a_part, NUMBERS),
    "a moment's sum over fewer": (("norm over all heads",), _sum_of_fewer, ORIGINS),
    "a moment of other heads": (("narrow experts",), _sum_of_fewer, ORIGINS),
    "a mean over the ranks": (("separate", "turned weights"), _divided_by_ranks, NUMBERS),
    "a bias is not added": (("separate",), _bias_forgotten, ORIGINS),
    "a part of another rank": (("normed weights",), _part_of_another_rank, STATES | ORIGINS),
    "one rank's part on all": (("normed weights",), _one_part_on_all, STATES),
    "sums of heads added up": (
        ("squares summed for each head",), _heads_added_up, ORIGINS | NUMBERS,
    ),
    "a norm's weight of others": (("norm over all heads",), _rolled("q_norm.weight"), ORIGINS),
    "a bias of other rows": (("separate", "chunk"), _rolled("up.bias"), ORIGINS),
    "a scale of other heads": (("learned scale",), _rolled("scale"), ORIGINS),
    "a gate beside another up": (("unbind, packed GLU",), _gate_beside_another_up, ORIGINS),
}  # fmt: skip
CASES = [(name, model) for name, (models, *_) in MUTANTS.items() for model in models]


@functools.cache
def _prepared(name: str) -> tuple[nn.Module, Prepared]:
    model = randomised({**FURTHER, **WIDER, **MODELS}[name]())
    return model, prepare(model, own_modes=True)


def _mutated(name: str, mutate: Callable[[fx.GraphModule], None]) -> tuple[nn.Module, Ranks]:
    model, prepared = _prepared(name)
    (ranks,) = make_once(model, 3 if "few" in name else 2, prepared=prepared)
    assert compare(model, ranks).gradient < 1e-12
    for module in ranks.modules:
        mutate(module)
        module.graph.lint()
        module.recompile()
    return model, ranks


def _simulation_fails(model: nn.Module, ranks: Ranks) -> bool:
    try:
        errors = compare(model, ranks)
    except (AssertionError, RuntimeError):  # another shape
        return True
    return max(errors.output, errors.gradient) > 1e-6


def test_values_of_other_positions_are_seen() -> None:
    model, ranks = _mutated("grouped", lambda _: None)
    whole, module = dict(model.named_parameters()), ranks.modules[1]
    assert not check_values(whole, module, module.plan, 1)
    name = "blocks.0.mlp.up.weight"
    module.get_parameter(name).data.copy_(select(whole[name], module.plan.shard(name).indices[0]))
    (error,) = check_values(whole, module, module.plan, 1)
    assert error.startswith(name)


@pytest.mark.parametrize(("name", "model_name"), CASES)
def test_mutant_is_caught(name: str, model_name: str) -> None:
    _, mutate, seen_by = MUTANTS[name]
    model, ranks = _mutated(model_name, mutate)
    assert _simulation_fails(model, ranks), "not caught by the simulation"
    module = ranks.modules[0]
    found = {
        "states": check(module, module.plan, 0),
        "origins": check_origins(_prepared(model_name)[1].graph.graph, module, module.plan, 0),
        "numbers": check_numbers(_prepared(model_name)[1].graph.graph, module),
    }
    assert {name for name, errors in found.items() if errors} == seen_by
