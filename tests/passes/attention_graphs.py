"""Graphs of small attention functions in the form of both doors, compared with eager."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind as ExportInput
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxport.capture.dynamo import lower
from fxport.capture.inputs import GraphInput, InputKind
from fxport.passes.attention.rewrite import AttentionResult, rewrite_attention

ATTENTION = torch.ops.fxport.attention.default


@dataclass
class Rewritten:
    """A rewritten graph and what the pass said."""

    graph: fx.GraphModule
    result: AttentionResult

    @property
    def count(self) -> int:
        return sum(n.target is ATTENTION for n in self.graph.graph.nodes)

    def left(self) -> list[str]:
        return [d.reason.code.value for d in self.result.decisions if d.reason is not None]

    def calls(self) -> list[fx.Node]:
        return [n for n in self.graph.graph.nodes if n.target is ATTENTION]


class Site(nn.Module):
    """``function(*data, *parameters, *buffers)`` as a module."""

    def __init__(
        self,
        function: Callable[..., Any],
        parameters: Sequence[Tensor] = (),
        buffers: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([nn.Parameter(p.clone()) for p in parameters])
        self.count = len(buffers)
        for index, buffer in enumerate(buffers):
            self.register_buffer(f"b{index}", buffer.clone())

    def forward(self, *data: Tensor) -> Any:
        buffers = [getattr(self, f"b{i}") for i in range(self.count)]
        return self.function(*data, *self.weights, *buffers)


def trace_training(
    module: Callable[..., Any],
    data: Sequence[Tensor],
    dynamic: Mapping[int, Sequence[int]] = MappingProxyType({}),
) -> fx.GraphModule:
    """The lowered graph that Dynamo hands to the backend in training.

    `dynamic`: index of an input -> its dimensions of varying size.
    """
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(lower(gm).graph)
        return gm.forward

    torch._dynamo.reset()
    data = [x.clone() for x in data]
    for index, dims in dynamic.items():
        for dim in dims:
            torch._dynamo.maybe_mark_dynamic(data[index], dim)
    torch.compile(module, backend=keep, dynamic=None if dynamic else False, fullgraph=True)(*data)
    (graph,) = graphs
    return graph


def trace_directly(
    site: Site, data: Sequence[Tensor], dynamic: Mapping[int, Sequence[int]] = MappingProxyType({})
) -> fx.GraphModule:
    """The same vocabulary without Dynamo, in a tenth of the time; no symbol is shared by chance."""
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    held = [(InputKind.DATA, f"data_{i}", x) for i, x in enumerate(data)]
    held += [(InputKind.PARAMETER, n, x.detach()) for n, x in site.named_parameters()]
    held += [(InputKind.BUFFER, n, x) for n, x in site.named_buffers()]
    fakes = []
    for index, (_, _, value) in enumerate(held):
        dims = dynamic.get(index, ()) if index < len(data) else ()
        sizes = [DimDynamic.DYNAMIC if d in dims else DimDynamic.STATIC for d in range(value.dim())]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        fakes.append(mode.from_tensor(value, symbolic_context=context))
    with mode:
        graph = make_fx(site.function, pre_dispatch=True)(*fakes)
    placeholders = graph.graph.find_nodes(op="placeholder")
    for node, (kind, name, value) in zip(placeholders, held, strict=True):
        stored = value if kind is InputKind.BUFFER else None
        node.meta["input"] = GraphInput(kind, name, stored)
        node.target = name.replace(".", "_")
    for node in graph.graph.find_nodes(op="get_attr"):
        node.meta.setdefault("val", mode.from_tensor(getattr(graph, str(node.target))))
    graph.recompile()
    return graph


def run_like(graph: fx.GraphModule, module: nn.Module, data: Sequence[Tensor]) -> Any:
    """Runs a captured graph on the tensors of `module` and on `data`."""
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    sizes: dict[Any, int] = {}
    values: list[Any] = []
    placeholders = graph.graph.find_nodes(op="placeholder")
    tensors = [n for n in placeholders if isinstance(n.meta.get("val"), Tensor)]
    given: dict[fx.Node, Tensor] = {}
    for node in tensors:
        source = node.meta["input"]
        index = re.search(r"data_(\d+)", str(node.target))
        found = int(index[1]) if index else None
        stored = held.get(source.name, source.value)
        given[node] = data[found or 0] if stored is None else stored
        for size, real in zip(node.meta["val"].shape, given[node].shape, strict=True):
            if isinstance(size, torch.SymInt):
                sizes[size.node.expr] = real
    for node in placeholders:
        values.append(given[node] if node in given else sizes[node.meta["val"].node.expr])
    return graph(*values)


def trace_serving(module: nn.Module, data: Sequence[Tensor], dims: Sequence[Any]) -> fx.GraphModule:
    """The export of an eval module with dynamic dims, as the serving door hands it over."""
    module = module.eval()
    with torch.no_grad():
        exported = torch.export.export(
            module, tuple(data), dynamic_shapes=tuple(dims), strict=False
        )
    held = {**exported.state_dict, **exported.constants}
    specs = {s.arg.name: s for s in exported.graph_signature.input_specs}
    for node in exported.graph.find_nodes(op="placeholder"):
        spec = specs[node.name]
        kind = {
            ExportInput.PARAMETER: InputKind.PARAMETER,
            ExportInput.BUFFER: InputKind.BUFFER,
            ExportInput.CONSTANT_TENSOR: InputKind.BUFFER,
            ExportInput.USER_INPUT: InputKind.DATA,
        }[spec.kind]
        value = held.get(spec.target) if spec.target else None
        node.meta["input"] = GraphInput(kind, spec.target or node.name, value)
    return exported.graph_module


def rewrite(graph: fx.GraphModule, check_scores: bool = False) -> Rewritten:
    result = rewrite_attention(graph, check_scores=check_scores)
    graph.graph.lint()
    graph.recompile()
    return Rewritten(graph, result)


def softmax_count(graph: fx.GraphModule) -> int:
    names = ("softmax", "_softmax", "exp", "exp2", "log_softmax", "scaled_dot_product_attention")
    return sum(
        isinstance(n.target, torch._ops.OpOverload)
        and (
            n.target._schema.name.removeprefix("aten::") in names
            or n.target is torch.ops.aten.pow.Scalar  # a number to the power of scores
        )
        for n in graph.graph.nodes
    )


def compare(
    module: nn.Module,
    graph: fx.GraphModule,
    data: Sequence[Tensor],
    tolerance: float = 1e-9,
    nan_spreads: bool = False,
) -> None:
    """Outputs and the gradients of all floating inputs and parameters, against eager.

    NaN must be in the same places of the outputs. Where the original's gradient is NaN, ours must
    be; if any of it is, ours may be so in more places (with `nan_spreads`: of any gradient).
    """
    expected = _run(module, module, data)
    actual = _run(lambda *x: run_like(graph, module, x), module, data)
    assert len(expected) == len(actual)
    outputs = module(*data)
    count = len(outputs) if isinstance(outputs, tuple) else 1
    spoilt = nan_spreads and any(bool(a.isnan().any()) for a in expected[count:])
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, (index, a.shape, b.shape)
        more_nan_allowed = index >= count and (spoilt or bool(a.isnan().any()))
        same = a.isnan() & ~b.isnan() if more_nan_allowed else a.isnan() != b.isnan()
        assert not bool(same.any()), f"NaN differ in value {index}"
        a, b = (x.masked_fill(b.isnan(), 0.0) for x in (a, b))
        error = float((a - b).abs().max() / a.abs().max().clamp_min(1e-3))
        assert error <= tolerance, f"value {index}: relative error {error:.3g}"


def _run(function: Callable[..., Any], module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [
        x.detach().clone().requires_grad_(True) if x.is_floating_point() else x for x in inputs
    ]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64)
    for out in outputs:
        if out.is_floating_point() and out.requires_grad:
            weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            loss = loss + (out.double() * weight).sum()
    wanted = [x for x in leaves if x.requires_grad] + list(module.parameters())
    if not wanted or not loss.requires_grad:
        return [o.detach() for o in outputs]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]
    return [o.detach() for o in outputs] + zeros
