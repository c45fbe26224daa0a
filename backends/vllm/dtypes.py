"""Serving a float32 port in a half precision.

Parameters become bfloat16 (say), constants stay float32: rotary tables lose too much otherwise.
Where a constant would promote an activation, the result is cast back.

Before                              After
    mul(q bf16, cos f32)  -> f32        to(mul(q bf16, cos f32), bf16)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxport.errors import SavedPortError
from fxport.serving import Part, ServingGraph

__all__ = ["serve_in"]

aten = torch.ops.aten
_TOKENS = 7  # any number: dtypes do not depend on it


def serve_in(serving: ServingGraph, dtype: torch.dtype) -> ServingGraph:
    """The same graphs for parameters of another dtype.

    Raises:
        SavedPortError: the graph cannot run in this dtype.
    """
    if dtype == serving.dtype:
        return serving
    if serving.dtype != torch.float32:
        raise SavedPortError(
            f"this port was captured in {serving.dtype} and cannot be served in {dtype}; "
            "port the model in float32, or serve it with dtype='auto'"
        )
    mode = FakeTensorMode()
    with mode:
        ids = torch.zeros(1, _TOKENS, dtype=torch.int64)
        positions = torch.zeros(_TOKENS, dtype=torch.int64)
        embeddings = _cast(serving, serving.embed, dtype, {"input_ids": ids})
        hidden = _cast(
            serving,
            serving.body,
            dtype,
            {"embeddings": embeddings, "positions": positions, "input_ids": ids},
        )
        _cast(serving, serving.head, dtype, {"hidden": hidden})
    return dataclasses.replace(serving, dtype=dtype)


def _cast(
    serving: ServingGraph, part: Part, dtype: torch.dtype, inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Inserts the casts into one part; returns its (fake) output."""
    values: dict[fx.Node, Any] = {}
    varying: set[fx.Node] = set()
    for node in list(part.graph.nodes):
        if node.op == "placeholder":
            values[node], varies = _placeholder(serving, part, node, dtype, inputs)
        elif node.op == "output":
            result: torch.Tensor = values[node.args[0]]
            return result
        else:
            values[node] = _run(node, values)
            varies = any(n in varying for n in node.all_input_nodes)
            if varies and _promoted(node, values, varying, dtype):
                with part.graph.inserting_after(node):
                    cast = part.graph.call_function(aten.to.dtype, (node, dtype))
                node.replace_all_uses_with(cast, delete_user_cb=lambda user, c=cast: user is not c)
                values[cast] = values[node].to(dtype)
                varying.add(cast)
        if varies:
            varying.add(node)
    raise SavedPortError("a graph of the port has no output")


def _placeholder(
    serving: ServingGraph,
    part: Part,
    node: fx.Node,
    dtype: torch.dtype,
    inputs: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, bool]:
    if node.name in inputs:
        return inputs[node.name], node.name != "positions"
    name = part.weights[node.name]
    if name in serving.parameters:
        return torch.empty(serving.parameters[name], dtype=dtype), True
    spec = serving.constants[name]
    return torch.empty(spec.shape, dtype=spec.dtype), False


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError) as error:
        raise SavedPortError(
            f"the operation `{node.name}` ({node.target}) cannot run in this dtype: {error}"
        ) from error


def _promoted(
    node: fx.Node, values: dict[fx.Node, Any], varying: set[fx.Node], dtype: torch.dtype
) -> bool:
    """Whether a constant made this result wider than the activations that went in."""
    result = values[node]
    if not isinstance(result, torch.Tensor) or not result.is_floating_point():
        return False
    inputs = [n for n in node.all_input_nodes if isinstance(values[n], torch.Tensor)]
    activations = [
        values[n].dtype for n in inputs if n in varying and values[n].is_floating_point()
    ]
    constants = [values[n].dtype for n in inputs if n not in varying]
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return (
        pointwise
        and result.dtype != dtype
        and bool(activations)
        and all(d == dtype for d in activations)
        and result.dtype in constants
    )
