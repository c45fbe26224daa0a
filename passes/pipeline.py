"""The order of the passes, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxport.capture.dynamo import lowered_graphs
from fxport.errors import ReasonCode
from fxport.passes.attention.rewrite import AttentionSite, rewrite_attention
from fxport.passes.constant_operands import make_constants_inside
from fxport.passes.empty_parts import drop_empty_parts
from fxport.passes.known_values import fold_known_values
from fxport.report import Decision

__all__ = ["PipelineResult", "training_pipeline"]


@dataclass(frozen=True)
class PipelineResult:
    """What the passes did, in the order in which they ran.

    Attributes:
        sites: every attention that was rewritten.
        decisions: one line of the report for each place that a pass looked at.
    """

    sites: tuple[AttentionSite, ...]
    decisions: tuple[Decision, ...]


def training_pipeline(gm: fx.GraphModule) -> PipelineResult:
    """Rewrites a graph from the training door, in place, bodies of higher-order ops included."""
    sites: list[AttentionSite] = []
    decisions: list[Decision] = []
    if not any(lowered_graphs(gm)):  # left as Dynamo made it: no pass knows its operations
        return PipelineResult((), ())
    make_constants_inside(gm)
    for graph in lowered_graphs(gm):
        drop_empty_parts(graph)
        fold_known_values(graph)
        attention = rewrite_attention(graph, check_scores=True)
        sites.extend(attention.sites)
        decisions = _corrected(decisions, attention.decisions)
    return PipelineResult(tuple(sites), tuple(decisions))


def _corrected(inner: list[Decision], outer: Sequence[Decision]) -> list[Decision]:
    """The graph around a body knows of a softmax in it what the body alone does not show."""
    known = {d.location for d in outer if d.reason is not None and d.location is not None}
    apart = [
        d.reason is not None and d.reason.code is ReasonCode.NOT_ATTENTION and d.location in known
        for d in inner
    ]
    return [d for d, gone in zip(inner, apart, strict=True) if not gone] + list(outer)
