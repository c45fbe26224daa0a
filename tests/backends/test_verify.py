"""`fxport.verify` with the real engine: equal ports pass, each kind of damage is located."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import fxport
from fxport.cli import main
from fxport.errors import FxportError, SavedPortError
from fxport.verify_prompts import prompts_for
from tests.backends.engine import sharpened
from tests.saved_ports import edit
from tests.zoo.llama import Llama

RUNS = ["weights", "graph, mixed batch", "trainable module", "engine: mixed batch",
        "engine: one at a time", "engine: prefix cache", "engine: chunked prefill"]  # fmt: skip


def factory() -> Llama:
    """What the command line is given."""
    return sharpened(Llama, seed=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return fxport.port(factory()).save(tmp_path_factory.mktemp("saved") / "port")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "port"))


def test_prompts_fit_and_hold_what_breaks_things():
    for limit in (12, 64, 4096):
        prompts = prompts_for(50, limit, 8, seed=1)
        assert all(0 < len(p) <= limit - 8 and max(p) < 50 for p in prompts)
        assert [0] in prompts and len({tuple(p) for p in prompts}) == len(prompts)
    shared = [p for p in prompts if len(p) > 40]
    assert any(a[:40] == b[:40] for a in shared for b in shared if a is not b)


@pytest.mark.engine
def test_a_port_is_equal_in_every_way_and_the_command_says_so(saved: Path):
    spec = "tests.backends.test_verify:factory"
    done = CliRunner().invoke(main, ["verify", str(saved), spec, "--new-tokens", "5", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["ok"] and result["first"] is None
    assert [c["what"] for c in result["comparisons"]] == RUNS
    assert all(c["difference"] < 1e-4 for c in result["comparisons"][1:])


@pytest.mark.engine
def test_a_fault_that_only_the_engine_has_is_found_at_its_layer(copy: Path):
    """The record of layer 2 says another scale than the graph: PyTorch does not read it."""
    edit(copy, lambda graph: graph["own"]["attention"][2]["params"].update(scale=0.2))
    result = fxport.verify(factory(), copy, new_tokens=3)
    assert not result
    equal = {c.what: c.equal for c in result.comparisons}
    assert equal["weights"] and equal["graph, mixed batch"] and equal["trainable module"]
    assert not equal["engine: mixed batch"] and not equal["engine: chunked prefill"]
    assert result.first is not None
    assert result.first.module == "layers.2.attention", result.first
    assert "getitem" in result.first.target
    table = str(result)
    assert max(map(len, table.splitlines()[:12])) <= 80 and "DIFFERS" in table


def test_a_changed_weight_is_named(copy: Path):
    (file,) = copy.glob("*.safetensors")
    content = load_file(file)
    content["layers.1.feed_forward.w2.weight"][3, 5] += 0.5
    save_file(content, file)
    result = fxport.verify(factory(), copy, engine=False)
    assert not result and result.first is not None
    assert result.first.operation == "layers.1.feed_forward.w2.weight"
    assert "1 of" in result.first.detail
    assert [c.equal for c in result.comparisons] == [False, False, True]


def test_a_changed_graph_is_named(copy: Path):
    def change(graph: Any) -> None:
        nodes = graph["own"]["body"]["nodes"]
        node = [n for n in nodes if n["op"] == "aten.silu.default"][3]
        node["op"] = "aten.sigmoid.default"

    edit(copy, change)
    result = fxport.verify(factory(), copy, engine=False)
    assert not result and result.first is not None
    assert result.first.module == "layers.3.feed_forward"
    assert [c.equal for c in result.comparisons] == [True, False, True]
    spec = "tests.backends.test_verify:factory"
    done = CliRunner().invoke(main, ["verify", str(copy), spec, "--no-engine"])
    assert done.exit_code == 1 and "DIFFERS" in done.stdout and "is not" in done.stderr


def test_bad_input_is_one_clear_error(saved: Path, tmp_path: Path):
    with pytest.raises(FxportError, match="this port takes 144"):
        fxport.verify(factory(), saved, prompts=[[1] * 140], engine=False)
    with pytest.raises(FxportError, match="outside the vocabulary"):
        fxport.verify(factory(), saved, prompts=[[1, 101]], engine=False)
    with pytest.raises(FxportError, match="new_tokens"):
        fxport.verify(factory(), saved, new_tokens=0, engine=False)
    with pytest.raises(SavedPortError, match="is missing"):
        fxport.verify(factory(), tmp_path, engine=False)
    with pytest.raises(FxportError, match="the engine failed"):
        broken = Path(shutil.copytree(saved, tmp_path / "port"))
        edit(broken, lambda graph: graph["own"]["attention"][0]["params"].update(softcap="x"))
        fxport.verify(factory(), broken)


def test_a_model_of_other_sizes_differs_rather_than_fails(saved: Path):
    torch.manual_seed(0)
    result = fxport.verify(sharpened(lambda: Llama(hidden=96), 1), saved, engine=False)
    assert not result and result.first is not None and "in the model" in result.first.detail
