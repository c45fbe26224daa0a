"""Reports for people and programs: a table for terminals, JSON, one self-contained HTML page.

All three show the same rows: decisions that differ only in the layer they belong to (the digits
in a dotted name, ``blocks.3.attn``) are folded into one row with a count. JSON keeps every one.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from fxport.errors import Location, Reason
from fxport.report import Decision, Outcome, Report

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["report_dict", "report_html", "report_table", "summary", "write_html", "write_json"]

WIDTH = 80
_WHERE = 20  # widest "where" column of the table


@dataclass(frozen=True)
class Row:
    """Decisions that say the same of several layers.

    Attributes:
        decision: the first of them, layer numbers in names replaced by ``*`` if there are more.
        count: how many.
        modules: the modules they belong to, in order.
    """

    decision: Decision
    count: int
    modules: tuple[str, ...]


def fold(report: Report) -> tuple[Row, ...]:
    """Rows in the order in which the passes decided."""
    groups: dict[Decision, list[Decision]] = {}
    for decision in report.decisions:
        groups.setdefault(_without_layers(decision), []).append(decision)
    rows = []
    for folded, members in groups.items():
        shown = folded if len(members) > 1 else members[0]
        modules = tuple(dict.fromkeys(d.module for d in members if d.module))
        rows.append(Row(shown, len(members), modules))
    return tuple(rows)


def _without_layers(decision: Decision) -> Decision:
    reason = decision.reason
    if reason is not None:
        reason = replace(reason, message=_starred(reason.message), hint=_starred(reason.hint))
    return replace(
        decision,
        subject=_starred(decision.subject),
        detail=_starred(decision.detail),
        module=_starred(decision.module),
        reason=reason,
    )


def _starred(text: str) -> str:
    """``h.0.attn`` -> ``h.*.attn``; numbers such as ``0.125`` stay."""
    return re.sub(
        r"(?<![\w.])[A-Za-z_]\w*(?:\.\w+)+",
        lambda name: re.sub(r"\.\d+(?=\.|$)", ".*", name[0]),
        text,
    )


def verdict(report: Report) -> tuple[str, str]:
    """One word and what it rests on: ``("proven", "every place was rewritten or proven")``."""
    counts = Counter(d.outcome for d in report.decisions)
    if counts[Outcome.REFUSED]:
        return "refused", f"{_places(counts[Outcome.REFUSED])} in the way"
    if counts[Outcome.LEFT]:
        return "ported", f"{_places(counts[Outcome.LEFT])} left as written"
    if not report.decisions:
        return "empty", "nothing was decided"
    return "proven", "every place was rewritten or proven equal"


def _places(count: int) -> str:
    return "1 place" if count == 1 else f"{count} places"


def summary(report: Report) -> str:
    """``attention 4 of 4 rewritten; positions 3 rewritten, 1 left``."""
    parts = []
    for name, outcomes in _pass_outcomes(report).items():
        total = sum(number for _, number in outcomes)
        of = f" of {total}" if len(outcomes) == 1 else ""
        parts.append(
            f"{name} " + ", ".join(f"{number}{of} {outcome}" for outcome, number in outcomes)
        )
    return "; ".join(parts)


def _pass_outcomes(report: Report) -> dict[str, list[tuple[str, int]]]:
    """Per pass, its outcomes and how many, in the order in which the passes decided."""
    counts = report.counts()
    names = dict.fromkeys(d.pass_name for d in report.decisions)
    return {
        name: [(o.value, counts[name, o]) for o in Outcome if counts[name, o]] for name in names
    }


# --- terminal ----------------------------------------------------------------------


def report_table(report: Report) -> str:
    """At most 80 columns: the summary, the facts, one row per decision, then reasons in full."""
    word, because = verdict(report)
    blocks = [_fill(f"{report.model}: {word}, {because}.")]
    if report.decisions:
        blocks.append("\n".join(_fill(part) for part in summary(report).split("; ")))
    if report.facts:
        facts = [f"{name} {value}".replace(" ", "\0") for name, value in report.facts.items()]
        blocks.append(_fill(", ".join(facts)).replace("\0", " "))
    rows = fold(report)
    if rows:
        blocks.append(_rows_table(rows))
    reasons = [_reason_text(row) for row in rows if row.decision.reason is not None]
    if reasons:
        blocks.append("\n".join(["Why:", *reasons]))
    return "\n\n".join(blocks)


def _rows_table(rows: tuple[Row, ...]) -> str:
    from tabulate import tabulate

    short = [
        [
            row.decision.pass_name,
            row.decision.outcome.value,
            "\n".join(_wrap(_short(row.decision.location), _WHERE)),
            f"x {row.count}" if row.count > 1 else "",
        ]
        for row in rows
    ]
    # What the other columns leave, at least their titles and two blanks between any two.
    widths = [
        max(len(line) for cell in cells for line in cell.split("\n"))
        for cells in zip(*short, strict=True)
    ]
    left = WIDTH - 8 - sum(max(pair) for pair in zip(widths, (4, 7, 5, 2), strict=True))
    table = [
        [name, outcome, "\n".join(_wrap(_what(row.decision), left)), where, count]
        for row, (name, outcome, where, count) in zip(rows, short, strict=True)
    ]
    headers = ["pass", "outcome", "what", "where", ""]
    return tabulate(table, headers=headers, tablefmt="simple", disable_numparse=True)


def _what(decision: Decision) -> str:
    return f"{decision.subject} -> {decision.detail}" if decision.detail else decision.subject


def _short(location: Location | None) -> str:
    """``model.py:31``; the full path stands under "Why" and in the other renderings."""
    return f"{Path(location.file).name}:{location.line}" if location else ""


def _reason_text(row: Row) -> str:
    reason = row.decision.reason
    assert reason is not None
    lines = [_fill(f"- {reason.message} [{reason.code}]", "  ")]
    location = _place(reason, row.decision.location)
    if location:
        lines.append(f"  {location}")  # never wrapped: a terminal links it, a person copies it
        if location.source:
            lines.append(f"      {location.source.strip()}")
    if reason.hint:
        lines.append("  " + _fill(f"-> {reason.hint}", "     "))
    return "\n".join(lines)


def _fill(text: str, indent: str = "    ") -> str:
    return ("\n" + indent).join(_wrap(text, WIDTH - len(indent)))


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width`, broken at blanks where there are any."""
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]


