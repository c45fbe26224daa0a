"""In which dtype a port is served, and which of its parameters are held in another.

    parameters           attention runs in     served in     held apart
    all float32          any                   float32       none
    wte bfloat16, rest   bfloat16              bfloat16      the rest, in float32
    wte bfloat16, rest   float32               float32       wte, in bfloat16

The dtype of serving is that of vLLM's attention and its cache; every other value has the dtype that
the graph gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import fx

from fxport.capture.arguments import arguments
from fxport.capture.location import user_location
from fxport.capture.trace import first_line
from fxport.errors import PortError, Reason, ReasonCode
from fxport.passes.tokens.rules import has_rule
from fxport.passes.tokens.weights import is_function
from fxport.serving import Part, ServingGraph

__all__ = ["coarsest", "held_apart", "refuse_missing_kernels", "serving_dtype"]


def serving_dtype(gm: fx.GraphModule, parameters: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The parameters' own, or where they have several, the widest that attention computes in."""
    found = {p.dtype for p in parameters.values() if p.is_floating_point()}
    if len(found) == 1:
        return found.pop()
    return _widest(_of_attention(gm.graph) or [*found] or [torch.float32])


def coarsest(serving: ServingGraph) -> torch.dtype:
    """In which what is rewritten rounds most: the dtype of serving, or one that attention is in.

    A loaded port's values have no dtypes: then any that its body casts to.
    """
    found = [serving.dtype, *(_of_attention(serving.body.graph) or _cast_to(serving.body.graph))]
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def held_apart(
    parameters: Mapping[str, torch.Tensor], names: Iterable[str], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Those of these parameters that are not of this dtype, with their own."""
    dtypes = {name: parameters[name].dtype for name in names}
    return {name: found for name, found in dtypes.items() if found != dtype}


def refuse_missing_kernels(serving: ServingGraph) -> None:
    """Tries what is computed of weights alone by ops without a rule, on zeros.

    A graph in half precision is captured without being run, and linear algebra has few kernels
    for it.

    Raises:
        PortError: torch has none for these dtypes.
    """
    tried: set[tuple[object, ...]] = set()
    for part in (serving.embed, serving.body, serving.head):
        for node in part.graph.nodes:
            if not is_function(node.target) or has_rule(node.target):
                continue
            zeros = {n: _zeros(serving, part, n) for n in node.all_input_nodes}
            key = (node.target, *((v.dtype, v.shape) for v in zeros.values()))
            if key not in tried:
                tried.add(key)
                _try(node, zeros)


def _try(node: fx.Node, values: Mapping[fx.Node, torch.Tensor]) -> None:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    target: Callable[..., object] = node.target  # type: ignore[assignment]
    try:
        target(*args, **kwargs)
    except torch.linalg.LinAlgError:  # it has a kernel, but not for zeros
        pass
    except RuntimeError as error:
        message = f"`{target}` cannot be run in this precision: {first_line(str(error))}"
        where = user_location(node)
        raise PortError([Reason(ReasonCode.UNSUPPORTED_OP, message, where)]) from error


def _zeros(serving: ServingGraph, part: Part, node: fx.Node) -> torch.Tensor:
    name = part.weights.get(node.name, "")
    if name in serving.parameters:
        return torch.zeros(serving.parameters[name], dtype=serving.dtype_of(name))
    value = serving.constants[name] if name in serving.constants else node.meta["val"]
    return torch.zeros(tuple(value.shape), dtype=value.dtype)


def _of_attention(graph: fx.Graph) -> list[torch.dtype]:
    calls = graph.find_nodes(op="call_function", target=torch.ops.fxport.attention.default)
    operands = (arguments(call)[name] for call in calls for name in ("q", "k", "v"))
    return [operand.meta["val"].dtype for operand in operands if "val" in operand.meta]


def _cast_to(graph: fx.Graph) -> list[torch.dtype]:
    given = (a for node in graph.nodes for a in (*node.args, *node.kwargs.values()))
    return [a for a in given if isinstance(a, torch.dtype) and a.is_floating_point]


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    first, *others = dtypes
    for other in others:
        first = torch.promote_types(first, other)
    return first
