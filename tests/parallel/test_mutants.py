"""Broken emissions: each is caught, and the test says by which check."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from fxport.parallel.context import ParallelContext
from fxport.parallel.modules import CopyTo, Gather, ReduceFrom, SharedGradient
from fxport.passes.tensor_parallel.build import Prepared, prepare
from fxport.passes.tensor_parallel.checker import check
from fxport.passes.tensor_parallel.origins import check_origins
from tests.parallel.models import MODELS
from tests.parallel.simulation import Ranks, compare, make_once, randomised

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


STATES, ORIGINS = {"states"}, {"origins"}
NUMBERS: set[str] = set()
# name -> (model, mutation, which static checks see it; the simulation sees all)
MUTANTS: dict[str, tuple[str, Callable[[fx.GraphModule], None], set[str]]] = {
    "forward collective dropped": ("separate", _drop(ReduceFrom), STATES),
    "backward collective dropped": ("separate", _drop(CopyTo), STATES),
    "bias before the reduce": ("separate", _bias_before_reduce, STATES),
    "replicated gradient not summed": ("norm by head", _drop(CopyTo, parameter=True), STATES),
    "shared kv gradient not summed": ("grouped, few kv heads", _drop(SharedGradient, True), STATES),
    "wrong kv mapping": ("grouped", _wrong_kv_mapping, ORIGINS),
    "columns of other features": ("separate", _other_columns, ORIGINS),
    "mask off by one row": ("separate", _rows_of_another_rank, STATES),
    "head not padded": ("separate", _not_padded, STATES),
    "collective of another group": ("separate", _other_group, STATES),
    "kv mapping shifted": ("grouped", _shifted_kv, ORIGINS),
    "nonlinearity before the reduce": ("separate", _reduced_late, STATES),
    "moment of a part": ("norm over all heads", _moment_of_a_part, NUMBERS),
}


@functools.cache
def _prepared(name: str) -> tuple[nn.Module, Prepared]:
    model = randomised(MODELS[name]())
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


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    model_name, mutate, seen_by = MUTANTS[name]
    model, ranks = _mutated(model_name, mutate)
    assert _simulation_fails(model, ranks), "not caught by the simulation"
    module = ranks.modules[0]
    found = {
        "states": check(module, module.plan, 0),
        "origins": check_origins(_prepared(model_name)[1].graph.graph, module, module.plan, 0),
    }
    assert {name for name, errors in found.items() if errors} == seen_by
