"""A saved port read back: the same numbers and gradients; damaged or hostile, one clear error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxport
from fxport.errors import SavedPortError
from tests.zoo.gpt import GPT
from tests.zoo.llama import Llama
from tests.zoo.mpt import MPT
from tests.zoo.oss import OSS


def logits_of(output):
    output = output["logits"] if isinstance(output, dict) else output
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("build", [GPT, Llama, MPT, OSS])
def test_outputs_and_gradients_are_the_models(build, tmp_path: Path):
    torch.manual_seed(5)
    model = build().eval()
    fxport.port(model).save(tmp_path / "port")
    module = fxport.load(tmp_path / "port").module
    tokens = torch.randint(0, 97, (3, 19))
    expected, found = logits_of(model(tokens)), module(tokens)
    if expected.shape[1] == 1:  # this forward gives the last position only
        found = found[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    names = dict(model.named_parameters())
    assert dict(module.named_parameters()).keys() == names.keys()
    for name, parameter in module.named_parameters():
        scale = float(names[name].grad.abs().max())
        torch.testing.assert_close(
            parameter.grad, names[name].grad, rtol=1e-3, atol=1e-4 * scale, msg=name
        )


def test_the_limit_is_kept(saved: Path):
    module = fxport.load(saved).module
    assert module(torch.zeros(1, 160, dtype=torch.long)).shape == (1, 160, 97)
    with pytest.raises(ValueError, match="at most 160"):
        module(torch.zeros(1, 161, dtype=torch.long))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    return fxport.port(GPT()).save(tmp_path_factory.mktemp("saved") / "port")


def weights_file(directory: Path) -> Path:
    (file,) = directory.glob("*.safetensors")
    return file


def change_weights(directory: Path, change) -> None:
    file = weights_file(directory)
    content = {n: t.clone() for n, t in load_file(file).items()}
    change(content)
    save_file(content, file)


NAME = "transformer.wte.weight"
DAMAGE = {
    "no weights": (lambda d: weights_file(d).unlink(), "holds no values for"),
    "truncated": (
        lambda d: weights_file(d).write_bytes(weights_file(d).read_bytes()[:-7]),
        "cannot be read",
    ),
    "header cut": (
        lambda d: weights_file(d).write_bytes(weights_file(d).read_bytes()[:40]),
        "cannot be read",
    ),
    "missing": (lambda d: change_weights(d, lambda w: w.pop(next(iter(w)))), "holds no values for"),
    "extra": (lambda d: change_weights(d, lambda w: w.update(x=torch.ones(1))), "holds `x`"),
    "renamed": (
        lambda d: change_weights(d, lambda w: w.update(renamed=w.pop(next(iter(w))))),
        "`renamed`",
    ),
    "shape": (
        lambda d: change_weights(d, lambda w: w.update({next(iter(w)): torch.ones(3, 5)})),
        r"is \[3, 5\]",
    ),
    "dtype": (
        lambda d: change_weights(d, lambda w: w.update({n: t.double() for n, t in w.items()})),
        "float64",
    ),
    "twice": (
        lambda d: shutil.copy(weights_file(d), d / "model-00002-of-00002.safetensors"),
        "holds too",
    ),
    "another graph": (
        lambda d: (d / "fxport_graph.json").write_text(
            (d / "fxport_graph.json").read_text().replace("aten.add", "aten.sub", 1)
        ),
        "not the file that config.json was written for",
    ),
    "another model": (
        lambda d: (d / "config.json").write_text('{"model_type": "gpt2"}'),
        "not a saved port",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "config dtype": (
        lambda d: (d / "config.json").write_text(
            json.dumps({**json.loads((d / "config.json").read_text()), "dtype": "Tensor"})
        ),
        "names no dtype",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_gives_one_clear_error(name: str, saved: Path, tmp_path: Path):
    copy = tmp_path / "port"
    shutil.copytree(saved, copy)
    change, message = DAMAGE[name]
    change(copy)
    with pytest.raises(SavedPortError, match=message):
        fxport.load(copy)


def test_a_pickle_in_the_directory_is_not_touched(saved: Path, tmp_path: Path):
    copy = tmp_path / "port"
    shutil.copytree(saved, copy)
    (copy / "model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    (copy / "modeling.py").write_text("raise SystemExit('run')")
    assert len(fxport.load(copy).serving.attention) == 4


def test_thousands_of_mutated_files_run_nothing(tmp_path: Path):
    """In a process whose audit hook sees every import, exec, process, socket and write."""
    script = Path(__file__).with_name("mutate_saved_port.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "2400"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["refused"] + counts["read"] == 2400
    assert counts["refused"] > 1000 and counts["events"] == [] and counts["others"] == []
    assert counts["seen by the hook"], "the hook does not work"
