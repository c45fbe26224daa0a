"""An `Explanation` as text for terminals (80 columns) and as plain JSON values.

Lines that say the same of several layers are folded: ``blocks.0..31.attn  x 32``.
"""

from __future__ import annotations

import enum
import re
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from fxport.errors import Location, Reason
from fxport.explain_records import Door, Explanation, Site
from fxport.report import Outcome

__all__ = [
    "attention_summary",
    "explanation_dict",
    "explanation_text",
    "left_text",
    "short_location",
]

WIDTH = 80
_NAMED = 3  # different reasons that the summary names

T = TypeVar("T")


def short_location(location: Location | None) -> str:
    """``model.py:41``."""
    return f"{Path(location.file).name}:{location.line}" if location else ""


def attention_summary(sites: Sequence[Site]) -> str:
    """``attention 30 of 32, 2 left: mask depends on data (model.py:41)``."""
    attention = [s for s in sites if s.outcome is not Outcome.PROVEN]
    left = [s for s in attention if s.outcome is Outcome.LEFT]
    if not attention:
        return "attention: none found"
    text = f"attention {len(attention) - len(left)} of {len(attention)}"
    if left:
        text += f", {len(left)} left: {_causes([s.reason for s in left if s.reason])}"
    notes = [note for s in attention for note in s.notes]
    if notes:
        text += f"; {len(notes)} with a dense mask: {_causes(notes)}"
    return text


def _causes(reasons: Iterable[Reason]) -> str:
    """What the codes say, each line named once."""
    words = dict.fromkeys(
        f"{reason.code.replace('-', ' ')} ({short_location(reason.location) or 'line unknown'})"
        for reason in reasons
    )
    shown = list(words)[:_NAMED]
    more = len(words) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def left_text(sites: Sequence[Site], others: Sequence[Reason] = ()) -> str:
    """The summary, then every reason once: the text of a warning."""
    reasons = [s.reason for s in sites if s.outcome is Outcome.LEFT and s.reason]
    reasons += [note for s in sites for note in s.notes]
    lines = [f"  {line}" for line in dict.fromkeys(map(str, [*reasons, *others]))]
    return "\n".join([attention_summary(sites), *lines])


def explanation_text(explanation: Explanation) -> str:
    """Summary first, then one line per folded group, then the obstacles in full."""
    blocks = ["\n".join(_head(explanation))]
    blocks += _section("attention", [_site(g) for g in _folded(explanation.sites)])
    if explanation.linears is not None:
        folded = _fold(explanation.linears, lambda x: x.weight, lambda x: (x.sharding, x.why))
        lines = [
            _entry(name, count, f"{x.sharding}" + (f": {x.why}" if x.why else ""), x.location)
            for x, name, count in folded
        ]
        blocks += _section("linears", lines)
    folded_positions = _fold(
        explanation.positions, lambda x: x.module, lambda x: (x.subject, x.detail)
    )
    lines = [
        _entry(x.subject, count, x.detail, x.location, name) for x, name, count in folded_positions
    ]
    blocks += _section("positions", lines)
    blocks += _section("graph breaks", _breaks(explanation))
    blocks += _section("in the way of a port", [_reason(r) for r in explanation.obstacles])
    if explanation.training is not None:
        blocks += _section("left by torch.compile", _only_in_training(explanation))
    return "\n\n".join(blocks)


def _only_in_training(explanation: Explanation) -> list[str]:
    """Sites that a port rewrites, or that it leaves for another reason."""
    assert explanation.training is not None
    known = {_key(site) for site in explanation.left}
    left = [site for site in explanation.training.left if _key(site) not in known]
    return [_site(group) for group in _folded(left)] + _breaks(explanation.training)


def _breaks(explanation: Explanation) -> list[str]:
    return [_fill(f"- {b.message}", b.location) for b in explanation.graph_breaks]


def _key(site: Site) -> Hashable:
    return site.location, _same(site.reason)


def _head(explanation: Explanation) -> list[str]:
    lines = [_fill(f"{explanation.subject}: {explanation.summary}")]
    if explanation.door is Door.SERVING:
        count = len(explanation.obstacles)
        verdict = "would succeed" if not count else f"refused, {_count(count, 'obstacle')}"
        lines.append(f"port: {verdict}")
        if explanation.training is not None:
            lines.append(
                _fill(f"{_compiled(explanation.training)}; {explanation.training.summary}")
            )
    else:
        lines.append(_compiled(explanation))
    return lines


