"""A symbolic graph at plain sizes: what tracing at these sizes would give, without another trace.

    sym_size(ids, 1)   view(x, [B, T, 64])      After, B = 2, T = 37:   view(x, [2, 37, 64])
    x[:, [-1]]:   index(slice(x), ...)                                  index(x, ...)

Only for sizes that the symbolic graph holds for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxport.capture.constants import stored
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.sample import Sample, sample_of
from fxport.capture.trace import explain_failure
from fxport.capture.traced import Traced
from fxport.errors import PortError

__all__ = ["at_sizes"]

_SLICE = torch.ops.aten.slice.Tensor


def at_sizes(traced: Traced, batch: int, length: int) -> Sample:
    """The graph with `batch` rows of `length` tokens.

    Raises:
        PortError: an operation does not take these sizes.
    """
    try:
        graph = _graph(traced.graph.graph, batch, length)
    except Exception as error:  # whatever torch raises
        raise PortError([explain_failure(error)]) from error
    gm = fx.GraphModule(traced.graph, graph)
    return sample_of(gm, batch, length, traced.output, traced.unkept)


def _graph(symbolic: fx.Graph, batch: int, length: int) -> fx.Graph:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graph = fx.Graph()
    plain: dict[fx.Node, Any] = {}  # a node of `graph`, or the number that a size is
    for node in symbolic.nodes:
        if node.op != "call_function":
            plain[node] = graph.node_copy(node, plain.__getitem__)
            if node.op != "output":
                plain[node].meta["val"] = _input(node, mode, batch, length)
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), plain.__getitem__)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with mode, torch.no_grad():
            value = node.target(*values[0], **values[1])
        if isinstance(value, int | float):
            plain[node] = value
            continue
        if node.target is _SLICE and value.shape == values[0][0].shape:
            plain[node] = args[0]  # indexing leaves out what takes all, where sizes are numbers
            continue
        plain[node] = graph.call_function(node.target, args, kwargs)
        plain[node].meta = {**node.meta, "val": value}
    return graph


def _input(node: fx.Node, mode: FakeTensorMode, batch: int, length: int) -> torch.Tensor:
    if node.op == "placeholder" and graph_input(node).kind is InputKind.DATA:
        device = node.meta["val"].device
        return mode.from_tensor(torch.zeros(batch, length, dtype=torch.long, device=device))
    return mode.from_tensor(stored(node), static_shapes=True)
