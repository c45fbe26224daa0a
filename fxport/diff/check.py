"""Numbers on a graph diff (`GraphDiff.check`): both graphs run, compared node by node.

    before:  q, k, v -> matmul -> mul -> softmax -> matmul ----> linear ...
                                                      |compared    |compared
    after:   q, k, v -> fxport::attention ---------> getitem --> linear ...

Compared are the values at every pair of corresponding nodes and at the outputs, and the gradients
with respect to them (one backward from the outputs with the same random weights on both sides).
A value that differs accuses what computes it; a gradient that differs accuses what uses it.
"""

from __future__ import annotations

import operator
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxport.capture.location import user_location
from fxport.diff.ablation import Agrees, put_in
from fxport.diff.numbers import TOLERANCES, Difference, difference, magnitude
from fxport.diff.running import Trace, input_values, is_overwritten, node_name, run_traced
from fxport.errors import Location

__all__ = ["Check", "Compared", "Difference", "Divergence", "check_pairs"]


@dataclass(frozen=True)
class Compared:
    """One pair of nodes. A difference is None where there was nothing to compare.

    Attributes:
        before, after: the nodes, of the graphs that were given.
        value, gradient: their differences.
        value_ok, gradient_ok: within tolerance.
        note: why the values could not be compared, e.g. other shapes; "" where they were.
    """

    before: fx.Node
    after: fx.Node
    value: Difference | None
    gradient: Difference | None = None
    value_ok: bool = True
    gradient_ok: bool = True
    note: str = ""

    @property
    def ok(self) -> bool:
        """Both were compared where they could be, and are within tolerance."""
        return self.value_ok and self.gradient_ok


@dataclass(frozen=True)
class Divergence:
    """Where two graphs part.

    Attributes:
        what: ``"value"`` or ``"gradient"``.
        seen: the first pair that differs: in order of computation for values, in backward order
            for gradients.
        node: the node of the graph after that is to blame, as far as pairs can tell.
        suspects: all nodes after it could be: `node` and those around it that have no pair.
    """

    what: str
    seen: Compared
    node: fx.Node
    suspects: tuple[fx.Node, ...]

    @property
    def location(self) -> Location | None:
        """The user's line of `node`."""
        return user_location(self.node)

    def __str__(self) -> str:
        difference = self.seen.value if self.what == "value" else self.seen.gradient
        size = self.seen.note if difference is None else f"relative {difference.relative:.1e}"
        where = f" ({self.location})" if self.location else ""
        seen = "" if self.seen.after is self.node else f", seen at `{self.seen.after.name}`"
        return f"{self.what} differs first at `{self.node.name}`{where}: {size}{seen}"


@dataclass(frozen=True)
class Check:
    """The result. ``str()`` is a table of at most 80 columns.

    Attributes:
        rows: every pair compared, in order of computation; outputs last.
        dtype: what the graphs were computed in; None for their own.
        rtol, atol: a pair is equal when ``absolute <= atol + rtol * largest |before|``. For
            gradients atol is a share of the largest gradient, if that is above 1.
        value, gradient: where they part; None where they do not.
    """

    rows: tuple[Compared, ...]
    dtype: torch.dtype | None
    rtol: float
    atol: float
    value: Divergence | None = None
    gradient: Divergence | None = None

    @property
    def first(self) -> Divergence | None:
        """Where to look: the first value that differs, else the first gradient."""
        return self.value or self.gradient

    @property
    def ok(self) -> bool:
        return self.first is None

    def __str__(self) -> str:
        return _text(self)


def check_pairs(
    before: fx.GraphModule,
    after: fx.GraphModule,
    pairs: Iterable[tuple[fx.Node, fx.Node]],
    *inputs: Any,
    atol: float | None = None,
    rtol: float | None = None,
    grads: bool = True,
    dtype: torch.dtype | None = torch.float64,
    given: Mapping[str, Tensor] | None = None,
) -> Check:
    """Runs both graphs on the same inputs and compares.

    Args:
        pairs: corresponding nodes, (before, after); the outputs are always compared.
        inputs: one value per placeholder, or one per DATA placeholder of a captured graph.
        atol, rtol: tolerances; by default those of the dtype computed in.
        grads: compare gradients too.
        dtype: compute in this dtype, casts inside the graphs included; None: in their own.
        given: further inputs by (qualified) name: parameters without a value, `positions`.

    Raises:
        FxportError: an input is missing, or a graph draws random numbers.
    """
    pairs = [*pairs, (before.graph.output_node(), after.graph.output_node())]
    pairs = sorted(dict.fromkeys(pairs), key=lambda pair: pair[1])
    values = input_values((before, after), inputs, given or {})
    left = run_traced(before, {b for b, _ in pairs}, values, grads, dtype)
    right = run_traced(after, {a for _, a in pairs}, values, grads, dtype)
    computed = dtype or _own_dtype(left)
    default = TOLERANCES[computed]
    rtol, atol = (d if t is None else t for t, d in zip((rtol, atol), default, strict=True))
    rows = _compare(pairs, left, right, rtol, atol)

    value, gradient = _first_value(rows), _first_gradient(rows)

    def again(seen: Compared, gm: fx.GraphModule, node: fx.Node, graded: bool) -> Compared:
        trace = run_traced(gm, {node}, values, graded, dtype)
        return _compare([(seen.before, node)], left, trace, rtol, atol)[0]

    # Behind a wrong value every gradient is another.
    if value is not None:
        retry = partial(again, value.seen, graded=False)
        value = _sharpened(value, after, rows, lambda gm, node: retry(gm, node).value_ok)
    elif gradient is not None:
        retry = partial(again, gradient.seen, graded=True)
        gradient = _sharpened(gradient, after, rows, lambda gm, node: retry(gm, node).ok)
    return Check(rows, dtype, rtol, atol, value, gradient)


