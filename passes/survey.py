"""Every serving pass on a captured model, going on past what refuses it.

`lower_for_serving` stops at the stage that fails; this collects what each stage has to say, so
that `fxport.explain` can list all of it. Nothing comes out that could be served.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import fx

from fxport.capture.export import Captured
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.location import module_of, user_location
from fxport.errors import PortError, Reason
from fxport.explain_records import PositionSite, Site
from fxport.passes.attention.lse import sinks_as_columns
from fxport.passes.attention.rewrite import rewrite_attention
from fxport.passes.axes import Symbols
from fxport.passes.constants import depends_on
from fxport.passes.decisions import sites_of
from fxport.passes.functional import functionalise
from fxport.passes.head import find_head
from fxport.passes.limits import longest_sequence
from fxport.passes.lookups import look_up_first
from fxport.passes.masked_caches import read_by_causal_attention, read_under_masks
from fxport.passes.obstacles import obstacles
from fxport.passes.split import token_embedding
from fxport.passes.table_lookups import look_up_in_tables
from fxport.passes.tokens.locality import Locality, Rows, analyse
from fxport.report import Outcome

__all__ = ["Survey", "survey"]

aten = torch.ops.aten

# Tables are evaluated up to here when nothing in the model bounds the length.
_UNBOUNDED_LENGTH = 4096


@dataclass(frozen=True)
class Survey:
    """What the passes said.

    Attributes:
        sites: one per softmax or SDPA call.
        positions: one per value that depends on the position.
        reasons: what refused a stage.
    """

    sites: tuple[Site, ...]
    positions: tuple[PositionSite, ...]
    reasons: tuple[Reason, ...]


def survey(captured: Captured) -> Survey:
    """Runs the serving passes; the captured graph is changed."""
    gm = captured.graph
    reasons: list[Reason] = []
    tokens = next(n for n in gm.graph.nodes if n.name == captured.tokens)
    symbols = Symbols(captured.batch, captured.length)
    read_under_masks(gm, symbols)
    with _collected(reasons):
        functionalise(gm)
    look_up_in_tables(gm, tokens)
    look_up_first(gm, tokens)
    limit = longest_sequence(gm, captured.length, captured.limit) or _UNBOUNDED_LENGTH
    with _collected(reasons):
        find_head(gm, captured.length)
    sinks_as_columns(gm)
    attention = rewrite_attention(gm, assume_spread=True)
    read_by_causal_attention(gm, symbols)
    with _collected(reasons):
        token_embedding(tokens)
    locality = analyse(gm, symbols, limit)
    sites = sites_of(attention.decisions)
    reasons += obstacles(gm, sites, locality)
    # The mask of an attention that was left is cut to the length, too; that says nothing new.
    modules = {s.module for s in sites if s.outcome is Outcome.LEFT}
    positions = tuple(p for p in _positions(gm, locality) if p.module not in modules)
    positions += tuple(
        PositionSite("ALiBi", "slopes of fxport::attention", site.module, site.location)
        for site in attention.sites
        if site.alibi
    )
    return Survey(sites, positions, tuple(reasons))


@contextmanager
def _collected(reasons: list[Reason]) -> Iterator[None]:
    try:
        yield
    except PortError as error:
        reasons.extend(error.reasons)


# --- values that depend on the position -------------------------------------------------------

_ANGLES: dict[object, str] = {
    aten.cos.default: "cos",
    aten.sin.default: "sin",
    aten.polar.default: "e^(i angle)",
}


def _positions(gm: fx.GraphModule, locality: Locality) -> tuple[PositionSite, ...]:
    varying = depends_on(gm, InputKind.DATA)
    found: list[PositionSite] = []
    for node, rows in locality.rows.items():
        found += [
            PositionSite(what, _becomes(rows), module_of(at), user_location(at))
            for what, at in _meanings(node, rows, varying)
        ]
    return tuple(dict.fromkeys(found))


def _becomes(rows: Rows) -> str:
    return "gathered by position" + (f" + {rows.offset}" if rows.offset else "")


def _meanings(node: fx.Node, rows: Rows, varying: set[fx.Node]) -> Iterator[tuple[str, fx.Node]]:
    """What a value that counts tokens is used for, each with the node that says so.

    Looks forward while nothing of the tokens has come in: learned tables looked up, angles.
    """
    if rows.table is not None:
        yield _table(rows), node
        return
    pending, seen, named = [node], {node}, False
    while pending:
        for user in pending.pop(0).users:
            if user in seen or user in varying:
                continue
            seen.add(user)
            meaning = _lookup(user) or _angle(user)
            if meaning is not None:
                yield meaning, user
                named = True
            elif user.op == "call_function":
                pending.append(user)
    if not named:
        yield "arange of the positions", node


def _lookup(node: fx.Node) -> str | None:
    if node.target is not aten.embedding.default:
        return None
    table = node.args[0]
    assert isinstance(table, fx.Node)
    return f"embedding table {_named(table)}"


def _angle(node: fx.Node) -> str | None:
    word = _ANGLES.get(node.target)
    return f"{word} of positions" if word else None


def _table(rows: Rows) -> str:
    if isinstance(rows.table, torch.Tensor):
        return f"computed table {list(rows.table.shape)}"
    assert rows.table is not None
    return f"rows of the table {_named(rows.table)}"


def _named(node: fx.Node) -> str:
    name = graph_input(node).name if "input" in node.meta else node.name
    return f"{name} {list(map(str, node.meta['val'].shape))}".replace("'", "")