# --- JSON ----------------------------------------------------------------------


def report_dict(report: Report) -> dict[str, object]:
    """Plain JSON values; every decision by itself, field names as in `fxport.report`."""
    word, because = verdict(report)
    return {
        "model": report.model,
        "verdict": word,
        "because": because,
        "summary": summary(report),
        "facts": dict(report.facts),
        "decisions": [_plain(asdict(decision)) for decision in report.decisions],
    }


def _plain(value: object) -> object:
    """Enumerations as their text."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return str(value) if isinstance(value, str) else value


def write_json(report: Report, path: str | Path) -> None:
    """Writes `report_dict` as indented JSON; the folder is made if need be."""
    _write(path, json.dumps(report_dict(report), indent=2, allow_nan=False) + "\n")


# --- HTML ----------------------------------------------------------------------


def report_html(report: Report) -> str:
    """One page without any request to elsewhere; everything from the model is escaped."""
    rows = fold(report)
    word, because = verdict(report)
    return _template().render(
        report=report,
        rows=rows,
        verdict=word,
        because=because,
        passes=_tally(d.pass_name for d in report.decisions),
        outcomes=_tally(d.outcome.value for d in report.decisions),
        pass_outcomes=_pass_outcomes(report),
        short=_short,
        place=_place,
    )


def _tally(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names))


def _place(reason: Reason | None, location: Location | None) -> Location | None:
    return (reason.location if reason else None) or location


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    source = files("fxport").joinpath("templates/report.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def write_html(report: Report, path: str | Path) -> None:
    """Writes `report_html`; the folder is made if need be."""
    _write(path, report_html(report))


def _write(path: str | Path, text: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
