"""What a port decided, as data. Rendering lives in `fxport.render`."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fxport.errors import Location, Reason

__all__ = ["Decision", "Outcome", "Report"]


class Outcome(enum.StrEnum):
    """What became of one place in the graph."""

    REWRITTEN = "rewritten"  # replaced by something faster, proven equal
    PROVEN = "proven"  # left as it is, and a property was proven of it
    LEFT = "left"  # an optimisation did not fire; `Decision.reason` says why
    REFUSED = "refused"  # stands in the way of the port; `Decision.reason` says why


@dataclass(frozen=True)
class Decision:
    """One line of the report.

    Attributes:
        pass_name: the pass that decided, e.g. ``"attention"``, ``"positions"``, ``"head"``.
        outcome: what became of the place.
        subject: what it is about, in words: ``"softmax"``, ``"mask"``, ``"wpe.weight"``.
        detail: what it became: ``"fxport::attention causal, 4 heads, scale 0.125"``.
        module: qualified name of the user's module, ``"blocks.0.attn"``, or "".
        location: the user's line.
        reason: set for LEFT and REFUSED.
    """

    pass_name: str
    outcome: Outcome
    subject: str
    detail: str = ""
    module: str = ""
    location: Location | None = None
    reason: Reason | None = None


@dataclass(frozen=True)
class Report:
    """All decisions of one port, and the facts found about the model.

    ``str(report)`` is a table. ``facts`` holds plain JSON values such as ``vocab_size``,
    ``hidden_size``, ``max_position_embeddings``, ``num_layers``.
    """

    model: str
    facts: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()

    def counts(self) -> Counter[tuple[str, Outcome]]:
        """How often each (pass, outcome) occurs."""
        return Counter((d.pass_name, d.outcome) for d in self.decisions)

    def left(self) -> tuple[Decision, ...]:
        """Places where an optimisation did not fire."""
        return tuple(d for d in self.decisions if d.outcome is Outcome.LEFT)

    def __str__(self) -> str:
        from fxport.render import report_table

        return report_table(self)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        from fxport.render import report_dict

        return report_dict(self)

    def to_json(self, path: str | Path) -> None:
        """Write the report as JSON."""
        from fxport.render import write_json

        write_json(self, path)

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained HTML page."""
        from fxport.render import write_html

        write_html(self, path)
