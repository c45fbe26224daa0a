"""The helpers of `fxport.testing` fail when, and only when, something is wrong."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxport import pytest_plugin
from fxport.errors import FxportError
from fxport.fx_text import graph_text
from fxport.testing import assert_golden, assert_rewrites, assert_same
from tests.backends.models_training import GPT, Llama, Sizes


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(Sizes())


TOKENS = torch.randint(0, 61, (2, 11))


class Tapped(nn.Module):
    """Returns its weights, so nothing is rewritten."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = (x @ x.transpose(-2, -1)).softmax(-1)
        return weights @ x, weights


# --- assert_rewrites --------------------------------------------------------------------------


def test_rewrites() -> None:
    assert len(assert_rewrites(gpt(), [TOKENS], attention=4).sites) == 4
    assert_rewrites(Llama(Sizes(heads=4, width=32)), [TOKENS], attention=4)
    assert_rewrites(Tapped(), [torch.randn(2, 5, 3)], attention=0, left=1)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"attention": 3}, "attention: 4, expected 3"),
        ({"attention": 4, "left": 1}, "left: 0, expected 1"),
        ({"graph_breaks": 2}, "graph breaks: 0, expected 2"),
    ],
)
def test_other_numbers_fail_with_the_explanation(expected: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message) as caught:
        assert_rewrites(gpt(), [TOKENS], **expected)
    assert "h.0..3.attn x 4" in str(caught.value)


def test_what_is_left_fails_by_default() -> None:
    with pytest.raises(AssertionError, match=r"left: 1, expected 0[^$]*weights ="):
        assert_rewrites(Tapped(), [torch.randn(2, 5, 3)])


# --- assert_same ------------------------------------------------------------------------------


class Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 1.001


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.down(F.silu(self.up(x)))}


class SpoiledMlp(Mlp):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden: Tensor = Spoiled.apply(self.up(x))  # type: ignore[no-untyped-call]
        return {"y": self.down(F.silu(hidden))}


def mlp() -> tuple[Mlp, Tensor]:
    torch.manual_seed(0)
    return Mlp(), torch.randn(4, 5)


def test_same() -> None:
    model, x = mlp()
    state = torch.get_rng_state()
    assert_same(model, copy.deepcopy(model), [x])
    assert_same(model, torch.compile(model, backend="eager"), [x])
    assert_same(model, lambda x: {"y": model.down(F.silu(model.up(x)))}, [x])
    assert_same(model, copy.deepcopy(model), [x], dtype=torch.float64)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert model.up.weight.dtype is torch.float32


def test_a_real_rewrite_is_the_same() -> None:
    model = gpt()
    assert_same(
        model,
        torch.compile(copy.deepcopy(model), backend="vllm_generic"),
        [TOKENS],
        kwargs={"targets": TOKENS.roll(1)},
        rtol=1e-4,
    )


@pytest.mark.parametrize(("name", "factor"), [("down.weight", 1.01), ("up.bias", 1.1)])
def test_a_wrong_output_is_named(name: str, factor: float) -> None:
    model, x = mlp()
    other = copy.deepcopy(model)
    other.get_parameter(name).data *= factor
    with pytest.raises(AssertionError, match=r"output\['y'\]: absolute .* relative .* ulp"):
        assert_same(model, other, [x], grads=False)


def test_a_wrong_gradient_is_named() -> None:
    model, x = mlp()
    spoiled = SpoiledMlp()
    spoiled.load_state_dict(model.state_dict())
    assert_same(model, spoiled, [x], grads=False)
    with pytest.raises(AssertionError) as caught:
        assert_same(model, spoiled, [x])
    text = str(caught.value)
    assert text.startswith("3 of 7 tensors differ, worst: gradient of ")
    for name in ("gradient of up.weight", "gradient of up.bias", "gradient of input 0"):
        assert name in text
    assert "down" not in text


def test_missing_outputs_are_named() -> None:
    model, x = mlp()
    with pytest.raises(AssertionError, match=r"not the same outputs.*output\['y'\]"):
        assert_same(model, lambda x: model(x)["y"], [x])
    with pytest.raises(FxportError, match="needs `rewritten` to be a module"):
        assert_same(model, lambda x: model(x), [x], dtype=torch.float64)


# --- golden graphs ----------------------------------------------------------------------------


def traced(extra: bool = False, size: int = 5) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    if extra:
        x = graph.call_function(torch.ops.aten.relu.default, (x,))
    y = graph.call_function(torch.ops.aten.mul.Tensor, (x, x))
    y = graph.call_function(torch.ops.aten.mul.Tensor, (y, 2.0))
    y.meta["val"] = torch.empty(size, device="meta")
    graph.output(y)
    return fx.GraphModule(nn.Module(), graph)


def test_graph_text_does_not_depend_on_shapes_and_counters() -> None:
    text = graph_text(traced())
    assert text.splitlines() == [
        "input x",
        "mul = aten.mul.Tensor(x, x)",
        "mul#2 = aten.mul.Tensor(mul, 2.0)",
        "return mul#2",
    ]
    assert graph_text(traced(size=9)) == text
    assert graph_text(traced(extra=True)) != text


def test_golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "golden" / "graph.txt"
    with pytest.raises(AssertionError, match=r"no golden file .*--fxport-accept"):
        assert_golden(traced(), path)
    assert not path.exists()
    monkeypatch.setattr(pytest_plugin, "_accept", True)
    assert_golden(traced(), path)
    monkeypatch.setattr(pytest_plugin, "_accept", False)
    assert_golden(traced(size=9), path)
    with pytest.raises(AssertionError, match=r"\+relu = aten.relu.default\(x\)"):
        assert_golden(traced(extra=True), path)
    assert "relu" not in path.read_text()


GOLDEN_TEST = """
import torch
from torch import fx
from fxport.testing import assert_golden

def test_it():
    assert_golden(fx.symbolic_trace(torch.nn.Linear(3, 5)), {path!r})
"""


def test_one_flag_accepts(tmp_path: Path) -> None:
    test, golden = tmp_path / "test_user.py", tmp_path / "linear.txt"
    test.write_text(GOLDEN_TEST.format(path=str(golden)))
    registered = any(e.name == "fxport" for e in entry_points(group="pytest11"))
    plugin = [] if registered else ["-p", "fxport.pytest_plugin"]

    def run(*more: str) -> int:
        command = [sys.executable, "-m", "pytest", "-q", *plugin, *more, str(test)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True).returncode

    assert run() == 1 and not golden.exists()
    assert run("--fxport-accept") == 0 and golden.exists()
    assert run() == 0
    golden.write_text("another graph\n")
    assert run() == 1


def test_the_plugin_is_light() -> None:
    code = "import sys, fxport.pytest_plugin; assert not {'torch', 'vllm'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
