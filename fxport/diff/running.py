"""Runs a graph eagerly, and keeps the values and gradients at chosen nodes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from fxport.capture.arguments import arguments
from fxport.capture.inputs import GraphInput, InputKind
from fxport.capture.location import user_location
from fxport.errors import FxportError

__all__ = ["Trace", "input_values", "is_overwritten", "node_name", "run_traced"]

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


@dataclass
class Trace:
    """Tensors of one run at the wanted nodes: values, and gradients once backward has run."""

    values: dict[fx.Node, list[Any]] = field(default_factory=dict)
    gradients: dict[tuple[fx.Node, int], Tensor] = field(default_factory=dict)


class _Interpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, original: Mapping[fx.Node, fx.Node]) -> None:
        super().__init__(gm)
        self._original = original  # node of this copy -> the caller's node, where wanted
        self.trace = Trace()

    def run_node(self, n: fx.Node) -> Any:
        seeded = torch.get_rng_state() if _may_be_random(n) else None
        result = super().run_node(n)
        if seeded is not None and not torch.equal(seeded, torch.get_rng_state()):
            where = user_location(n) or "no line known"
            raise FxportError(
                f"`{n.name}` draws random numbers ({where}), so two runs cannot be compared: "
                "switch dropout off (model.eval())"
            )
        if n in self._original:
            self._note(self._original[n], result)
            if isinstance(result, Tensor) and len(n.users) == 1 and is_overwritten(n):
                # A write into a view takes the view out of the graph, and its hook with it.
                return result.clone()
        return result

    def _note(self, node: fx.Node, result: Any) -> None:
        leaves = tree_flatten(result)[0]
        # A copy, and a hook now: what is changed in place later is compared as it is here.
        self.trace.values[node] = [
            x.detach().clone() if isinstance(x, Tensor) else x for x in leaves
        ]
        for index, x in enumerate(leaves):
            if isinstance(x, Tensor) and x.requires_grad and node.op != "output":
                x.register_hook(self._keeper(node, index))

    def _keeper(self, node: fx.Node, index: int) -> Any:
        def keep(gradient: Tensor) -> None:
            known = self.trace.gradients.get((node, index))
            total = gradient.detach() if known is None else known + gradient.detach()
            self.trace.gradients[node, index] = total

        return keep


def is_overwritten(node: fx.Node) -> bool:
    """Whether an operation writes into this node's value."""
    for user in node.users:
        if isinstance(user.target, torch._ops.OpOverload):
            bound = arguments(user)
            written = (a.name for a in user.target._schema.arguments if _is_written(a))
            if any(bound.get(name) is node for name in written):
                return True
    return False


