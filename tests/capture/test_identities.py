"""Models that tell their modules apart by identity, in ways that a copy does not copy."""

import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxport
from fxport.capture.clone import clone_for_capture
from fxport.errors import PortError


class Model(nn.Module):
    """Four layers, of which the second counts twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(23, 12)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.head = nn.Linear(12, 23)

    def step(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + self.step(layer, x).tanh()
        return self.head(x)


class Twice:
    def __init__(self, which: Callable[[nn.Module], bool]) -> None:
        self.which = which

    def step(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x) * (2.0 if self.which(layer) else 1.0)


def closure(model: Model) -> None:
    layers = model.layers
    model.step = lambda layer, x: layer(x) * (2.0 if layer is layers[1] else 1.0)


def closure_over_the_model(model: Model) -> None:
    model.step = lambda layer, x: layer(x) * (2.0 if layer is model.layers[1] else 1.0)


def closure_over_a_large_mapping(model: Model) -> None:
    words: dict[str, Any] = {str(number): number for number in range(5000)}
    words["twice"] = model.layers[1]
    model.step = lambda layer, x: layer(x) * (2.0 if layer is words["twice"] else 1.0)


def closure_over_a_list(model: Model) -> None:
    chosen = {"twice": [model.layers[1]]}
    model.step = lambda layer, x: (
        layer(x) * (2.0 if any(layer is one for one in chosen["twice"]) else 1.0)
    )


def inner_function(model: Model) -> None:
    second = model.layers[1]

    def factor(layer: nn.Module) -> float:
        return 2.0 if layer is second else 1.0

    model.step = lambda layer, x: layer(x) * factor(layer)


def calls_itself(model: Model) -> None:
    second = model.layers[1]

    def step(layer: nn.Module, x: Tensor, times: int = 1) -> Tensor:
        return step(layer, x, 2) if layer is second and times == 1 else layer(x) * times

    model.step = step


def default(model: Model) -> None:
    def step(layer: nn.Module, x: Tensor, second: nn.Module = model.layers[1]) -> Tensor:
        return layer(x) * (2.0 if layer is second else 1.0)

    model.step = step


def keyword_default(model: Model) -> None:
    def step(layer: nn.Module, x: Tensor, *, second: nn.Module = model.layers[1]) -> Tensor:
        return layer(x) * (2.0 if layer is second else 1.0)

    model.step = step


def partial(model: Model) -> None:
    second = model.layers[1]
    model.step = functools.partial(lambda k, layer, x: layer(x) * (k if layer is second else 1), 2)


def function_of_an_object(model: Model) -> None:
    second = model.layers[1]
    model.twice = Twice(lambda layer: layer is second)
    model.step = model.twice.step


def functions_in_a_list(model: Model) -> None:
    second = model.layers[1]
    model.steps = [lambda layer, x: layer(x) * (2.0 if layer is second else 1.0)]
    model.step = lambda layer, x: model.steps[0](layer, x)


class Steps(list[Any]):
    """A list of their own kind."""


def functions_in_a_list_of_their_own(model: Model) -> None:
    second = model.layers[1]
    model.steps = Steps([lambda layer, x: layer(x) * (2.0 if layer is second else 1.0)])
    model.step = lambda layer, x: model.steps[0](layer, x)


def attribute_of_a_function(model: Model) -> None:
    second = model.layers[1]

    def step(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x) * (step.factor if layer is second else 1.0)  # type: ignore[attr-defined]

    step.factor = 2.0  # type: ignore[attr-defined]
    model.step = step


def name_not_assigned_yet(model: Model) -> None:
    layers = model.layers
    model.step = lambda layer, x: (
        never(layer) if x is None else (layer(x) * (2.0 if layer is layers[1] else 1.0))
    )
    if model is None:
        never = Model  # a cell without a value


def hook(model: Model) -> None:
    second = model.layers[1]
    for layer in model.layers:
        layer.register_forward_hook(lambda m, _, y: y * 2.0 if m is second else y)


def other_forward(model: Model) -> None:
    second = model.layers[1]

    def forward(self: Model, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + (layer(x) * (2.0 if layer is second else 1.0)).tanh()
        return self.head(x)

    model.forward = types.MethodType(forward, model)


def weak_reference(model: Model) -> None:
    model.second = weakref.ref(model.layers[1])
    model.step = lambda layer, x: layer(x) * (2.0 if layer is model.second() else 1.0)


SPELLINGS = [
    closure, closure_over_the_model, closure_over_a_large_mapping, closure_over_a_list,
    inner_function, calls_itself, default,
    keyword_default, partial, function_of_an_object, functions_in_a_list, hook, other_forward,
    weak_reference, functions_in_a_list_of_their_own, name_not_assigned_yet,
    attribute_of_a_function,
]  # fmt: skip


def built(change: Callable[[Any], None]) -> Model:
    model = Model().double()
    change(model)
    return model


@pytest.mark.parametrize("change", SPELLINGS, ids=lambda change: change.__name__)
def test_a_copy_takes_the_path_of_the_original(change: Callable[[Any], None]) -> None:
    model, plain = built(change), Model().double()
    ids = torch.randint(23, (2, 7), generator=torch.Generator().manual_seed(1))
    wanted = model(ids)
    assert not torch.allclose(wanted, plain(ids)), "the second layer must count twice"
    held = {name: id(value) for name, value in vars(model).items()}
    clone = clone_for_capture(model)
    assert torch.equal(clone(ids), wanted)
    assert {name: id(value) for name, value in vars(model).items()} == held
    # Layers of their own: only a copy that calls its own gives these numbers.
    for layer in clone.layers:
        layer.weight = nn.Parameter(layer.weight.detach() * 3.0)
    for layer in model.layers:
        layer.weight.data.mul_(3.0)
    assert torch.equal(clone(ids), model(ids))


def test_gradients_too() -> None:
    model = built(closure)
    part = fxport.parallelize(model, fxport.ParallelContext(0, 1))
    ids = torch.randint(23, (2, 7), generator=torch.Generator().manual_seed(1))
    for module in (model, part):
        module(ids).square().mean().backward()
    mine = dict(part.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-12, atol=1e-12)


def by_number(model: Model) -> None:
    model.twice = {id(model.layers[1])}
    model.step = lambda layer, x: layer(x) * (2.0 if id(layer) in model.twice else 1.0)


def by_number_as_a_key(model: Model) -> None:
    model.factors = {id(model.layers[1]): 2.0}
    model.step = lambda layer, x: layer(x) * model.factors.get(id(layer), 1.0)


def by_number_in_a_closure(model: Model) -> None:
    second = id(model.layers[1])
    model.step = lambda layer, x: layer(x) * (2.0 if id(layer) == second else 1.0)


def by_number_in_a_default(model: Model) -> None:
    def step(layer: nn.Module, x: Tensor, factors: Any = {id(model.layers[1]): 2.0}) -> Tensor:  # noqa: B006, B008
        return layer(x) * factors.get(id(layer), 1.0)

    model.steps = [step]
    model.step = lambda layer, x: model.steps[0](layer, x)


def by_weak_key_in_a_closure(model: Model) -> None:
    factors = weakref.WeakKeyDictionary({model.layers[1]: 2.0})
    model.step = lambda layer, x: layer(x) * factors.get(layer, 1.0)


def by_weak_key(model: Model) -> None:
    model.factors = weakref.WeakKeyDictionary({model.layers[1]: 2.0})
    model.step = lambda layer, x: layer(x) * model.factors.get(layer, 1.0)


def by_global(model: Model) -> None:
    globals()["SECOND"] = model.layers[1]
    model.step = lambda layer, x: layer(x) * (2.0 if layer is SECOND else 1.0)  # noqa: F821


def _in_a_function(layer: nn.Module) -> bool:
    return layer in LIST  # type: ignore[name-defined]  # noqa: F821


def by_global_of_a_function(model: Model) -> None:
    globals()["LIST"] = [model.layers[1]]
    model.step = lambda layer, x: layer(x) * (2.0 if _in_a_function(layer) else 1.0)


def by_class(model: Model) -> None:
    second = model.layers[1]

    class Other(Model):
        def step(self, layer: nn.Module, x: Tensor) -> Tensor:
            return layer(x) * (2.0 if layer is second else 1.0)

    model.__class__ = Other


def by_class_through_a_function(model: Model) -> None:
    second = model.layers[1]

    def is_second(layer: nn.Module) -> bool:
        return layer is second

    class Other(Model):
        def step(self, layer: nn.Module, x: Tensor) -> Tensor:
            return layer(x) * (2.0 if is_second(layer) else 1.0)

    model.__class__ = Other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (by_number, r"`twice` knows `layers\.1` by its id"),
        (by_number_as_a_key, r"`factors` knows `layers\.1` by its id"),
        (by_number_in_a_closure, r"`step` knows `layers\.1` by its id"),
        (by_number_in_a_default, r"`steps` knows `layers\.1` by its id"),
        (by_weak_key_in_a_closure, r"`step` knows `layers\.1` by its id or a weak key"),
        (by_weak_key, r"`factors` knows `layers\.1` by its id or a weak key"),
        (by_global, r"the global `SECOND`, which is a part of the model"),
        (by_global_of_a_function, r"the global `LIST`, which is a part of the model"),
        (by_class, r"step` closes over a module of the model"),
        (by_class_through_a_function, r"is_second` closes over a module of the model"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_copy_has_no_part_in_is_refused(
    change: Callable[[Any], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SECOND", "LIST"):
        monkeypatch.setitem(globals(), name, None)
    with pytest.raises(PortError, match=message):
        clone_for_capture(built(change))


def test_globals_that_forward_does_not_read_are_nobodys_business(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = built(closure)
    monkeypatch.setitem(globals(), "SECOND", model)
    ids = torch.arange(5)[None]
    assert torch.equal(clone_for_capture(model)(ids), model(ids))


def test_functions_that_know_no_module_are_shared() -> None:
    """They may hold a state of their own, which is watched elsewhere."""
    model, count = Model(), [0]
    model.step = lambda layer, x: layer(x) + count[0]
    assert vars(clone_for_capture(model))["step"] is vars(model)["step"]
    assert vars(copy.deepcopy(model))["step"] is vars(model)["step"]
