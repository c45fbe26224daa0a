"""The command line on small real models: what it saves, what it refuses and how it says so."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from fxport.cli import main

HEADER = """\
import math, pathlib, torch, torch.nn as nn, torch.nn.functional as F
"""

GPT = """
class Attention(nn.Module):
    def __init__(self, dim, heads, length):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.register_buffer("mask", torch.tril(torch.ones(length, length)))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (
            t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(C, dim=2)
        )
        w = q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1])
        w = w.masked_fill(self.mask[:T, :T] == 0, float("-inf")).softmax(-1)
        return self.proj((w @ v).transpose(1, 2).reshape(B, T, C))

class GPT(nn.Module):
    def __init__(self, vocab=61, dim=64, heads=2, layers=4, length=48):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Attention(dim, heads, length) for _ in range(layers))
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)
"""

CONVOLUTION = GPT.replace(
    "        return self.head(x)\n",
    "        x = x + self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)  # mixes\n"
    "        return self.head(x)\n",
).replace(
    "        self.head.weight",
    "        self.conv = nn.Conv1d(dim, dim, 3, padding=2, groups=dim)\n        self.head.weight",
)
NOT_CAUSAL = GPT.replace('.masked_fill(self.mask[:T, :T] == 0, float("-inf"))', "")
NO_VOCABULARY = GPT.replace("self.wte(idx)", "self.level(idx[..., None].float())").replace(
    "        self.head.weight = self.wte.weight\n", "        self.level = nn.Linear(1, dim)\n"
)


class Cli:
    """Runs commands in a folder with modules of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "ports" / "saved"

    def write(self, name: str, body: str) -> None:
        (self.folder / f"{name}.py").write_text(HEADER + textwrap.dedent(body))
        importlib.invalidate_caches()

    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, list(arguments))

    def port(self, factory: str, *more: str) -> Result:
        return self("port", factory, "--out", str(self.out), *more)

    def line_of(self, name: str, text: str) -> str:
        """``/path/name.py:12`` of the line that holds `text`."""
        path = self.folder / f"{name}.py"
        lines = path.read_text().splitlines()
        return f"{path}:{next(i for i, line in enumerate(lines, 1) if text in line)}"

    def left_behind(self) -> list[Path]:
        return list((self.folder / "ports").rglob("*"))


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield Cli(tmp_path)
    for name in {name for name in set(sys.modules) - before if name.startswith("user_")}:
        del sys.modules[name]


# --- wrong usage: exit 2 --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("user_usage", "not of the form pkg.mod:factory"),
        ("user_usage:", "not of the form pkg.mod:factory"),
        ("user_usage:GPT()", "not of the form pkg.mod:factory"),
        ("no_such_module:GPT", "no module 'no_such_module'"),
        ("user_usage.sub:GPT", "no module 'user_usage.sub'"),
        ("user_usage:Gpt", "user_usage.py) has no 'Gpt'"),
    ],
)
@pytest.mark.parametrize("command", ["port", "explain"])
def test_a_factory_that_is_not_there(cli: Cli, command: str, factory: str, says: str) -> None:
    cli.write("user_usage", GPT)
    result = cli.port(factory) if command == "port" else cli("explain", factory)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.output and not cli.left_behind()


def test_an_output_directory_that_exists_is_refused_before_any_work(cli: Cli) -> None:
    cli.write("user_work", "def make(): pathlib.Path('worked').touch()")
    cli.out.mkdir(parents=True)
    (cli.out / "mine.txt").write_text("keep")
    result = cli.port("user_work:make")
    assert result.exit_code == 2
    assert f"{cli.out} exists already" in result.stderr
    assert not (cli.folder / "worked").exists()
    assert cli.left_behind() == [cli.out, cli.out / "mine.txt"]


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--weights", "none.safetensors", "there is no file none.safetensors"),
        ("--weights", "model.pt", "no .safetensors file"),
        ("--tokenizer", "none", "none is no directory"),
        ("--max-seq-len", "0", "--max-seq-len"),
    ],
)
def test_wrong_options(cli: Cli, option: str, value: str, says: str) -> None:
    cli.write("user_options", GPT)
    (cli.folder / "model.pt").write_bytes(b"pickle")
    result = cli.port("user_options:GPT", option, value)
    assert result.exit_code == 2
    assert says in result.stderr and not cli.left_behind()


