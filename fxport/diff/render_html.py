"""A graph diff as one self-contained page: before and after side by side."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import Any

from fxport.diff.record import Change, GraphDiff, NodeRecord, Row
from fxport.diff.render_text import as_dict

__all__ = ["page"]

_LAYER = re.compile(r"^(?P<layer>(?:[^./#]+\.)*?\d+)(?=[./]|$)")
_ORDINAL = re.compile(r"#\d+")


@dataclass(frozen=True)
class _Section:
    """Rows of one layer ("" for what is in none), and how many layers after it say the same.

    Attributes:
        title: "h.0", or "h.0 to h.47".
        rows: (number of the row, row).
        members: the sections folded into this one, itself included.
    """

    title: str
    rows: tuple[tuple[int, Row], ...]
    members: tuple[_Section, ...] = ()

    @property
    def changed(self) -> bool:
        return any(row.change is not Change.KEPT for _, row in self.rows)


def page(diff: GraphDiff) -> str:
    """HTML. Needs no network; ``#node-7`` opens the details of row 7."""
    from jinja2 import Environment, StrictUndefined

    source = files("fxport").joinpath("templates/diff.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    content = as_dict(diff)
    counts = Counter(row.change for row in diff.rows)
    return environment.from_string(source).render(
        summary=[(c.value, counts[c]) for c in Change],
        sections=_folded(_sections(diff.rows)),
        data=_script_json(content["rows"]),
        same=not diff,
    )


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _record(row: Row) -> NodeRecord:
    found = row.after or row.before
    assert found is not None
    return found


def _layer(row: Row) -> str:
    record = _record(row)
    match = _LAYER.match(record.key) if record.op != "placeholder" else None
    return match["layer"] if match else ""


def _sections(rows: tuple[Row, ...]) -> list[_Section]:
    numbered = [(i, row) for i, row in enumerate(rows)]
    inputs = [(i, r) for i, r in numbered if _record(r).op in ("placeholder", "get_attr")]
    others = [(i, r) for i, r in numbered if _record(r).op not in ("placeholder", "get_attr")]
    found = [_Section("inputs and parameters", tuple(inputs))] if inputs else []
    for layer, group in groupby(others, key=lambda item: _layer(item[1])):
        found.append(_Section(layer, tuple(group)))
    return found


def _folded(sections: list[_Section]) -> list[_Section]:
    folded = []
    for _, group in groupby(sections, key=_signature):
        members = tuple(group)
        first, last = members[0], members[-1]
        title = first.title if len(members) == 1 else f"{first.title} to {last.title}"
        folded.append(_Section(title, first.rows, members))
    return folded


def _signature(section: _Section) -> tuple[Any, ...]:
    """What two layers that say the same share."""
    return tuple(
        (row.change, row.made_by, _kind(row.before, section), _kind(row.after, section))
        for _, row in section.rows
    )


def _kind(record: NodeRecord | None, section: _Section) -> tuple[str, ...]:
    if record is None:
        return ()
    key = _ORDINAL.sub("", record.key)
    own = key.removeprefix(section.title)
    return own, record.target, record.value
