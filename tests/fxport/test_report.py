"""Reports: the table, JSON and HTML of hand-made decisions."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from fxport.errors import Location, Reason, ReasonCode
from fxport.render import fold, report_html, report_table, summary, verdict
from fxport.report import Decision, Outcome, Report

LAYERS = 48


def at(line: int, source: str = "") -> Location:
    return Location("/home/ada/a/rather/long/path/to/the/models/transformer.py", line, "f", source)


def rewritten(layer: int) -> Decision:
    return Decision(
        "attention",
        Outcome.REWRITTEN,
        "softmax",
        "fxport::attention causal, 16 heads of 64, scale 0.125",
        f"transformer.h.{layer}.attn",
        at(41, "att = F.softmax(att, dim=-1)"),
    )


ROUTER = Decision(
    "attention",
    Outcome.LEFT,
    "softmax",
    module="router",
    reason=Reason(
        ReasonCode.NOT_ATTENTION,
        "the softmax over 8 experts is a router, not attention",
        at(80, "p = self.gate(x).softmax(-1)"),
        "nothing to do: a router works on each token by itself",
    ),
)
CONVOLUTION = Decision(
    "token-locality",
    Outcome.REFUSED,
    "conv1d",
    module="blocks.0.conv",
    reason=Reason(
        ReasonCode.MIXES_TOKENS,
        "a convolution of width 3 mixes neighbouring tokens",
        at(77, "x = self.conv(x)"),
        "take the convolution out",
    ),
)
HEAD = Decision("head", Outcome.REWRITTEN, "lm_head.weight", "cut off", "lm_head", at(131))
FACTS = {"vocab_size": 50257, "max_position_embeddings": 1024, "dtype": "float32", "tied": True}

LARGE = Report("GPT", FACTS, (*(rewritten(i) for i in range(LAYERS)), ROUTER, HEAD))
REFUSED = Report("Net", {}, (rewritten(0), CONVOLUTION))
CLEAN = Report("GPT", FACTS, (rewritten(0), rewritten(1), HEAD))


@pytest.mark.parametrize(
    ("report", "word"), [(LARGE, "ported"), (REFUSED, "refused"), (CLEAN, "proven")]
)
def test_verdict_is_the_worst_outcome(report: Report, word: str) -> None:
    assert verdict(report)[0] == word
    assert report_table(report).startswith(f"{report.model}: {word}, ")


def test_an_empty_report_claims_nothing() -> None:
    empty = Report("GPT")
    assert verdict(empty)[0] == "empty"
    assert "proven" not in report_table(empty)
    report_html(empty)


def test_summary_counts_every_decision() -> None:
    assert summary(LARGE) == "attention 48 rewritten, 1 left; head 1 of 1 rewritten"
    assert summary(CLEAN) == "attention 2 of 2 rewritten; head 1 of 1 rewritten"


def test_equal_layers_are_one_row() -> None:
    rows = fold(LARGE)
    assert [row.count for row in rows] == [LAYERS, 1, 1]
    assert rows[0].decision.module == "transformer.h.*.attn"
    assert rows[0].modules[:2] == ("transformer.h.0.attn", "transformer.h.1.attn")
    assert f"x {LAYERS}" in report_table(LARGE)


def test_a_row_by_itself_keeps_its_layer_number() -> None:
    assert fold(REFUSED)[1].decision.module == "blocks.0.conv"


@pytest.mark.parametrize(
    "other",
    [
        Decision("attention", Outcome.REWRITTEN, "softmax", "scale 0.25", "h.1.attn", at(41)),
        Decision("attention", Outcome.REWRITTEN, "softmax", "scale 0.125", "h.1.attn", at(42)),
        Decision("attention", Outcome.LEFT, "softmax", "scale 0.125", "h.1.attn", at(41)),
        Decision("attention", Outcome.REWRITTEN, "softmax", "scale 0.125", "g.1.attn", at(41)),
    ],
    ids=["detail", "line", "outcome", "module"],
)
def test_rows_that_differ_are_not_folded(other: Decision) -> None:
    first = Decision("attention", Outcome.REWRITTEN, "softmax", "scale 0.125", "h.0.attn", at(41))
    assert len(fold(Report("GPT", {}, (first, other)))) == 2


@pytest.mark.parametrize("report", [LARGE, REFUSED, CLEAN])
def test_the_table_fits_80_columns(report: Report) -> None:
    paths = str(at(0))[:-2]
    lines = [line for line in report_table(report).splitlines() if paths not in line]
    assert max(map(len, lines)) <= 80


def test_a_long_pass_name_and_file_name_still_fit() -> None:
    where = Location("/x/a_module_with_quite_a_long_name_for_a_file.py", 12345)
    wide = Decision("token-locality-of-ops", Outcome.REWRITTEN, "y" * 90, "z" * 90, "", where)
    lines = report_table(Report("GPT", {}, (wide,))).splitlines()
    assert max(map(len, lines)) <= 80


def test_the_table_gives_every_reason_in_full() -> None:
    table = report_table(REFUSED)
    reason = CONVOLUTION.reason
    assert reason is not None
    for text in (reason.message, str(reason.location), "x = self.conv(x)", reason.hint):
        assert text in table


def test_json_keeps_every_decision_and_only_plain_values(tmp_path) -> None:
    LARGE.to_json(tmp_path / "new" / "report.json")
    read = json.loads((tmp_path / "new" / "report.json").read_text())
    assert read == LARGE.to_dict()
    assert len(read["decisions"]) == LAYERS + 2
    assert read["facts"] == FACTS
    left = read["decisions"][LAYERS]
    assert left["outcome"] == "left" and left["reason"]["code"] == "softmax-is-not-attention"
    assert type(LARGE.to_dict()["decisions"][0]["outcome"]) is str


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for name, v in attrs if name in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_asks_for_nothing_and_shows_every_row(tmp_path) -> None:
    LARGE.to_html(tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(source)
    assert page.links == [] and not re.search(r"https?:|url\(|@import", source)
    assert page.tags.count("tbody") == len(fold(LARGE))
    assert "p = self.gate(x).softmax(-1)" in page.text
    assert f"transformer.h.{LAYERS - 1}.attn" in page.text


def test_html_escapes_what_comes_from_the_model() -> None:
    nasty = '</script><script>alert("x")</script>'
    decision = Decision(
        nasty,
        Outcome.LEFT,
        nasty,
        nasty,
        nasty,
        reason=Reason(ReasonCode.NOT_ATTENTION, nasty, Location(nasty, 1, nasty, nasty), nasty),
    )
    page = _Page()
    page.feed(report_html(Report(nasty, {nasty: nasty}, (decision,))))
    assert page.tags.count("script") == 1
    assert page.text.count("alert(") > 5
