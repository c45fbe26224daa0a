"""The training door of `fxport.explain`: one call under Dynamo, graphs run eagerly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxport.capture.location import location_at, location_of_stack
from fxport.capture.trace import first_line
from fxport.errors import Reason
from fxport.explain_records import Door, Explanation, GraphBreak, Site

__all__ = ["Observed", "explain_training", "observe"]


@dataclass(frozen=True)
class Observed:
    """What one call under Dynamo showed."""

    sites: tuple[Site, ...]
    breaks: tuple[GraphBreak, ...]
    untraced: tuple[Reason, ...]
    graphs: int


def explain_training(
    target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Explanation:
    """Calls `target` once; see `fxport.explain`."""
    observed = observe(target, args, kwargs)
    return Explanation(
        subject=_name(target),
        door=Door.TRAINING,
        sites=observed.sites,
        obstacles=observed.untraced,
        graph_breaks=observed.breaks,
        graphs=observed.graphs,
    )


def _name(target: Callable[..., Any]) -> str:
    if isinstance(target, nn.Module):
        return type(target).__name__
    return getattr(target, "__qualname__", type(target).__name__)


def observe(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Observed:
    """Compiles one call with a backend that records what the passes decide."""
    from torch._dynamo.utils import get_compilation_metrics
    from torch._dynamo.utils import graph_break_reasons as breaks_so_far

    from fxport.capture.dynamo import lower
    from fxport.passes.decisions import sites_of
    from fxport.passes.pipeline import training_pipeline

    compiled: list[tuple[Reason, ...]] = []
    sites: list[Site] = []

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        lowered = lower(gm)
        result = training_pipeline(lowered.graph)
        found = sites_of(result.decisions)
        compiled.append(tuple(d.reason for d in lowered.decisions if d.reason is not None))

        def run(*inputs: Any) -> Any:
            sites.extend(found)  # equal layers may share one graph: a site counts when it runs
            return gm.forward(*inputs)

        return run

    torch.compiler.reset()
    earlier = get_compilation_metrics()
    try:
        torch.compile(target, backend=record)(*args, **kwargs)
        split = [
            GraphBreak(first_line(b.reason), location_of_stack(b.user_stack)) for b in breaks_so_far
        ]
        # A frame given up altogether (a break inside of a loop) is recorded elsewhere.
        skipped = [_given_up(m) for m in get_compilation_metrics() if m not in earlier]
    finally:
        torch.compiler.reset()
    found = dict.fromkeys([*split, *(b for b in skipped if b is not None)])
    return Observed(
        sites=tuple(sites),
        breaks=tuple(found),
        untraced=tuple(reason for reasons in compiled for reason in reasons),
        graphs=len(compiled),
    )


def _given_up(metrics: Any) -> GraphBreak | None:
    file, line = metrics.fail_user_frame_filename, metrics.fail_user_frame_lineno
    if metrics.fail_type is None or file is None or line is None:
        return None
    return GraphBreak(
        first_line(metrics.fail_reason or metrics.fail_type),
        location_at(file, line, metrics.co_name),
    )
