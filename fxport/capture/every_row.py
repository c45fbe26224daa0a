"""What it costs that work on selected rows is done for every row, as the report says it."""

from __future__ import annotations

from torch import fx

from fxport.capture.location import module_of, user_location
from fxport.errors import Location, Reason, ReasonCode
from fxport.report import Decision, Outcome

__all__ = ["EVERY_ROW", "every_row_records"]

# On what was computed for every row, also in a unified graph.
EVERY_ROW = "fxport_every_row"


def every_row_records(gm: fx.GraphModule) -> tuple[Decision, ...]:
    """What it costs that selections are gone: one record for each place and module."""
    places: dict[tuple[str, Location | None], int] = {}
    for node in gm.graph.nodes:
        if node.meta.get(EVERY_ROW):
            place = (module_of(node), user_location(node))
            places[place] = places.get(place, 0) + 1
    return tuple(_record(count, *place) for place, count in places.items())


def _record(count: int, module: str, line: Location | None) -> Decision:
    reason = Reason(
        ReasonCode.EVERY_TOKEN,
        f"{count} selections are computed for every token and kept where selected: "
        f"{count} times the work of one, however few tokens each has",
        line,
        "experts that are alike, and chosen by one topk, would run on their own tokens only",
    )
    subject, detail = "work on selected tokens", f"{count} selections"
    return Decision("selection", Outcome.LEFT, subject, detail, module, line, reason)
