"""A graph diff as a table, as JSON values and as a unified text diff."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fxport.diff.reasons import decision_text
from fxport.diff.record import Change, GraphDiff, NodeRecord, Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Folded", "as_dict", "fold", "table", "unified"]

WIDTH = 80
_HEADERS, _MOST = ("change", "node", "what", "where"), (14, 22, 22, 18)
_LAYER = re.compile(r"(?<=[./])\d+(?=[./]|$)")
_ORDINAL = re.compile(r"#\d+$")


@dataclass(frozen=True)
class Folded:
    """Rows that say the same of several layers.

    Attributes:
        name: module and operation; layer numbers are ``*`` when there are several rows.
        rows: the rows, in order.
    """

    name: str
    rows: tuple[Row, ...]


def fold(rows: Iterable[Row]) -> tuple[Folded, ...]:
    """In the order of each group's first row."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        one = _one(row)
        name = _LAYER.sub("*", _ORDINAL.sub("", one.key))
        old, new = (_kind(row.before), _kind(row.after))
        groups.setdefault((name, row.change.value, old, new, row.made_by), []).append(row)
    return tuple(
        Folded(key[0] if len(found) > 1 else _one(found[0]).key, tuple(found))
        for key, found in groups.items()
    )


def table(diff: GraphDiff) -> str:
    """At most 80 columns; a summary first, then only what changed."""
    from tabulate import tabulate

    counts = Counter(row.change for row in diff.rows)
    summary = ", ".join(f"{counts[c]} {c.value}" for c in Change if counts[c])
    if not diff:
        return f"no difference ({summary})"
    lines = []
    for group in fold(diff.changes):
        row = group.rows[0]
        times = f" x {len(group.rows)}" if len(group.rows) > 1 else ""
        lines.append(
            (row.change.value + times, group.name, _what(row, len(group.rows)), _where(row))
        )
    return f"{summary}\n\n" + tabulate(
        lines, headers=_HEADERS, maxcolwidths=_widths(lines), tablefmt="simple"
    )


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    """What is done gets the room that the other columns leave."""
    change, node, _, where = (
        min(most, max(len(cell) for cell in column))
        for most, *column in zip(_MOST, _HEADERS, *lines, strict=True)
    )
    between = 2 * (len(_HEADERS) - 1)
    return [change, node, WIDTH - between - change - node - where, where]


def _what(row: Row, count: int) -> str:
    by = f" ({row.made_by})" if row.made_by else ""
    if row.change is Change.REPLACED and row.before and row.after:
        return f"{row.before.target} -> {row.after.target}{by}"
    if row.change is Change.CHANGED and row.before and row.after and count == 1:
        return f"({row.before.arguments}) -> ({row.after.arguments}){by}"
    return _one(row).target + by


def _where(row: Row) -> str:
    location = (row.before or _one(row)).location
    return "" if location is None else f"{location.file.rsplit('/', 1)[-1]}:{location.line}"


def _one(row: Row) -> NodeRecord:
    found = row.after if row.change is not Change.REPLACED else row.before
    found = found or row.before
    assert found is not None
    return found


def _kind(record: NodeRecord | None) -> str:
    if record is None:
        return ""
    return record.op if record.op == "placeholder" else record.target


def unified(diff: GraphDiff) -> str:
    """Lines hold stable names and plain arguments, no shapes; three lines around each change.

    Hunks have no line numbers: a parameter more at the top of the graph would shift them all.
    """
    before = [str(r.before) for r in _in_order(diff, "before")]
    after = [str(r.after) for r in _in_order(diff, "after")]
    lines = difflib.unified_diff(before, after, "before", "after", lineterm="")
    return "\n".join("@@" if line.startswith("@@ -") else line for line in lines)


def _in_order(diff: GraphDiff, side: str) -> list[Row]:
    graph = diff.before.graph if side == "before" else diff.after.graph
    found = {r.node: row for row in diff.rows if (r := getattr(row, side)) is not None}
    return [found[node] for node in graph.nodes]


def as_dict(diff: GraphDiff) -> dict[str, Any]:
    """``{"summary": {change: count}, "rows": [{"change", "pass", "decision",
    "before", "after"}]}``.

    ``before`` and ``after`` are null or ``{"key", "node", "op", "target", "arguments", "value",
    "module", "location"}``, all strings but location: null or ``{"file", "line", "function",
    "source"}``. ``node`` is the fx name.
    """
    counts = Counter(row.change.value for row in diff.rows)
    rows = [
        {
            "change": row.change.value,
            "pass": row.made_by,
            "decision": decision_text(row, diff.decisions),
            "before": _record_dict(row.before),
            "after": _record_dict(row.after),
        }
        for row in diff.rows
    ]
    return {"summary": dict(counts), "rows": rows}


def _record_dict(record: NodeRecord | None) -> dict[str, Any] | None:
    if record is None:
        return None
    place = record.location
    names = ("key", "op", "target", "arguments", "value", "module")
    return {
        **{name: getattr(record, name) for name in names},
        "node": record.node.name,
        "location": None if place is None else asdict(place),
    }
