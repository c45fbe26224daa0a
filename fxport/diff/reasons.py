"""What the pane of a node says: the decision that it is part of, or what became of it, in words."""

from __future__ import annotations

from collections.abc import Sequence

from fxport.diff.record import Change, NodeRecord, Row
from fxport.report import Decision

__all__ = ["decision_text"]


def decision_text(row: Row, decisions: Sequence[Decision]) -> str:
    """One or more sentences; never empty."""
    found = _about(row, decisions)
    said = [_sentence(decision) for decision in found]
    return " ".join([*said, _in_words(row)])


def _about(row: Row, decisions: Sequence[Decision]) -> list[Decision]:
    """Decisions on the node's line; for a changed node else the nearest one of its module."""
    records = [r for r in (row.before, row.after) if r is not None]
    for record in records:
        exact = [d for d in decisions if _same_line(d, record) and d.module == record.module]
        if exact:
            return exact
    if row.change is Change.KEPT:
        return []
    modules = {r.module for r in records}
    near = [d for d in decisions if d.module in modules]
    return sorted(near, key=lambda d: _distance(d, records))[:1]


def _same_line(decision: Decision, record: NodeRecord) -> bool:
    return decision.location is not None and str(decision.location) == str(record.location)


def _distance(decision: Decision, records: Sequence[NodeRecord]) -> float:
    lines = [
        abs(decision.location.line - r.location.line)
        for r in records
        if decision.location and r.location and decision.location.file == r.location.file
    ]
    return min(lines, default=float("inf"))


def _sentence(decision: Decision) -> str:
    detail = f": {decision.detail}" if decision.detail else ""
    why = f": {decision.reason.message}" if decision.reason is not None else ""
    hint = f" ({decision.reason.hint})" if decision.reason and decision.reason.hint else ""
    return f"{decision.subject} {decision.outcome.value}{detail}{why}{hint}."


def _in_words(row: Row) -> str:
    by = f" by the pass {row.made_by}" if row.made_by else ""
    old = "" if row.before is None else row.before.target
    new = "" if row.after is None else row.after.target
    if row.change is Change.REPLACED:
        return f"{new} stands in place of {old}, put there{by or ' unwatched'}."
    return {
        Change.KEPT: "Kept as it was.",
        Change.CHANGED: f"The same operation with other arguments{by}.",
        Change.CREATED: f"New{by}.",
        Change.ERASED: f"Taken out{by}: nothing uses it any more.",
    }[row.change]
