"""The serving door of `fxport.explain`: everything that `fxport.port` would do or refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import fx, nn

from fxport.capture.arguments import arguments
from fxport.capture.inputs import graph_input
from fxport.capture.location import user_location
from fxport.errors import FxportError, Location, PortError, Reason, ReasonCode
from fxport.explain_records import Door, Explanation, LinearSite

__all__ = ["explain_serving"]


def explain_serving(model: nn.Module, max_seq_len: int | None = None) -> Explanation:
    """Goes through all passes for the lines; ports the model for the verdict if nothing refuses it.

    A model that cannot be captured for every length is run once under Dynamo instead, so that
    its attention is still listed; its positions are not.

    Args:
        max_seq_len: as for `fxport.port`.

    Raises:
        FxportError: `max_seq_len` is beyond what the model allows.
    """
    from fxport.capture.export import capture
    from fxport.passes.survey import survey

    try:
        captured = capture(model)
    except PortError as error:
        return _not_captured(model, _with_lines(model, error.reasons))
    calls = _linear_calls(captured.graph)
    found = survey(captured)
    return Explanation(
        subject=type(model).__name__,
        door=Door.SERVING,
        sites=found.sites,
        linears=_linears(model, calls),
        positions=found.positions,
        obstacles=_distinct(found.reasons) or _refusal(model, max_seq_len),
    )


def _refusal(model: nn.Module, max_seq_len: int | None) -> tuple[Reason, ...]:
    """What the stages after the survey say: short lengths, vLLM's layers, the numbers."""
    from fxport.api import port

    try:
        port(model, max_seq_len=max_seq_len)
    except PortError as error:
        return error.reasons
    return ()


def _distinct(reasons: Iterable[Reason]) -> tuple[Reason, ...]:
    return tuple(dict.fromkeys(reasons))


# The fewest ranks that say anything; the kind of a shard is the same for more.
_RANKS = 2


def _linear_calls(gm: fx.GraphModule) -> dict[str, Location | None]:
    """Name of each weight that a linear multiplies with -> the user's line of its first use."""
    calls: dict[str, Location | None] = {}
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        weight = arguments(node)["weight"]
        if weight.op == "placeholder":
            calls.setdefault(graph_input(weight).name, user_location(node))
    return calls


def _linears(
    model: nn.Module, calls: Mapping[str, Location | None]
) -> tuple[LinearSite, ...] | None:
    """How the linears would be sharded; None where the planner refuses the model."""
    from fxport.parallel.api import plan

    try:
        shards = {shard.name: shard for shard in plan(model, _RANKS).parameters}
    except FxportError:  # a port's reasons are listed as obstacles
        return None
    return tuple(
        LinearSite(name, shards[name].kind, shards[name].reason, line)
        for name, line in calls.items()
    )


# --- models that cannot be captured -----------------------------------------------------------


def _with_lines(model: nn.Module, reasons: tuple[Reason, ...]) -> tuple[Reason, ...]:
    """Adds what the symbolic capture ran into where the reasons name no line of the user's."""
    from fxport.capture.clone import clone_for_capture
    from fxport.capture.symbolic import trace_symbolically

    if any(reason.location is not None for reason in reasons):
        return reasons
    try:
        trace_symbolically(clone_for_capture(model))
    except PortError as error:
        return _distinct((*error.reasons, *reasons))
    return reasons


# Lengths to run at: a model with a short limit runs at a short one.
_LENGTHS = (37, 23, 11, 5, 3)


def _not_captured(model: nn.Module, obstacles: tuple[Reason, ...]) -> Explanation:
    from fxport.capture.clone import clone_to_run
    from fxport.capture.trace import quiet
    from fxport.explain_training import observe

    name = type(model).__name__
    try:
        clone = clone_to_run(model)
    except PortError:
        return Explanation(name, Door.SERVING, obstacles=obstacles)  # it is among them
    ids, failure = _tokens_that_run(clone)
    if ids is None:
        return Explanation(name, Door.SERVING, obstacles=_distinct((*obstacles, failure)))
    with torch.no_grad(), quiet():
        observed = observe(clone, (ids,), {})
    return Explanation(
        name,
        Door.SERVING,
        sites=observed.sites,
        obstacles=_distinct((*obstacles, *observed.untraced)),
        graph_breaks=observed.breaks,
        graphs=observed.graphs,
    )


def _tokens_that_run(model: nn.Module) -> tuple[torch.Tensor | None, Reason]:
    """Token ids that the model accepts, or why the longest were not accepted."""
    from fxport.capture.trace import explain_failure

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    failures: list[Exception] = []
    for length in _LENGTHS:
        ids = torch.zeros(2, length, dtype=torch.int64, device=device)
        try:
            with torch.no_grad():
                model(ids)
        except Exception as error:  # the user's code may raise anything; it is reported
            failures.append(error)
            continue
        return ids, Reason(ReasonCode.CAPTURE_FAILED, "")
    reason = explain_failure(failures[0])
    return None, dataclasses.replace(
        reason, message=f"the model does not run on token ids alone: {reason.message}"
    )
