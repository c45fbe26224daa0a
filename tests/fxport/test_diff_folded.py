"""The page in a real browser: 48 layers folded, and a node inside opens from the address."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import fx

from fxport.diff import GraphDiff
from fxport.report import Decision, Outcome

aten = torch.ops.aten
LAYERS = 48
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium")


def recorded() -> GraphDiff:
    """gelu becomes silu in every layer."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for layer in range(LAYERS):
        for op, args in ((aten.mul.Tensor, (2.0,)), (aten.gelu.default, ())):
            value = graph.call_function(op, (value, *args))
            value.meta["nn_module_stack"] = {"": (f"h.{layer}", "")}
            value.meta["val"] = torch.empty(3, 5, device="meta")
            value.meta["stack_trace"] = f'File "/home/ada/gpt.py", line {40 + layer}, in forward'
    graph.output(value)
    gm = fx.GraphModule({}, graph)
    with GraphDiff(gm) as diff, diff.pass_("swap"):
        for node in list(gm.graph.find_nodes(op="call_function", target=aten.gelu.default)):
            with gm.graph.inserting_after(node):
                new = gm.graph.call_function(aten.silu.default, node.args)
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
        diff.note([Decision("activation", Outcome.REWRITTEN, "gelu", "cheaper </script>", "h.7")])
    return diff


class _Pane(HTMLParser):
    """Text of the pane, and how many <details> are open."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.text = ""
        self.open = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = self.inside or tag == "aside"
        self.open += tag == "details" and "open" in dict(attrs)

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "aside"

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n" if self.inside else ""


def shown(address: str, tmp_path: Path) -> _Pane:
    """The page after its script has run."""
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    command = [BROWSER, *flags, "--virtual-time-budget=2000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    pane = _Pane()
    pane.feed(done.stdout)
    return pane


def number_of(diff: GraphDiff, layer: int) -> int:
    key = f"h.{layer}/gelu"
    return next(i for i, r in enumerate(diff.rows) if r.before and r.before.key == key)


@needs_browser
def test_the_address_opens_a_node_of_a_folded_layer(tmp_path: Path) -> None:
    diff = recorded()
    diff.to_html(tmp_path / "diff.html")
    address = (tmp_path / "diff.html").as_uri()
    closed = shown(address, tmp_path)
    assert "gelu" not in closed.text
    pane = shown(f"{address}#node-{number_of(diff, 7)}", tmp_path)
    for text in ("replaced", "/home/ada/gpt.py:47", "float32[3, 5]", "aten.gelu.default", "swap"):
        assert text in pane.text
    assert "gelu rewritten: cheaper </script>." in pane.text  # the decision
    # Layer 7 is folded away behind layer 0: what holds it was opened.
    assert pane.open > closed.open


def test_identical_layers_are_one_section(tmp_path: Path) -> None:
    recorded().to_html(tmp_path / "diff.html")
    source = (tmp_path / "diff.html").read_text()
    assert re.findall(r'class="badge">(x \d+)<', source) == [f"x {LAYERS}"]
    assert not re.search(r"https?:|url\(|@import", source)
