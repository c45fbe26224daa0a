"""What a reader sees of a diff: the page in a browser, the terminal, golden text, exit codes."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import fx

import fxport
from fxport.cli import main
from fxport.diff import Change, GraphDiff
from fxport.diff.stages import Stage

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
LAYERS = 4

MODEL = """\
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, scale, act):
        super().__init__()
        self.qkv, self.out, self.scale, self.act = nn.Linear(64, 192), nn.Linear(64, 64), scale, act

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, 2, 32).transpose(1, 2) for t in self.qkv(x).split(64, -1))
        w = q @ k.transpose(-2, -1) * self.scale
        w = w.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")).softmax(-1)
        return x + self.act(self.out((w @ v).transpose(1, 2).reshape(B, T, C)))

class GPT(nn.Module):
    def __init__(self, scales=(0.25,) * 4, act=nn.functional.gelu, swap=-1):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.wpe = nn.Embedding(61, 64), nn.Embedding(40, 64)
        acts = [nn.functional.silu if i == swap else act for i in range(len(scales))]
        self.h = nn.ModuleList(map(Block, scales, acts))
        self.head = nn.Linear(64, 61, bias=False)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.head(x)

def base(): return GPT()
def scaled(): return GPT((0.25, 0.25, 0.5, 0.25))
def swapped(): return GPT(swap=1)
def number(): return 3
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "stranger_gpt.py").write_text(MODEL)
    sys.path.insert(0, str(folder))
    return folder


@cache
def stages(name: str) -> dict[str, Stage]:
    import stranger_gpt  # type: ignore[import-not-found]

    port = fxport.port(getattr(stranger_gpt, name)())
    return {stage.name: stage for stage in port.stages}


# --- the page ---------------------------------------------------------------------------------


