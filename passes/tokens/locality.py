"""Proves that everything outside attention treats each token on its own, and finds positions.

Before (a captured graph, T symbolic)             After the analysis
    arange(0, T)                    [T]            TOKEN, gathered: positions
    slice(freqs, 0, None, T)        [T, D/2]       TOKEN, gathered: freqs[positions]
    linear(x, w)                    [B, T, C]      (BATCH, TOKEN, C)
    conv1d(x.transpose(1, 2), w)                   refused: mixes tokens, with file and line

The graph is not changed; `fxport.passes.positions` does that from the result.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.location import user_location
from fxport.errors import Reason, ReasonCode
from fxport.passes.axes import Axes, Axis, Refusal, Symbols, checked
from fxport.passes.constants import depends_on, evaluate, is_symbolic
from fxport.passes.tokens.rules import propagate
from fxport.passes.tokens.weights import axes_of_weights

__all__ = ["Locality", "Rows", "analyse"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """A value whose row t along `dim` is row ``t + offset`` of a longer table.

    Attributes:
        table: the table's node; None for the integers 0, 1, 2, ... (arange); a tensor when the
            table was evaluated at the longest length.
        dim: the table's dimension that counts positions.
        offset: first row.
    """

    table: fx.Node | torch.Tensor | None
    dim: int
    offset: int


@dataclass(frozen=True)
class Locality:
    """Result of the analysis.

    Attributes:
        axes: axes of every tensor-valued node that was understood.
        rows: the nodes to be gathered by position.
        folded: constants that no rule understands, and that do not depend on any size.
        reasons: every obstacle; empty when the graph is proven.
    """

    axes: Mapping[fx.Node, Any]
    rows: Mapping[fx.Node, Rows]
    folded: Mapping[fx.Node, torch.Tensor]
    reasons: tuple[Reason, ...]


def analyse(gm: fx.GraphModule, symbols: Symbols, limit: int) -> Locality:
    """Labels every value of a captured graph.

    Args:
        gm: a captured graph after attention was rewritten.
        symbols: B and T.
        limit: the longest T that will be served; tables are evaluated at this length.
    """
    data = depends_on(gm, InputKind.DATA)
    learned = depends_on(gm, InputKind.PARAMETER)
    axes: dict[fx.Node, Any] = {}
    rows: dict[fx.Node, Rows] = {}
    folded: dict[fx.Node, torch.Tensor] = {}
    refused: dict[fx.Node, Refusal] = {}
    for node in gm.graph.nodes:
        if node.op == "output" or is_symbolic(node):
            continue
        try:
            found = None if node in data else _source(node, symbols)
            if found is not None and found.table not in refused:
                axes[node] = _row_axes(node, found, symbols)
                rows[node] = found
            else:
                axes[node] = _axes(node, axes, refused, symbols)
        except Refusal as refusal:
            constant = node not in data and node not in learned
            value = _folded(node, symbols, limit) if constant else None
            table = _table(node, symbols, limit) if constant and value is None else None
            if value is not None:
                folded[node] = value
                axes[node] = tuple(symbols.factor(size) for size in value.shape)
            elif table is not None:
                axes[node] = _row_axes(node, table, symbols)
                rows[node] = table
            elif node not in data and (made := axes_of_weights(node, axes, symbols)) is not None:
                axes[node] = made
            else:
                refused[node] = refusal
    reasons = _reasons(refused, data | learned, set(rows) | set(folded))
    return Locality(axes, rows, folded, reasons)


def _axes(
    node: fx.Node, axes: dict[fx.Node, Any], refused: dict[fx.Node, Refusal], symbols: Symbols
) -> Any:
    if node.op == "placeholder" and graph_input(node).kind is InputKind.DATA:
        return ((Axis.BATCH,), (Axis.TOKEN,))
    if node.op in ("placeholder", "get_attr"):
        return tuple(symbols.factor(size) for size in shape_of(node))
    for source in node.all_input_nodes:
        if source in refused:
            raise refused[source]
    if node.target is operator.getitem:
        picked, index = node.args
        return axes[picked][index]  # type: ignore[index]
    return propagate(node, axes, symbols)


def _reasons(
    refused: dict[fx.Node, Refusal], varying: set[fx.Node], resolved: set[fx.Node]
) -> tuple[Reason, ...]:
    """One reason per root cause that reaches the output.

    A refused constant that only feeds a table or a folded constant is no obstacle.
    """
    roots: dict[int, Reason] = {}
    first: dict[int, fx.Node] = {}
    for node, refusal in refused.items():
        first.setdefault(id(refusal), node)
        harmless = node not in varying and all(
            user in resolved or (user in refused and user not in varying) for user in node.users
        )
        if not harmless and id(refusal) not in roots:
            location = user_location(first[id(refusal)])
            roots[id(refusal)] = Reason(refusal.code, refusal.message, location, refusal.hint)
    return tuple(roots.values())


# --- values that count positions --------------------------------------------------------------


_COUNTING = {torch.int64, torch.int32, torch.float64, torch.float32}


def _source(node: fx.Node, symbols: Symbols) -> Rows | None:
    """`arange` over the tokens, or the first T rows of a table."""
    target = node.target
    if target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        bound = arguments(node)
        start, step = bound.get("start", 0), bound.get("step", 1)
        whole = isinstance(start, (int, float)) and float(start).is_integer()
        if shape_of(node) == (symbols.length,) and whole and step == 1:
            # Counting in a narrower dtype rounds on the way: such a range is evaluated.
            return Rows(None, 0, int(start)) if node.meta["val"].dtype in _COUNTING else None
        if all(isinstance(size, int) for size in shape_of(node)):
            return None
        if shape_of(node) == (symbols.batch,):
            raise Refusal(
                ReasonCode.POSITION_UNKNOWN,
                "this arange counts along the first axis of the token ids, which is the batch",
                "take the token ids as [B, T]; where they are, attention may run along the batch "
                "(torch's layers do without batch_first=True)",
            )
        raise Refusal(ReasonCode.POSITION_UNKNOWN, "this arange does not count token positions")
    if target in (aten.slice.Tensor, aten.narrow.default):
        bound = arguments(node)
        table, dim = bound["self"], bound["dim"] % node.meta["val"].dim()
        start = bound["start"] or 0
        grows = shape_of(node)[dim] == symbols.length and isinstance(shape_of(table)[dim], int)
        if grows and isinstance(start, int) and start >= 0 and bound.get("step", 1) == 1:
            return Rows(table, dim, start)
    return None


def _row_axes(node: fx.Node, rows: Rows, symbols: Symbols) -> Axes:
    """Raises Refusal where another dimension counts tokens as well."""
    sizes = enumerate(shape_of(node))
    return checked(tuple((Axis.TOKEN,) if i == rows.dim else symbols.factor(s) for i, s in sizes))


# A table must agree with its own beginning at these lengths (and at every power of two).
_PROBES = (1, 2, 3, 7, 37)


def _folded(node: fx.Node, symbols: Symbols, limit: int) -> torch.Tensor | None:
    """The value of a constant that is the same for every length."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not all(isinstance(s, int) for s in shape_of(node)):
        return None
    try:
        longest: torch.Tensor = evaluate(node, {symbols.length: limit})
        for length in _probes(limit):
            if not torch.equal(evaluate(node, {symbols.length: length}), longest):
                return None
    except ValueError:  # depends on the batch size
        return None
    return longest


def _probes(limit: int) -> list[int]:
    return sorted({n for n in (*_PROBES, *(2**i for i in range(20)), limit - 1) if 0 < n < limit})


def _table(node: fx.Node, symbols: Symbols, limit: int) -> Rows | None:
    """A constant of one token axis that is the beginning of its own longest version."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    sizes = shape_of(node)
    growing = [i for i, s in enumerate(sizes) if s == symbols.length]
    if len(growing) != 1 or not all(isinstance(s, int) or s == symbols.length for s in sizes):
        return None
    dim = growing[0]
    try:
        longest = evaluate(node, {symbols.length: limit})
        for length in _probes(limit):
            part = evaluate(node, {symbols.length: length})
            if not torch.equal(part, longest.narrow(dim, 0, length)):
                return None
    except ValueError:  # depends on the batch size: no table
        return None
    return Rows(longest, dim, 0)
