"""The first way in: torch.export with symbolic batch and length.

model(tokens[2, 37])  ->  graph over the symbols B and T, and the range of T that torch inferred
"""

from __future__ import annotations

from traceback import FrameSummary

import sympy
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxport.capture.batches import require_every_batch, user_questions
from fxport.capture.caches import read_what_was_written
from fxport.capture.clone import watch_attributes
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.location import forward_line, is_library, location_at
from fxport.capture.logits import keep_logits
from fxport.capture.paths import Path, followed_calls, refuse_another_path
from fxport.capture.questions import first_change
from fxport.capture.sample import device_of, take_sample
from fxport.capture.skips import general_path
from fxport.capture.state import State
from fxport.capture.trace import (
    aliases_of,
    explain_failure,
    export,
    graph_of,
    token_argument,
)
from fxport.capture.traced import Traced
from fxport.capture.walk import plain_path
from fxport.errors import Location, PortError, Reason, ReasonCode

__all__ = ["trace_symbolically"]

# Sizes that share no factors and are unlikely to be a feature size, longest first: a model
# with a short limit is traced at a short length.
_BATCH = 2
_LENGTHS = (37, 23, 11, 5, 3)


def trace_symbolically(model: nn.Module, *, every_pair: bool = True, needed: int = 0) -> Traced:
    """Captures a clone for all lengths at once.

    Args:
        every_pair: see `without_selections`.
        needed: a graph of shorter sequences is of no use: where forward fails at a length up to
            this one, none shorter is tried.

    Raises:
        PortError: tracing failed, the length was specialised, or forward changes the model.
    """
    state = State(model)
    with watch_attributes(model) as attributes, user_questions() as questions:
        exported, hint, traced = _export(model, needed, state)
    paths = state.changes()
    state.restore()
    if kept := attributes.kept():
        raise PortError(kept)
    if paths:
        raise PortError([_changes(model, path) for path in paths])
    refuse_another_path(traced, plain_path(model, _BATCH, hint))
    graph = graph_of(exported, aliases_of(model))
    output = keep_logits(graph)
    unkept = read_what_was_written(graph)
    asked = general_path(graph)
    if asked:
        # The other answers, at these very sizes: plain ones take half the time.
        take_sample(model, _BATCH, hint, every_pair=every_pair)
    tokens = next(
        n for n in graph.graph.find_nodes(op="placeholder") if graph_input(n).kind is InputKind.DATA
    )
    batch, length = (s.node.expr for s in tokens.meta["val"].shape)
    shortest, limit = _range(exported, batch, length, model)
    if every_pair:
        require_every_batch(model, questions, batch, hint)
    return Traced(
        graph=graph,
        tokens=tokens,
        batch=batch,
        length=length,
        shortest=shortest,
        limit=limit,
        length_line=_guard_line(exported, sympy.Rel),
        output=output,
        way="torch.export with a symbolic length",
        unkept=unkept,
        symbolic=True,
        shown=hint if asked and every_pair else 0,
    )


def _changes(model: nn.Module, path: str) -> Reason:
    return Reason(
        ReasonCode.MUTATED_STATE,
        f"forward changes `{path}`, so its result may depend on earlier calls",
        forward_line(model),
        hint="compute the value in __init__, or pass it through forward",
    )


def _export_at(model: nn.Module, length: int, paths: list[Path]) -> torch.export.ExportedProgram:
    ids = torch.zeros(_BATCH, length, dtype=torch.long, device=device_of(model))
    dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with followed_calls(model, paths):
        return export(model, (ids,), {token_argument(model): dynamic})


def _export(
    model: nn.Module, needed: int, state: State
) -> tuple[torch.export.ExportedProgram, int, list[Path]]:
    """The exported model, the length at which it was traced, and what the user's code did.

    Args:
        state: of the model before; a trace that fails leaves none of its symbols behind.
    """
    first, *shorter = _LENGTHS
    errors: list[Exception] = []
    # The shortest comes second, too: where that fails, the cause is not a limit.
    for attempt, length in enumerate((first, shorter[-1], *shorter)):
        try:
            paths: list[Path] = []
            exported = _export_at(model, length, paths)
            if attempt != 1:
                return exported, length, paths
        except Exception as error:  # any failure of user code
            errors.append(error)
            if length <= needed or attempt == 1:
                break
        state.restore()
    state.restore()
    raise PortError([explain_failure(errors[0])]) from errors[0]  # the first is the plainest


def _range(
    exported: torch.export.ExportedProgram,
    batch: sympy.Expr,
    length: sympy.Expr,
    model: nn.Module,
) -> tuple[int, int | None]:
    """The lengths for which the captured graph holds; one sequence at a time is served."""
    if not isinstance(batch, sympy.Symbol):
        reason = Reason(
            ReasonCode.DEPENDS_ON_BATCH,
            f"the captured graph holds for one number of rows only ({batch})",
            _guard_line(exported, sympy.Eq) or forward_line(model),
        )
        raise PortError([reason])
    if not isinstance(length, sympy.Symbol):
        reason = Reason(
            ReasonCode.LENGTH_SPECIALISED,
            f"the captured graph holds for one length only (T = {length})",
            _guard_line(exported, sympy.Eq) or forward_line(model),
            hint="sizes must come from the input's shape, not from a stored number, and the "
            "number of tokens must not enter the computation",
        )
        raise PortError([reason])
    bounds = exported.range_constraints[length]
    # Beyond 2**30 the bound is torch's own, not the model's.
    upper = int(bounds.upper) if bounds.upper < 2**30 else None
    lower = max(int(bounds.lower), 2)
    # Torch bounds T by comparisons with whole numbers; T % 64 == 0 and T > 0.7 * 1024 go by it.
    guards = [guard.expr for env in _environments(exported) for guard in env.guards]
    answered = [g.subs({batch: 1}) if length in g.free_symbols else g for g in guards]
    change = first_change(answered, length, lower, upper)
    return lower, upper if change is None else change


def _guard_line(exported: torch.export.ExportedProgram, kind: type[sympy.Basic]) -> Location | None:
    """The user's line at which torch had to know something of this kind about a size."""
    for environment in _environments(exported):
        for guard in environment.guards:
            frame = guard.sloc.framework_loc
            if not isinstance(frame, FrameSummary) or is_library(frame.filename):
                continue
            if isinstance(guard.expr, kind) and any(a.is_Integer for a in guard.expr.args):
                return location_at(frame.filename, frame.lineno or 0, frame.name)
    return None


def _environments(exported: torch.export.ExportedProgram) -> list[ShapeEnv]:
    """Where torch keeps what it had to know about sizes."""
    found = {
        id(env): env
        for node in exported.graph.nodes
        for value in [node.meta.get("val")]
        if hasattr(value, "fake_mode") and (env := value.fake_mode.shape_env) is not None
    }
    return list(found.values())