# --- comparing --------------------------------------------------------------------------------


def _own_dtype(trace: Trace) -> torch.dtype:
    """The narrowest dtype that was computed in."""
    found = {
        x.dtype for values in trace.values.values() for x in values if isinstance(x, Tensor)
    } & set(TOLERANCES)
    return max(found, key=lambda d: TOLERANCES[d][0], default=torch.float64)


def _compare(
    pairs: Sequence[tuple[fx.Node, fx.Node]],
    left: Trace,
    right: Trace,
    rtol: float,
    atol: float,
) -> tuple[Compared, ...]:
    largest = max([1.0, *(magnitude(g) for g in left.gradients.values())])
    rows = []
    for before, after in pairs:
        old, new = left.values.get(before, []), right.values.get(after, [])
        is_output = after.op == "output"
        note = _mismatch(old, new)
        if note:
            rows.append(Compared(before, after, None, None, not is_output, True, note))
            continue
        tensors = [i for i, x in enumerate(old) if isinstance(x, Tensor)]
        values = [(new[i], old[i]) for i in tensors]
        gradients = [
            (g[1], g[0])
            for i in tensors
            if (g := _both(left.gradients.get((before, i)), right.gradients.get((after, i))))
            and not _lost(before, left, i)
            and not _lost(after, right, i)
        ]
        value, value_ok = _worst(values, rtol, atol)
        gradient, gradient_ok = _worst(gradients, rtol, atol * largest)
        rows.append(Compared(before, after, value, gradient, value_ok, gradient_ok))
    return tuple(rows)


