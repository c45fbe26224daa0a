"""Broken emissions: each is caught, and the test says by which check."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from fxport.parallel.modules import CopyTo, ReduceFrom, SharedGradient
from fxport.passes.tensor_parallel.checker import check
from tests.parallel.models import MODELS
from tests.parallel.simulation import Ranks, compare, make, randomised

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
        if node.target is aten.add.Tensor and node.args[0].op == "call_module":
            reduced, bias = node.args
            linear = reduced.args[0]
            if linear.target is aten.linear.default and bias.op == "get_attr":
                linear.args = (*linear.args[:2], bias)
                linear.prepend(bias)
                node.replace_all_uses_with(reduced)
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


# name -> (model, mutation, whether the independent checker sees it; the simulation sees all)
MUTANTS = {
    "forward collective dropped": ("separate", _drop(ReduceFrom), True),
    "backward collective dropped": ("separate", _drop(CopyTo), True),
    "bias before the reduce": ("separate", _bias_before_reduce, True),
    "replicated gradient not summed": ("norm by head", _drop(CopyTo, parameter=True), True),
    "shared kv gradient not summed": ("grouped, few kv heads", _drop(SharedGradient, True), True),
    "wrong kv mapping": ("grouped", _wrong_kv_mapping, False),
}


def _mutated(name: str, mutate: Callable[[fx.GraphModule], None]) -> tuple[object, Ranks]:
    model = randomised(MODELS[name]())
    ranks = make(model, 3 if "few" in name else 2)
    assert compare(model, ranks).gradient < 1e-12
    for module in ranks.modules:
        mutate(module)
        module.graph.lint()
        module.recompile()
    return model, ranks


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    model_name, mutate, seen_by_checker = MUTANTS[name]
    model, ranks = _mutated(model_name, mutate)
    errors = compare(model, ranks)  # type: ignore[arg-type]
    assert max(errors.output, errors.gradient) > 1e-6, "not caught by the simulation"
    module = ranks.modules[0]
    assert bool(check(module, module.plan, 0)) is seen_by_checker
