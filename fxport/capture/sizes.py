"""A symbolic graph at plain sizes: what tracing at these sizes would give, without another trace.

    sym_size(ids, 1)   view(x, [B, T, 64])      After, B = 2, T = 37:   view(x, [2, 37, 64])

Only for sizes that the symbolic graph holds for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.sample import Sample, sample_of
from fxport.capture.trace import explain_failure
from fxport.capture.traced import Traced
from fxport.errors import PortError

__all__ = ["at_sizes"]


def at_sizes(traced: Traced, batch: int, length: int) -> Sample:
    """The graph with `batch` rows of `length` tokens.

    Raises:
        PortError: an operation does not take these sizes.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graph = fx.Graph()
    plain: dict[fx.Node, Any] = {}  # a node of `graph`, or the number that a size is
    for node in traced.graph.graph.nodes:
        if node.op != "call_function":
            plain[node] = graph.node_copy(node, plain.__getitem__)
            if node.op == "placeholder":
                plain[node].meta["val"] = _input(node, mode, batch, length)
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), plain.__getitem__)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        try:
            with mode, torch.no_grad():
                value = node.target(*values[0], **values[1])
        except Exception as error:  # whatever torch raises
            raise PortError([explain_failure(error)]) from error
        if isinstance(value, int | float):
            plain[node] = value
            continue
        plain[node] = graph.call_function(node.target, args, kwargs)
        plain[node].meta = {**node.meta, "val": value}
    gm = fx.GraphModule(traced.graph, graph)
    return sample_of(gm, batch, length, traced.output, traced.unkept)


def _input(node: fx.Node, mode: FakeTensorMode, batch: int, length: int) -> torch.Tensor:
    source = graph_input(node)
    if source.kind is InputKind.DATA:
        device = node.meta["val"].device
        return mode.from_tensor(torch.zeros(batch, length, dtype=torch.long, device=device))
    assert source.value is not None
    return mode.from_tensor(source.value, static_shapes=True)