def _compiled(explanation: Explanation) -> str:
    breaks = _count(len(explanation.graph_breaks), "graph break")
    return f"torch.compile: {_count(explanation.graphs, 'graph')}, {breaks}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["\n".join([f"{title}:", *lines])] if lines else []


# --- one line each ----------------------------------------------------------------------------


def _site(group: tuple[Site, str, int]) -> str:
    site, name, count = group
    what = site.detail.removeprefix("fxport::attention ")
    if site.outcome is Outcome.REWRITTEN:
        text = f"-> fxport::attention {what}"
    else:
        text = "no attention, stays" if site.outcome is Outcome.PROVEN else "LEFT as it is"
    lines = [_entry(name or site.subject, count, text, site.location)]
    if site.reason is not None:
        lines.append(_reason(site.reason, indent="      "))
    lines += [_reason(note, indent="      ") for note in site.notes]
    return "\n".join(lines)


def _entry(name: str, count: int, text: str, location: Location | None, module: str = "") -> str:
    times = f" x {count}" if count > 1 else ""
    where = f" [{module}]" if module else ""
    return _fill(f"- {name}{where}{times}: {text}", location)


def _fill(text: str, location: Location | None = None) -> str:
    if location is not None:
        text += f" ({short_location(location)})"
    return "\n".join(
        _wrap(text, "  ", "      ") if text.startswith("- ") else _wrap(text, "", "  ")
    )


def _reason(reason: Reason, indent: str = "  ") -> str:
    """The message, the line (never wrapped: a terminal links it), its source, what to change."""
    lines = _wrap(f"{reason.message} [{reason.code}]", indent, indent + "  ")
    if reason.location is not None:
        lines.append(f"{indent}  {reason.location}")
        if reason.location.source:
            source = f"{indent}    {reason.location.source}"
            lines.append(source if len(source) <= WIDTH else source[: WIDTH - 3] + "...")
    if reason.hint:
        lines += _wrap(f"-> {reason.hint}", indent + "  ", indent + "     ")
    return "\n".join(lines)


def _wrap(text: str, first: str, further: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=further, break_on_hyphens=False
    )


# --- folding ----------------------------------------------------------------------------------


def _folded(sites: Sequence[Site]) -> list[tuple[Site, str, int]]:
    return _fold(
        sites,
        lambda s: s.module,
        lambda s: (s.outcome, s.subject, s.detail, s.location, _same(s.reason), s.notes),
    )


def _same(reason: Reason | None) -> tuple[object, ...]:
    """A reason without the layer numbers that its message may quote."""
    if reason is None:
        return ()
    return reason.code, _starred(reason.message), reason.location, reason.hint


def _starred(text: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|\b)", "*", text)


def _fold(
    items: Sequence[T], name: Callable[[T], str], key: Callable[[T], Hashable]
) -> list[tuple[T, str, int]]:
    """Items that differ in layer numbers only: (the first, their common name, how many)."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault((_starred(name(item)), key(item)), []).append(item)
    return [(g[0], layer_names([name(i) for i in g]), len(g)) for g in groups.values()]


def layer_names(names: Sequence[str]) -> str:
    """``blocks.0.attn`` ... ``blocks.31.attn``  ->  ``blocks.0..31.attn``."""
    split = [name.split(".") for name in dict.fromkeys(names)]
    parts = [list(dict.fromkeys(column)) for column in zip(*split, strict=True)]
    return ".".join(column[0] if len(column) == 1 else _range(column) for column in parts)


def _range(numbers: Sequence[str]) -> str:
    """``0..3,5``: runs of layer numbers."""
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


# --- JSON -------------------------------------------------------------------------------------


def explanation_dict(explanation: Explanation) -> dict[str, object]:
    """Plain JSON values; field names as in `fxport.explain_records`."""
    plain = _plain(asdict(explanation))
    assert isinstance(plain, dict)
    return {
        "subject": plain.pop("subject"),
        "door": plain.pop("door"),
        "ok": explanation.ok,
        "summary": explanation.summary,
        **plain,
    }


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.value if isinstance(value, enum.Enum) else value