def shown(page: Path, fragment: str = "", click: str = "") -> str:
    """The text of the pane, after a real browser has run the page and clicked."""
    assert BROWSER is not None
    if click:
        script = f"<script>document.getElementById('{click}').firstElementChild.click()</script>"
        page.write_text(page.read_text().replace("</body>", script + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    command += ["--dump-dom", f"{page.as_uri()}{fragment}"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    pane = found[found.index('<aside id="detail">') : found.index("</aside>")]
    return html.unescape(re.sub(r"<[^>]+>", " ", pane))


@pytest.mark.skipif(BROWSER is None, reason="no browser")
@pytest.mark.parametrize("how", ["click", "fragment"])
def test_a_node_opens_its_pane(models: Path, tmp_path: Path, how: str) -> None:
    diff = stages("base")["attention"].diff
    number = next(
        i for i, r in enumerate(diff.rows) if r.before and r.before.target == "aten.softmax.int"
    )
    page = tmp_path / "diff.html"
    diff.to_html(page)
    assert "Click a node" in shown(page)
    node = f"node-{number}"
    text = shown(page, click=node) if how == "click" else shown(page, f"#{node}")
    line = 1 + MODEL.splitlines().index(next(s for s in MODEL.splitlines() if "softmax" in s))
    assert f"stranger_gpt.py:{line}" in text and ".softmax(-1)" in text
    assert "float32[B, 2, T, T]" in text
    assert "fxport::attention causal, 2 heads" in text and "scale 0.25" in text
    assert "erased" in text


def test_identical_layers_are_folded(models: Path, tmp_path: Path) -> None:
    page = tmp_path / "diff.html"
    stages("base")["attention"].diff.to_html(page)
    assert f">x {LAYERS}</span>" in page.read_text()
    assert "http" not in re.sub(r"https?://www\.w3\.org\S*", "", page.read_text())


# --- the terminal -----------------------------------------------------------------------------


def test_the_table_fits_80_columns(models: Path) -> None:
    diff = stages("base")["attention"].diff
    assert all(len(line) <= 80 for line in diff.table().splitlines())
    assert f"created x {LAYERS}" in diff.table() and "test_" not in diff.table()
    assert not re.search(r"\bs\d+\b", str(diff.to_dict()))  # no torch symbols


def test_stages_of_a_port(models: Path) -> None:
    found = stages("base")
    before = ["functionalise", "known values", "look-ups", "taken rows", "head", "sinks"]
    assert list(found) == [*before, "attention", "positions", "experts"]
    assert not any(
        found[name].diff for name in ("look-ups", "taken rows", "head", "sinks", "experts")
    )
    changed = found["attention"].diff.changes
    assert sum(r.change is Change.REPLACED for r in changed) == LAYERS
    assert {r.made_by for r in changed} == {"attention"}


# --- golden text ------------------------------------------------------------------------------


def traced(batch: int = 3, shift: int = 0, more: bool = False, silu: bool = False) -> fx.Graph:
    """[batch, 7] ids, looked up and reshaped."""
    aten = torch.ops.aten
    graph = fx.Graph()
    tokens = graph.placeholder("tokens")
    tokens.meta["val"] = torch.empty(batch, 7, dtype=torch.long, device="meta")
    for _ in range(shift):
        graph.erase_node(graph.call_function(aten.view.default, (tokens, [batch])))
    x = graph.call_function(aten.to.dtype, (tokens, torch.float32))
    if more:
        x = graph.call_function(aten.neg.default, (x,))
        x.meta["nn_module_stack"] = {"": ("extra", "")}
    view = graph.call_function(aten.view.default, (x, [batch, 7, 1]))
    view.meta["nn_module_stack"] = {"": ("h.0", "")}
    op = aten.silu.default if silu else aten.gelu.default
    graph.output(graph.call_function(op, (view,)))
    return graph


def test_text_survives_batch_sizes_and_counters() -> None:
    golden = GraphDiff.between(traced(), traced(silu=True)).text()
    assert "gelu" in golden and "silu" in golden and "[B, T, 1]" in golden
    assert GraphDiff.between(traced(5), traced(5, silu=True)).text() == golden
    assert GraphDiff.between(traced(shift=3), traced(shift=5, silu=True)).text() == golden


def test_an_inserted_operation_is_the_only_change() -> None:
    changes = GraphDiff.between(traced(), traced(more=True)).changes
    assert [r.change for r in changes if r.change is Change.CREATED] == [Change.CREATED]
    assert {(r.after or r.before).key for r in changes} == {"extra/neg", "h.0/view"}  # type: ignore[union-attr]


def test_a_new_graph_while_recording() -> None:
    gm = fx.GraphModule({}, traced())
    with GraphDiff(gm, "swap") as diff:
        gm.graph = traced(silu=True)
    assert [r.change for r in diff.changes] == [Change.REPLACED]
    assert diff.changes[0].made_by == "swap"


# --- the command line -------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["diff", *arguments])


def test_models_before_and_after(models: Path) -> None:
    same = run("stranger_gpt:base", "stranger_gpt:base")
    assert same.exit_code == 0, same.output
    scaled = run("stranger_gpt:base", "stranger_gpt:scaled")
    assert scaled.exit_code == 1 and "1 changed" in scaled.output, scaled.output
    assert "h.2/mul" in scaled.output and "h.1/" not in scaled.output
    swapped = run("stranger_gpt:base", "stranger_gpt:swapped")
    assert swapped.exit_code == 1 and "1 replaced" in swapped.output, swapped.output
    assert "h.1/gelu" in swapped.output
    assert run("stranger_gpt:base", "no such thing").exit_code == 2
    assert run("stranger_gpt:base").exit_code == 2


def test_saved_ports(models: Path, tmp_path: Path) -> None:
    import stranger_gpt

    for name in ("base", "scaled"):
        fxport.port(getattr(stranger_gpt, name)()).save(tmp_path / name)
    assert run(str(tmp_path / "base"), str(tmp_path / "base")).exit_code == 0
    found = run(str(tmp_path / "base"), str(tmp_path / "scaled"))
    assert found.exit_code == 1, found.output
    assert "attention 2" in found.output and "attention 1:" not in found.output
    assert "half attention 2" in found.output  # the graph for half precision, too