def test_the_exit_status_of_the_program(cli: Cli) -> None:
    program = [sys.executable, "-c", "from fxport.cli import main; main()"]
    done = subprocess.run([*program, "explain", "nowhere:x"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere" in done.stderr


# --- the user's code fails: exit 1 ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def make(): return open('gone.json')  # here", "FileNotFoundError"),
        ("def make(): return torch.zeros(2) @ torch.zeros(3)  # here", "RuntimeError"),
        ("import gone_module  # here\nmake = None", "ModuleNotFoundError: No module named 'gone"),
        ("1 / 0  # here\nmake = None", "ZeroDivisionError"),
        ("make = (  # here", "was never closed"),
    ],
    ids=["in the factory", "within torch", "missing dependency", "on import", "syntax"],
)
def test_user_code_that_raises(cli: Cli, body: str, says: str) -> None:
    cli.write("user_raises", body)
    result = cli.port("user_raises:make")
    assert result.exit_code == 1
    assert says in result.stderr and cli.line_of("user_raises", "# here") in result.stderr
    assert not cli.left_behind()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("make = 3", "is an int, neither"),
        ("def make(): return {}", "gave a dict, not a torch.nn.Module"),
    ],
)
def test_a_factory_that_gives_no_module(cli: Cli, body: str, says: str) -> None:
    cli.write("user_kind", body)
    result = cli.port("user_kind:make")
    assert result.exit_code == 1 and says in result.stderr


def test_a_factory_that_shows_a_call(cli: Cli) -> None:
    shown = GPT.replace("forward(self, idx)", "forward(self, idx, shift)")
    shown = shown.replace("        x = self.wte(idx) +", "        x = shift * self.wte(idx) +")
    cli.write("user_shown", shown + "\nmake = lambda: (GPT(), (torch.zeros(1, 5).long(), 2))\n")
    result = cli.port("user_shown:make")
    assert result.exit_code == 0 and "shift" in result.output
    cli.write("user_pair", "make = lambda: (3, (4,))")
    assert "gave an int, not a torch.nn.Module" in cli("explain", "user_pair:make").stderr


# --- models: ported, or refused with the line -----------------------------------------------------


@pytest.mark.parametrize("how", ["user_good:GPT", "user_good:model", "user_good:Zoo.small"])
def test_port_saves_a_directory_and_prints_the_report(cli: Cli, how: str) -> None:
    cli.write("user_good", GPT + "\nmodel = GPT()\nclass Zoo:\n    small = GPT\n")
    result = cli.port(how)
    assert result.exit_code == 0, result.output
    assert "GPT: " in result.stdout and "attention" in result.stdout
    assert result.stderr == ""  # no progress bar where there is no terminal
    config = json.loads((cli.out / "config.json").read_text())
    assert config["max_position_embeddings"] == 48 and config["vocab_size"] == 61
    assert [path.name for path in cli.out.parent.iterdir()] == ["saved"]


def test_max_seq_len_and_tokenizer(cli: Cli) -> None:
    cli.write("user_shorter", GPT)
    (cli.folder / "tok").mkdir()
    (cli.folder / "tok" / "tokenizer.json").write_text("{}")
    result = cli.port("user_shorter:GPT", "--max-seq-len", "17", "--tokenizer", "tok")
    assert result.exit_code == 0, result.output
    assert json.loads((cli.out / "config.json").read_text())["max_position_embeddings"] == 17
    assert (cli.out / "tokenizer.json").read_text() == "{}"


def test_a_sequence_longer_than_the_model_allows(cli: Cli) -> None:
    cli.write("user_longer", GPT)
    result = cli.port("user_longer:GPT", "--max-seq-len", "49")
    assert result.exit_code == 1
    assert "48" in result.stderr and not cli.left_behind()


REFUSALS = [
    pytest.param(CONVOLUTION, "mixes-tokens", "# mixes", id="convolution over time"),
    pytest.param(NOT_CAUSAL, "not-causal", "(w @ v)", id="not causal"),
    pytest.param(NO_VOCABULARY, "no-vocabulary", "self.level(idx", id="no vocabulary"),
]


