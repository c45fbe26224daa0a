"""A sink as a factor ``sigmoid(logsumexp(scores) - sink)`` of the result becomes a column."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_graphs import Site, run_like, trace_directly
from torch import Tensor

from fxport.passes.attention.lse import sinks_as_columns
from fxport.passes.attention.rewrite import rewrite_attention

HEADS, SIZE = 3, 8


def granite(spelling: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Granite's attention with a sink; `spelling` names what is done otherwise."""

    def attend(x: Tensor, sinks: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = x.view(b, t, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        i = torch.arange(t)
        scores = (q @ k.mT * 0.4).masked_fill(i[None, :] > i[:, None], float("-inf"))
        read = scores * 1.5 if spelling == "of other scores" else scores
        keep = spelling == "kept"
        total = torch.logsumexp(read, -1, keepdim=keep)
        sink = sinks.view(1, -1, 1, 1) if keep else sinks.view(1, -1, 1)
        if spelling == "of the tokens":
            sink = sink + x.sum(-1)[:, None]
        difference = sink - total if spelling == "the other way" else total - sink
        gate = difference.to(torch.float64).sigmoid()
        gate = gate if keep else gate.unsqueeze(-1)
        weights = scores.softmax(-1)
        out = weights @ v
        if spelling == "added":
            out = out + v
        if spelling == "times a number of the length":
            out = out * t**-0.5
        out = out * gate.to(out.dtype)
        if spelling == "returned":
            out = out + weights.amax(-1, keepdim=True)
        return out.transpose(1, 2).flatten(2)

    return attend


def traced(spelling: str):
    torch.manual_seed(0)
    site = Site(granite(spelling), [torch.linspace(-1.0, 2.0, HEADS).double()])
    return site, trace_directly(site, [torch.randn(2, 7, 3 * HEADS * SIZE).double()], {0: (0, 1)})


@pytest.mark.parametrize("spelling", ["", "kept"])
def test_the_sink_is_part_of_the_attention(spelling: str) -> None:
    site, graph = traced(spelling)
    assert sinks_as_columns(graph) == 1
    decisions = rewrite_attention(graph).decisions
    assert [d.reason for d in decisions] == [None]
    (attention,) = graph.graph.find_nodes(
        op="call_function", target=torch.ops.fxport.attention.default
    )
    assert attention is not None
    names = {str(n.target) for n in graph.graph.nodes}
    assert not names & {"aten.sigmoid.default", "aten.logsumexp.default", "aten.softmax.int"}
    for shape in ((2, 7), (3, 12)):
        x = torch.randn(*shape, 3 * HEADS * SIZE).double()
        torch.testing.assert_close(run_like(graph, site, [x]), site(x), rtol=1e-12, atol=1e-12)


OTHER = (
    "of other scores",
    "of the tokens",
    "the other way",
    "added",
    "returned",
    "times a number of the length",
)


@pytest.mark.parametrize("spelling", OTHER)
def test_what_is_no_sink_stays(spelling: str) -> None:
    site, graph = traced(spelling)
    assert sinks_as_columns(graph) == 0
    x = torch.randn(3, 9, 3 * HEADS * SIZE).double()
    torch.testing.assert_close(run_like(graph, site, [x]), site(x), rtol=1e-12, atol=1e-12)