def _is_written(argument: torch.Argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _may_be_random(node: fx.Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload) or (
        torch.Tag.nondeterministic_seeded in node.target.tags
    )


def run_traced(
    gm: fx.GraphModule,
    wanted: set[fx.Node],
    values: Mapping[str, Any],
    grads: bool,
    dtype: torch.dtype | None,
) -> Trace:
    own = copy.deepcopy(gm)
    copies = dict(zip(gm.graph.nodes, own.graph.nodes, strict=True))
    if dtype is not None:
        _widen(own, dtype)
    inputs = [
        _leaf(values[node_name(n)], grads, dtype) for n in gm.graph.find_nodes(op="placeholder")
    ]
    interpreter = _Interpreter(own, {copies[n]: n for n in wanted})
    enabled = torch.is_grad_enabled()
    try:
        torch._C._set_grad_enabled(grads)  # the graph may switch it, too
        outputs = tree_flatten(interpreter.run(*inputs))[0]
    finally:
        torch._C._set_grad_enabled(enabled)
    loss = [_weighted(x, i) for i, x in enumerate(outputs) if _differentiable(x)]
    if grads and loss:
        torch.stack(loss).sum().backward()  # type: ignore[no-untyped-call]
    return interpreter.trace


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _weighted(output: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    real = torch.view_as_real(output) if output.is_complex() else output
    weight = torch.randn(real.shape, generator=generator, dtype=torch.float64)
    return (real.double() * weight.to(real.device)).sum()


def _leaf(value: Any, grads: bool, dtype: torch.dtype | None) -> Any:
    """An input of its own for each run: graphs may write to it."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if dtype is not None and value.dtype in _WIDER:
        value = value.to(_WIDER[value.dtype] if value.is_complex() else dtype)
    value = value.clone()
    if grads and (value.is_floating_point() or value.is_complex()):
        return value.requires_grad_().clone()  # no leaf: may be changed in place
    return value


def _widen(gm: fx.GraphModule, dtype: torch.dtype) -> None:
    """Parameters, buffers, and every cast of the graph and of its bodies."""

    def wide(argument: Any) -> Any:
        if argument in (torch.float16, torch.bfloat16, torch.float32):
            return dtype
        return _WIDER.get(argument, argument) if isinstance(argument, torch.dtype) else argument

    gm.to(dtype)
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.target is torch.ops.aten.view.dtype:
                    raise FxportError(
                        f"`{node.name}` reads the bits of a number: check(..., dtype=None)"
                    )
                node.args = fx.node.map_aggregate(node.args, wide)
                node.kwargs = fx.node.map_aggregate(node.kwargs, wide)
            module.recompile()


# --- inputs -----------------------------------------------------------------------------------


def node_name(node: fx.Node) -> str:
    """The qualified name of an input, the node's own name otherwise."""
    known = node.meta.get("input")
    return known.name if isinstance(known, GraphInput) else node.name


def input_values(
    graphs: Sequence[fx.GraphModule], inputs: Sequence[Any], given: Mapping[str, Tensor]
) -> dict[str, Any]:
    """A value for every placeholder of the graphs, by name."""
    values: dict[str, Any] = dict(given)
    first = graphs[0].graph.find_nodes(op="placeholder")
    data = [n for n in first if _kind(n) in (None, InputKind.DATA) and node_name(n) not in values]
    takers = first if len(inputs) == len(first) else data
    if len(inputs) != len(takers):
        raise FxportError(f"{len(inputs)} inputs were passed, but {len(takers)} are taken")
    values.update({node_name(n): value for n, value in zip(takers, inputs, strict=True)})
    sizes: dict[Any, int] = {}
    for gm in graphs:
        placeholders = gm.graph.find_nodes(op="placeholder")
        for node in placeholders:
            if _kind(node) is not InputKind.SIZE:
                _stored(node, values)
                _note_sizes(node, values[node_name(node)], sizes)
        for node in placeholders:
            if node_name(node) not in values:
                values[node_name(node)] = _size(node, sizes)
    return values


def _kind(node: fx.Node) -> InputKind | None:
    known = node.meta.get("input")
    return known.kind if isinstance(known, GraphInput) else None


def _stored(node: fx.Node, values: dict[str, Any]) -> None:
    name = node_name(node)
    if name in values:
        return
    known = node.meta.get("input")
    if not isinstance(known, GraphInput) or known.value is None or known.value.is_meta:
        raise FxportError(f"no value for the input `{name}`: pass given={{{name!r}: tensor}}")
    values[name] = known.value


def _note_sizes(node: fx.Node, value: Any, sizes: dict[Any, int]) -> None:
    expected = node.meta.get("val")
    if isinstance(value, Tensor) and isinstance(expected, Tensor):
        for size, real in zip(expected.shape, value.shape, strict=True):
            if isinstance(size, torch.SymInt):
                sizes[size.node.expr] = real


def _size(node: fx.Node, sizes: Mapping[Any, int]) -> int:
    value = node.meta.get("val")
    if isinstance(value, int):
        return value
    expression = value.node.expr if isinstance(value, torch.SymInt) else None
    if expression not in sizes:
        raise FxportError(f"no value for the size `{node_name(node)}`: it is no input's dimension")
    return sizes[expression]
