"""Diffs of ports: the stages of one with numbers, two saved ones, golden text of a model."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import fxport
from fxport.capture.export import capture
from fxport.cli import main
from fxport.diff import Change, GraphDiff

LAYERS = 4
SOURCE = """
import torch, torch.nn as nn, torch.nn.functional as F

class Block(nn.Module):
    def __init__(self, scale, activation):
        super().__init__()
        self.scale, self.activation = scale, activation
        self.norm, self.qkv, self.proj = nn.LayerNorm(24), nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv(self.norm(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, 3, 8).transpose(1, 2) for t in qkv)
        w = q @ k.transpose(-2, -1) * self.scale
        w = w.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")).softmax(-1)
        x = x + self.proj((w @ v).transpose(1, 2).reshape(B, T, C))
        return x + self.down(self.activation(self.up(x)))

class GPT(nn.Module):
    def __init__(self, scales=(0.25,) * 4, activations=(F.gelu,) * 4):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.wpe = nn.Embedding(61, 24), nn.Embedding(19, 24)
        pairs = zip(scales, activations, strict=True)
        self.blocks = nn.ModuleList(Block(*pair) for pair in pairs)
        self.head = nn.Linear(24, 61)

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)

VERSIONS = {
    "base": {},
    "other_activation": {"activations": (F.gelu, F.gelu, F.silu, F.gelu)},
    "other_scale": {"scales": (0.25, 0.5, 0.25, 0.25)},
}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("models")
    (directory / "diffed_models.py").write_text(SOURCE)
    (directory / "diffed_models_moved.py").write_text(f"# A line more.\n{SOURCE}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        yield importlib.import_module("diffed_models")


@pytest.fixture(scope="module")
def saved(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("ports")
    return {
        name: fxport.port(models.GPT(**options)).save(directory / name)
        for name, options in models.VERSIONS.items()
    }


def diff(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["diff", *map(str, arguments)])


def changed_modules(part: dict[str, Any]) -> set[str]:
    rows = [r for r in part["rows"] if r["change"] != "kept"]
    return {(r["before"] or r["after"])["module"] for r in rows}


def test_the_stages_of_a_port(models: ModuleType) -> None:
    model: nn.Module = models.GPT().eval()
    port = fxport.port(model)
    stages = {stage.name: stage for stage in port.stages}
    assert {"functionalise", "head", "attention", "positions"} <= stages.keys()
    attention = stages["attention"]
    assert len([n for n in attention.graph.graph.nodes if "fxport.attention" in str(n.target)]) == 4
    made = [r for r in attention.diff.changes if r.change is Change.REPLACED]
    assert len(made) == LAYERS and all(r.made_by == "attention" for r in made)
    tokens = torch.randint(0, 61, (2, 11))
    expected = model(tokens)
    assert torch.allclose(attention.diff.before(*_inputs(attention.diff.before, tokens)), expected)
    assert attention.diff.check(tokens).ok


def _inputs(gm: torch.fx.GraphModule, tokens: torch.Tensor) -> list[torch.Tensor]:
    known = [n.meta["input"] for n in gm.graph.find_nodes(op="placeholder")]
    return [tokens if k.value is None else k.value for k in known]


def test_saved_ports_that_are_the_same(saved: dict[str, Path], tmp_path: Path) -> None:
    moved = importlib.import_module("diffed_models_moved")
    fxport.port(moved.GPT()).save(tmp_path / "moved")
    result = diff(saved["base"], tmp_path / "moved")
    assert result.exit_code == 0, result.output
    assert "no difference" in result.output


@pytest.mark.parametrize(
    ("version", "module", "targets"),
    [
        ("other_activation", "blocks.2", {"aten.gelu.default", "aten.silu.default"}),
        ("other_scale", "blocks.1", None),
    ],
)
def test_two_versions_differ_in_exactly_the_changed_layer(
    saved: dict[str, Path], version: str, module: str, targets: set[str] | None
) -> None:
    result = diff(saved["base"], saved[version], "--json")
    assert result.exit_code == 1
    graphs = json.loads(result.stdout)["graphs"]
    assert {"embed", "body", "head", "half embed", "half body", "half head"} == graphs.keys()
    others = json.loads(result.stdout)["other"]
    if targets is None:  # the scale stands in the description of the layer
        assert any("attention 1" in line for line in others), others
        assert not any(f"attention {i}:" in line for i in (0, 2, 3) for line in others), others
        return
    for name in ("body", "half body"):
        rows = [r for r in graphs[name]["rows"] if r["change"] != "kept"]
        assert changed_modules(graphs[name]) == {module}
        assert {r[side]["target"] for r in rows for side in ("before", "after")} == targets
    assert not changed_modules(graphs["embed"]) and not changed_modules(graphs["head"])
    assert others == []


def hunk(models: ModuleType, layers: int) -> str:
    """The text of an activation swapped in layer 1 of a model of so many layers."""
    silu = models.F.silu
    plain = [models.F.gelu] * layers
    swapped = [plain[0], silu, *plain[2:]]
    graphs = [
        capture(models.GPT((0.25,) * layers, activations)).graph for activations in (plain, swapped)
    ]
    return GraphDiff.between(*graphs).text()


def test_a_layer_more_elsewhere_leaves_the_golden_text(models: ModuleType) -> None:
    golden = hunk(models, LAYERS)
    assert "+blocks.1/silu = aten.silu.default(blocks.1.up/linear)" in golden
    assert hunk(models, LAYERS + 1) == golden