def _both(old: Tensor | None, new: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """No gradient is a zero gradient."""
    if old is None and new is None:
        return None
    old = torch.zeros_like(new) if old is None else old  # type: ignore[arg-type]
    return old, torch.zeros_like(old) if new is None else new


def _lost(node: fx.Node, trace: Trace, index: int) -> bool:
    """What is written into and used elsewhere, too, may not tell its gradient."""
    return (node, index) not in trace.gradients and is_overwritten(node)


def _mismatch(old: Sequence[Any], new: Sequence[Any]) -> str:
    if len(old) != len(new):
        return f"{len(new)} values instead of {len(old)}"
    for a, b in zip(old, new, strict=True):
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return "a tensor against a number"
        if isinstance(a, Tensor) and a.shape != b.shape:
            return f"shape {list(b.shape)} instead of {list(a.shape)}"
        if not isinstance(a, Tensor) and a != b:
            return f"{b} instead of {a}"
    return ""


def _worst(
    pairs: Iterable[tuple[Tensor, Tensor]], rtol: float, atol: float
) -> tuple[Difference | None, bool]:
    worst: Difference | None = None
    fine = True
    for actual, expected in pairs:
        found = difference(actual, expected)
        fine = fine and found.absolute <= atol + rtol * magnitude(expected)
        if worst is None or found.absolute > worst.absolute:
            worst = found
    return worst, fine


# --- whom to blame ----------------------------------------------------------------------------


def _first_value(rows: Sequence[Compared]) -> Divergence | None:
    """A value that differs was computed wrongly between here and the pairs that agree."""
    seen = next((row for row in rows if not row.value_ok), None)
    if seen is None:
        return None
    compared = {row.after for row in rows if not row.note}
    suspects = _around(seen.after, compared, lambda n: n.all_input_nodes)
    return _blame(
        "value", seen, [n for n in suspects if n not in compared or n is seen.after], rows
    )


def _first_gradient(rows: Sequence[Compared]) -> Divergence | None:
    """A gradient that differs came from one of the users, up to the pairs that agree."""
    seen = next((row for row in reversed(rows) if not row.gradient_ok), None)
    if seen is None:
        return None
    compared = {row.after for row in rows if not row.note}
    suspects = _around(seen.after, compared, lambda n: list(n.users))
    return _blame("gradient", seen, suspects - {seen.after} or {seen.after}, rows)


def _around(
    start: fx.Node, stop: set[fx.Node], neighbours: Callable[[fx.Node], list[fx.Node]]
) -> set[fx.Node]:
    """`start` and what is reached from it, no further than the first nodes in `stop`."""
    found = {start}
    pending = [start]
    while pending:
        for node in neighbours(pending.pop()):
            if node not in found and node.op != "output":
                found.add(node)
                if node not in stop:
                    pending.append(node)
    return found


def _blame(
    what: str, seen: Compared, suspects: Iterable[fx.Node], rows: Sequence[Compared]
) -> Divergence:
    """Prefers a node that was changed, then a new one; of several, the nearest to `seen`."""
    partners = {row.after: row.before for row in rows}
    ordered = sorted(n for n in suspects if n.op == "call_function") or [seen.after]
    nearest = ordered if what == "gradient" else reversed(ordered)
    node = min(nearest, key=lambda n: _innocence(n, partners))
    return Divergence(what, seen, node, tuple(ordered))


def _sharpened(
    found: Divergence, after: fx.GraphModule, rows: Sequence[Compared], agrees: Agrees
) -> Divergence:
    """Of several new nodes side by side, the one without which the graphs agree."""
    paired = {row.after for row in rows}
    new = [node for node in found.suspects if node not in paired]
    if found.node in paired or len(new) < 2:
        return found
    node = put_in(after, new, found.seen.after, agrees)
    return found if node is None else replace(found, node=node)


def _innocence(node: fx.Node, partners: Mapping[fx.Node, fx.Node]) -> int:
    """0: its partner's call with other arguments; 1: new; 2: new, moves data; 3: the same call."""
    old = partners.get(node)
    if old is None or old.target is not node.target:
        return 2 if _only_moves(node) else 1
    # An input without a partner is a suspect itself.
    args = fx.node.map_arg((node.args, node.kwargs), lambda n: partners.get(n, _ANYTHING))
    return 3 if args == (old.args, old.kwargs) else 0


class _Anything:
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


_ANYTHING: Any = _Anything()


def _only_moves(node: fx.Node) -> bool:
    """Views and picks: they compute no numbers."""
    target = node.target
    if target is operator.getitem:
        return True
    returns = getattr(getattr(target, "_schema", None), "returns", ())
    return any(r.alias_info is not None for r in returns)


# --- text -------------------------------------------------------------------------------------

_SHOWN = 12
_NAME = 24


def _text(check: Check) -> str:
    from tabulate import tabulate

    dtype = str(check.dtype or "own dtypes").removeprefix("torch.")
    compared = sum(row.value is not None for row in check.rows)
    graded = sum(row.gradient is not None for row in check.rows)
    skipped = sum(bool(row.note) for row in check.rows)
    head = [f"{compared} values and {graded} gradients compared in {dtype}"]
    head[0] += f", {skipped} could not be" if skipped else ""
    # Behind a wrong value every gradient is another: what was computed first says more.
    equal = f"equal: rtol {check.rtol:g}, atol {check.atol:g}"
    head.append(equal if check.first is None else str(check.first))
    wrong = [row for row in check.rows if not row.value_ok]
    wrong = wrong or [row for row in reversed(check.rows) if not row.gradient_ok]
    worst = sorted(check.rows, key=_badness, reverse=True)
    shown = wrong[:_SHOWN] or worst[:_SHOWN]
    table = [
        [
            node_name(row.after)[-_NAME:],
            *_cells(row.value, row.value_ok),
            *_cells(row.gradient, row.gradient_ok),
        ]
        for row in shown
    ]
    headers = ["node", "abs", "rel", "ulp", "", "grad abs", "rel", "ulp", ""]
    more = f"and {len(wrong) - _SHOWN} more that differ" if len(wrong) > _SHOWN else ""
    text = tabulate(table, headers=headers, tablefmt="simple", disable_numparse=True)
    lines = [line for part in head for line in textwrap.wrap(part, 80, subsequent_indent="  ")]
    return "\n".join([*lines, "", text, *([more] if more else [])])


def _cells(difference: Difference | None, fine: bool) -> list[str]:
    if difference is None:
        return ["", "", "", "" if fine else "X"]
    numbers = (difference.absolute, difference.relative, difference.ulp)
    return [*(f"{n:.0e}" if n else "0" for n in numbers), "" if fine else "X"]


def _badness(row: Compared) -> float:
    return max(d.relative for d in (row.value, row.gradient, Difference(0, 0, 0)) if d is not None)