@pytest.mark.parametrize(("body", "code", "line"), REFUSALS)
@pytest.mark.parametrize("command", ["port", "explain"])
def test_a_refused_model(cli: Cli, command: str, body: str, code: str, line: str) -> None:
    cli.write("user_refused", body)
    factory = "user_refused:GPT"
    result = cli.port(factory) if command == "port" else cli("explain", factory)
    assert result.exit_code == 1
    assert f"[{code}]" in result.stderr and "Traceback" not in result.output
    assert cli.line_of("user_refused", line) in result.stderr
    assert not cli.left_behind()
    if command == "port":
        assert result.stdout == ""
    else:  # every site all the same
        assert "attention 4 of 4" in result.stdout and "port: refused" in result.stdout


def test_explain_reports_and_writes_nothing(cli: Cli) -> None:
    cli.write("user_explained", GPT)
    before = {path for path in cli.folder.rglob("*") if "__pycache__" not in path.parts}
    result = cli("explain", "user_explained:GPT")
    assert result.exit_code == 0, result.output
    assert "attention 4 of 4\nport: would succeed" in result.stdout
    assert {p for p in cli.folder.rglob("*") if "__pycache__" not in p.parts} == before


def test_explain_as_json(cli: Cli) -> None:
    cli.write("user_json", NOT_CAUSAL)
    result = cli("explain", "user_json:GPT", "--json")
    assert result.exit_code == 1 and "[not-causal]" in result.stderr
    read = json.loads(result.stdout)
    assert read["ok"] is False and len(read["sites"]) == 4
    assert read["obstacles"][0]["code"] == "not-causal"


# --- weights --------------------------------------------------------------------------------------


@pytest.fixture
def weights(cli: Cli) -> dict[str, torch.Tensor]:
    """Other weights for the model in user_weights.py, tied names once."""
    cli.write("user_weights", GPT)
    sys.path.insert(0, "")
    model = importlib.import_module("user_weights").GPT()
    generator = torch.Generator().manual_seed(5)
    state = {n: torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()}
    for block in range(4):
        state[f"blocks.{block}.mask"] = torch.tril(torch.ones(48, 48))
    del state["head.weight"]
    return state


def with_weights(cli: Cli, state: dict[str, torch.Tensor]) -> Result:
    save_file(state, cli.folder / "w.safetensors")
    return cli.port("user_weights:GPT", "--weights", "w.safetensors")


def test_weights_are_the_ones_saved(cli: Cli, weights: dict[str, torch.Tensor]) -> None:
    result = with_weights(cli, weights)
    assert result.exit_code == 0, result.output
    saved: dict[str, torch.Tensor] = {}
    for file in cli.out.glob("*.safetensors"):
        saved |= load_file(file)
    assert torch.equal(saved["blocks.3.qkv.weight"], weights["blocks.3.qkv.weight"])
    assert torch.equal(saved["wte.weight"], weights["wte.weight"])


def test_weights_that_do_not_fit(cli: Cli, weights: dict[str, torch.Tensor]) -> None:
    del weights["wpe.weight"]
    weights["stray"] = torch.zeros(1)
    weights["blocks.0.proj.bias"] = torch.zeros(63)
    result = with_weights(cli, weights)
    assert result.exit_code == 1 and not cli.left_behind()
    for text in (
        "w.safetensors does not fit GPT",
        "1 in the model, not in the file:\n    wpe.weight\n",
        "1 in the file, not in the model:\n    stray\n",
        "blocks.0.proj.bias: [63] in the file, [64] in the model",
    ):
        assert text in result.stderr


def test_weights_of_a_compiled_model(cli: Cli, weights: dict[str, torch.Tensor]) -> None:
    result = with_weights(cli, {f"_orig_mod.{name}": t for name, t in weights.items()})
    assert result.exit_code == 1
    assert "begins with '_orig_mod.'" in result.stderr and "and 16 more" in result.stderr


def test_tied_names_with_two_values_are_not_mixed(
    cli: Cli, weights: dict[str, torch.Tensor]
) -> None:
    weights["head.weight"] = weights["wte.weight"] + 1
    result = with_weights(cli, weights)
    assert result.exit_code == 1
    assert "tied in the model, different in the file" in result.stderr
    weights["head.weight"] = weights["wte.weight"].clone()
    assert with_weights(cli, weights).exit_code == 0


def test_a_damaged_weights_file(cli: Cli, weights: dict[str, torch.Tensor]) -> None:
    (cli.folder / "w.safetensors").write_bytes(b"\xff" * 64)
    result = cli.port("user_weights:GPT", "--weights", "w.safetensors")
    assert result.exit_code == 1 and "cannot be read" in result.stderr
