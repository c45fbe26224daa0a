"""Models whose attributes hold what nothing can copy."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxport.api import trainable
from fxport.capture.clone import clone_for_capture, clone_to_run
from fxport.capture.export import capture
from fxport.errors import PortError, ReasonCode

SHARED = (n for n in range(3))


class Config:
    """A plain object that a lock, a file and a generator lie in."""

    def __init__(self, path: Path) -> None:
        self.width = 8
        self.parts: dict[str, Any] = {"lock": threading.RLock(), "log": path.open("w")}
        self.numbers = (n for n in range(9))


class Layer(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor], held: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.use, self.held = use, held

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.use(self.held, x)).tanh()


class Holding(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor], held: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(29, 8)
        self.layers = nn.ModuleList(Layer(use, held) for _ in range(4))
        self.head = nn.Linear(8, 29)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def locked(lock: Any, x: Tensor) -> Tensor:
    with lock:
        return x + 1


def computed(module: Any, x: Tensor) -> Tensor:
    return x * module.sqrt(2.0)


def unless_none(held: Any, x: Tensor) -> Tensor:
    return x if held is None else x * 2


def by_config(config: Any, x: Tensor) -> Tensor:
    with config.parts["lock"]:
        return x * config.width


def same_numbers(model: nn.Module) -> None:
    captured = capture(model)
    ids = torch.randint(0, 29, (3, 19))
    inputs = captured.graph.graph.find_nodes(op="placeholder")
    given = [captured.parameters.get(n.meta["input"].name, ids) for n in inputs]
    with torch.no_grad():
        torch.testing.assert_close(captured.graph(*given), model(ids), rtol=0, atol=0)


def numbers() -> Iterator[int]:
    yield from range(9)


@pytest.mark.parametrize(
    ("use", "held"),
    [
        (locked, threading.Lock()),
        (locked, threading.RLock()),
        (computed, math),
        (unless_none, numbers()),
        (unless_none, {"a": [numbers()]}),
        (unless_none, (io.StringIO(), io.FileIO(__file__))),
        (unless_none, {}.keys()),
        (lambda held, x: x if held else x * 2, numbers()),
    ],
    ids=["lock", "reentrant lock", "module", "generator", "nested", "file", "view", "true"],
)
def test_what_forward_does_not_need_is_in_no_way(use: Any, held: Any) -> None:
    same_numbers(Holding(use, held).eval())


def test_an_object_is_copied_but_for_what_cannot_be(tmp_path: Path) -> None:
    config = Config(tmp_path / "log.txt")
    model = Holding(by_config, config).eval()
    same_numbers(model)
    for made in (clone_for_capture(model), clone_to_run(model)):
        held: Any = made.get_submodule("layers.0").held
        assert held is not config and held.parts["lock"] is not config.parts["lock"]
        assert held is made.get_submodule("layers.3").held
    assert next(config.numbers) == 0
    assert config.parts["log"].tell() == 0


def test_a_tensor_with_a_history_inside_a_list_is_shared() -> None:
    weight = torch.ones(8, requires_grad=True)
    held = [weight * 2]
    model = Holding(lambda held, x: x * held[0], held).eval()
    with torch.no_grad():
        want = model(torch.arange(5)[None])
        torch.testing.assert_close(clone_for_capture(model)(torch.arange(5)[None]), want)


USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "called": lambda held, x: x * next(held),
    "read": lambda held, x: x if held.gi_running else x * 2,
    "a length": lambda held, x: x * len(held),
    "a kind": lambda held, x: x if isinstance(held, Iterator) else x * 2,
    "looped over": lambda held, x: x * sum(held),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_forward_uses_is_refused_by_name(use: Callable[[Any, Tensor], Tensor]) -> None:
    held = (n + 1 for n in range(99))
    with pytest.raises(PortError) as refused:
        capture(Holding(use, held).eval())
    (reason,) = refused.value.reasons
    assert reason.code is ReasonCode.CAPTURE_FAILED
    assert reason.location is not None and "test_uncopied" in reason.location.file
    assert next(held) == 1  # nobody took one
    if use is not USES["a length"]:  # a generator has none, in the model itself
        assert "`layers.0.held` (generator)" in reason.message


def test_a_use_is_refused_also_where_its_error_is_caught() -> None:
    def use(held: Any, x: Tensor) -> Tensor:
        try:
            return x * next(held)
        except Exception:
            return x

    with pytest.raises(PortError, match=r"layers\.0\.held"):
        capture(Holding(use, numbers()).eval())


def test_what_is_a_global_too_is_refused() -> None:
    model = Holding(lambda held, x: x if held is SHARED else x * 2, SHARED).eval()
    with pytest.raises(PortError, match=r"`layers\.0\.held`.*global"):
        capture(model)


def test_what_no_copy_can_be_made_around_is_named() -> None:
    class Odd:
        def __deepcopy__(self, memo: Any) -> Any:
            raise ValueError("not me")

    model = Holding(lambda held, x: x, [Odd()]).eval()
    same_numbers(model)


def test_a_module_to_train_shares_what_cannot_be_copied() -> None:
    held = numbers()
    made: Any = trainable(Holding(lambda held, x: x, held))
    assert made.layers[0].held is held
