"""What forward writes to and reads again: its result may depend on earlier calls.

self.cache[:, start : start + T] = k      copy_(slice(cache, ...), k): cache is an input
"""

from __future__ import annotations

from torch import fx

from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.location import user_location
from fxport.capture.sample import Sample
from fxport.errors import Reason, ReasonCode

__all__ = ["reason_of_write", "writes_to_state"]


def writes_to_state(sample: Sample) -> list[Reason]:
    """One reason for each parameter or buffer that is written to and that the output needs."""
    inputs = (n for n in sample.graph.graph.nodes if n.op == "placeholder" and n in sample.needed)
    writes = ((node, sample.memory.written_by(node)) for node in inputs)
    return [reason_of_write(node, by[0]) for node, by in writes if by]


def reason_of_write(written: fx.Node, at: fx.Node) -> Reason:
    """The operation `at` writes to the placeholder `written`."""
    hint = "compute the value in __init__, or pass it through forward"
    if graph_input(written).kind is InputKind.PARAMETER:
        hint = "change parameters outside forward; an nn.Embedding with max_norm changes its own"
    return Reason(
        ReasonCode.MUTATED_STATE,
        f"forward writes to `{graph_input(written).name}`, "
        "so its result may depend on earlier calls",
        user_location(at),
        hint,
    )
