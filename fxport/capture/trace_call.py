"""One call of a Dynamo graph as pre-dispatch ATen.

torch.nn.functional.linear(x, w)        ->  aten.linear.default(x, w)
x.split(16, dim=2)                      ->  aten.split.Tensor(x, 16, 2), three getitems
x[:, :n] = 0                            ->  aten.slice.Tensor, aten.fill_.Tensor
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    free_unbacked_symbols,
    is_symbolic,
    statically_known_true,
)
from torch.fx.node import map_aggregate
from torch.fx.traceback import preserve_node_meta

__all__ = ["CallTracer", "TraceError", "creates_unbacked", "same_metadata", "value_of"]


class TraceError(Exception):
    """The call cannot be expressed on its own; the message says why."""


def value_of(node: fx.Node) -> Any:
    """The fake value of a lowered node.

    Raises:
        TraceError: it has none (a token of autocast, a module).
    """
    if "val" not in node.meta:
        raise TraceError(f"{node.name} carries no value")
    return node.meta["val"]


class CallTracer:
    """Traces single calls, the same call only once.

    Two calls are the same when target, constants, and the metadata of all tensors are equal:
    the layers of a model differ in nothing else, so its cost does not grow with their number.
    """

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self._fake_mode = fake_mode
        self._traced: dict[Hashable, fx.GraphModule] = {}

    def fake(self, value: object) -> FakeTensor | None:
        """The fake value of a constant tensor; None for anything else."""
        if not isinstance(value, torch.Tensor):
            return None
        return self._fake_mode.from_tensor(value, static_shapes=True)

    def trace(self, call: fx.Node, args: Any, kwargs: Any) -> tuple[fx.GraphModule, list[fx.Node]]:
        """The ATen graph of `call` on `args` and `kwargs`, whose leaves are lowered nodes.

        Returns:
            the graph, and the nodes that its placeholders stand for, in order.

        Raises:
            TraceError: tracing failed, or gave something that the graph cannot hold.
        """
        operands: dict[fx.Node, int] = {}
        signature = _signature((args, kwargs), operands)
        nodes = list(operands)
        key = (call.op, call.target, signature, *map(_metadata, nodes), _ambient())
        if key not in self._traced:
            run = _callable(call, args, kwargs, operands)
            self._traced[key] = self._make_graph(run, [value_of(n) for n in nodes])
        return self._traced[key], nodes

    def trace_below(self, run: Callable[..., Any], nodes: list[fx.Node]) -> fx.GraphModule:
        """The ATen graph, below autograd, of ``run(*nodes)``; its nodes keep where they are from.

        Raises:
            TraceError: as `trace`.
        """
        with preserve_node_meta():
            return self._make_graph(run, [value_of(n) for n in nodes], pre_dispatch=False)

    def _make_graph(
        self, run: Callable[..., Any], values: list[Any], pre_dispatch: bool = True
    ) -> fx.GraphModule:
        try:
            with self._fake_mode:
                inputs = [_own_metadata(v) for v in values]
                traced = make_fx(run, pre_dispatch=pre_dispatch)(*inputs)
        # Whatever a user's op raises on fake tensors only means: leave this call as it is.
        except Exception as error:
            raise TraceError(f"{type(error).__name__}: {error}") from error
        for node in traced.graph.find_nodes(op="get_attr"):
            constant = getattr(traced, str(node.target))
            if not isinstance(constant, torch.Tensor) or isinstance(constant, FakeTensor):
                raise TraceError("it captured something that is not a constant tensor")
            node.meta.setdefault("val", self.fake(constant))
        return traced


def same_metadata(left: Any, right: Any) -> bool:
    """Whether two fake values agree in shape, strides, dtype and device, without a new guard."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return (
            left.dtype == right.dtype
            and left.device == right.device
            and left.layout == right.layout
            and left.dim() == right.dim()
            and all(map(_equal, left.shape, right.shape))
            and (left.layout != torch.strided or all(map(_equal, left.stride(), right.stride())))
        )
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(map(same_metadata, left, right))
    if isinstance(left, torch.SymInt | int) and isinstance(right, torch.SymInt | int):
        return _equal(left, right)
    return left is None and right is None


def creates_unbacked(call: fx.Node) -> bool:
    """Whether the result has sizes known only at run time (``nonzero``, ``x[mask]``)."""
    made = free_unbacked_symbols(call.meta.get("example_value"))
    given = [free_unbacked_symbols(n.meta.get("example_value")) for n in call.all_input_nodes]
    return bool(made.difference(*given))


def _equal(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    return bool(statically_known_true(left == right))


def _own_metadata(value: Any) -> Any:
    """The value, such that the traced call cannot change the shape that others see."""
    if not isinstance(value, torch.Tensor):
        return value
    if not isinstance(value, FakeTensor):
        raise TraceError(f"an operand is a {type(value).__name__}")
    return value.detach()


def _callable(
    call: fx.Node, args: Any, kwargs: Any, operands: dict[fx.Node, int]
) -> Callable[..., Any]:
    def run(*values: Any) -> Any:
        def value(leaf: Any) -> Any:
            return values[operands[leaf]] if isinstance(leaf, fx.Node) else leaf

        given, named = map_aggregate((args, kwargs), value)
        if call.op == "call_method":
            result = getattr(given[0], str(call.target))(*given[1:], **named)
        else:
            assert callable(call.target)
            result = call.target(*given, **named)
        # torch.Size and named tuples hide their members from the tracer.
        return tuple(result) if isinstance(result, tuple) else result

    return run


def _signature(args: Any, operands: dict[fx.Node, int]) -> Hashable:
    """Arguments as a hashable value; nodes become their number and are collected."""
    if isinstance(args, fx.Node):
        return ("node", operands.setdefault(args, len(operands)))
    if isinstance(args, tuple | list):
        return (type(args), *(_signature(a, operands) for a in args))
    if isinstance(args, dict):
        return ("dict", *((k, _signature(v, operands)) for k, v in args.items()))
    if isinstance(args, slice):
        return ("slice", *(_signature(a, operands) for a in (args.start, args.stop, args.step)))
    # repr keeps 0.0 and -0.0, and NaN with itself, apart from and equal to what they should be.
    return (type(args), repr(args))


def _metadata(node: fx.Node) -> Hashable:
    value = value_of(node)
    if isinstance(value, torch.Tensor):
        strides = value.stride() if value.layout == torch.strided else ()
        return (
            value.dtype,
            value.device,
            value.layout,
            tuple(map(_expression, value.shape)),
            tuple(map(_expression, strides)),
            _expression(value.storage_offset()) if value.layout == torch.strided else 0,
        )
    return (type(value), _expression(value))


def _expression(value: Any) -> Hashable:
    return value.node.expr if is_symbolic(value) else repr(value)


def _ambient() -> Hashable:
    """What else decides which ATen ops a Python function calls, and their dtypes."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices),
    )
