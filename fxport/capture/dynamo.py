"""The training door: Dynamo's graph, lowered node by node to pre-dispatch ATen.

    linear = torch._C._nn.linear(x, w, b)          aten.linear.default(x, w, b)
    q = linear.split(16, dim=2)[0]                 aten.split.Tensor, operator.getitem
    p = torch.nn.functional.softmax(s, -1)    ->   aten.softmax.int(s, -1)
    x += 1                                         aten.add_.Tensor(x, 1)
    _set_grad_enabled(False)                       _set_grad_enabled(False)
    tag_activation_checkpoint(body, x)             tag_activation_checkpoint(body', x)

Lowering all of it in one trace would run the higher-order ops: custom backwards would be lost
and checkpoints would store what they promise to recompute. What runs under ``torch.vmap`` is
lowered at once (`vmap_regions`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from fxport.capture.aliases import plain_names
from fxport.capture.dynamo_inputs import body_input, describe_input
from fxport.capture.location import module_of, user_location
from fxport.capture.rephrase import rephrase_for_dynamo
from fxport.capture.trace_call import (
    CallTracer,
    TraceError,
    creates_unbacked,
    same_metadata,
    value_of,
)
from fxport.capture.vmap_regions import VmapRegion, vmap_regions
from fxport.errors import Reason, ReasonCode
from fxport.report import Decision, Outcome

__all__ = ["PLAIN_BODIES", "Lowered", "lower", "lowered_graphs"]

# Higher-order ops that run their bodies as ordinary code on the operands after them. The bodies
# of others (FlexAttention's score functions, scans) have rules of their own and stay as they are.
PLAIN_BODIES = frozenset(
    {
        "autograd_function_apply",
        "invoke_subgraph",
        "tag_activation_checkpoint",
        "wrap",
        "wrap_activation_checkpoint",
    }
)
_LOWERED = "fxport_lowered"

rephrase_for_dynamo()  # the backend's import is the last moment before Dynamo traces


@dataclass(frozen=True)
class Lowered:
    """A graph in the shared vocabulary.

    Attributes:
        graph: a new module; same placeholders and outputs as Dynamo's, which is unchanged.
        decisions: calls left as Dynamo recorded them because tracing them failed.
    """

    graph: fx.GraphModule
    decisions: tuple[Decision, ...]


def lower(gm: fx.GraphModule) -> Lowered:
    """Lowers a graph that Dynamo handed to a backend.

    Every node of the result has ``meta["val"]`` (but for switches of grad and autocast modes),
    every placeholder ``meta["input"]``. Calls that cannot be traced alone stay verbatim.
    """
    fake_mode = _fake_mode_of(gm)
    blocked = _changes_shapes_in_place(gm)
    if fake_mode is None or blocked is not None:
        why = [] if blocked is None else [_left(blocked, ReasonCode.MUTATED_IN_PLACE, "")]
        return Lowered(gm, tuple(why))
    decisions: list[Decision] = []
    with _Modes() as modes:
        inputs = {n: describe_input(n) for n in gm.graph.find_nodes(op="placeholder")}
        lowering = _GraphLowering(gm, CallTracer(fake_mode), modes, decisions)
        graph = lowering.run(inputs)
    for part in lowered_graphs(graph):
        plain_names(part.graph)
        part.recompile()
    return Lowered(graph, tuple(decisions))


def lowered_graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The lowered graph and the lowered bodies of its higher-order ops, inner ones first."""
    for child in gm.children():
        if isinstance(child, fx.GraphModule):
            yield from lowered_graphs(child)
    if gm.meta.get(_LOWERED):
        yield gm


class _Modes:
    """Grad and autocast mode as they are at the current node; put back at the end."""

    def __init__(self) -> None:
        self._entered: dict[fx.Node, Any] = {}

    def __enter__(self) -> _Modes:
        self._grad = torch.is_grad_enabled()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for mode in reversed(self._entered.values()):
            _exit_autocast(mode)
        torch._C._set_grad_enabled(self._grad)

    def switch(self, node: fx.Node) -> bool:
        """Follows a node that switches a mode; False for any other node."""
        if node.target is torch._C._set_grad_enabled:
            torch._C._set_grad_enabled(bool(node.args[0]))
        elif node.target is _enter_autocast:
            self._entered[node] = _enter_autocast(*node.args)
        elif node.target is _exit_autocast:
            token = node.args[0]
            assert isinstance(token, fx.Node)
            _exit_autocast(self._entered.pop(token))
        else:
            return False
        return True


class _GraphLowering:
    """Lowers one graph; the bodies of higher-order ops each get one of their own."""

    def __init__(
        self,
        gm: fx.GraphModule,
        tracer: CallTracer,
        modes: _Modes,
        decisions: list[Decision],
    ) -> None:
        self._gm = gm
        self._tracer = tracer
        self._modes = modes
        self._decisions = decisions
        self._graph = fx.Graph()
        # What each of Dynamo's nodes became: a node, a number, or a tuple of these.
        self._env: dict[fx.Node, Any] = {}
        self._attributes: dict[str, Any] = {}

    def run(self, inputs: dict[fx.Node, Any]) -> fx.GraphModule:
        regions = {region.nodes[0]: region for region in vmap_regions(self._gm.graph)}
        done: set[fx.Node] = set()
        for node in self._gm.graph.nodes:
            if node in done:
                continue
            if node in regions and self._vmapped(regions[node]):
                done.update(regions[node].nodes)
            elif node.op == "placeholder":
                new = self._verbatim(node)
                new.meta["input"] = inputs[node]
                if hasattr(node, "_dynamo_source"):
                    new._dynamo_source = node._dynamo_source
            elif node.op in ("call_function", "call_method"):
                self._call(node)
            else:
                self._verbatim(node)
        return self._module()

    def _module(self) -> fx.GraphModule:
        root = torch.nn.Module()
        for node in self._graph.nodes:
            if node.op in ("get_attr", "call_module") and node.target not in self._attributes:
                self._attributes[node.target] = _attribute(self._gm, node.target)
        for name, value in self._attributes.items():
            setattr(root, name.replace(".", "_"), value)
        for node in self._graph.nodes:
            if node.op in ("get_attr", "call_module"):
                node.target = str(node.target).replace(".", "_")
        lowered = fx.GraphModule(root, self._graph, type(self._gm).__name__)
        lowered.train(self._gm.training)
        # Dynamo hangs tables for AOTAutograd on the module.
        for name, value in vars(self._gm).items():
            lowered.__dict__.setdefault(name, value)
        lowered.meta = {**self._gm.meta, _LOWERED: True}
        return lowered

    def _call(self, node: fx.Node) -> None:
        if isinstance(node.target, HigherOrderOperator):
            self._higher_order(node)
        elif self._modes.switch(node):
            self._verbatim(node)
        elif not self._picked(node):
            number = _known_number(node.meta.get("example_value"))
            if number is not None:
                self._env[node] = number
            elif _traceable(node):
                self._trace(node)
            else:
                self._verbatim(node)

    def _picked(self, node: fx.Node) -> bool:
        """``split[1]`` of something that is already a tuple here."""
        if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
            return False
        source, index = self._env[node.args[0]], node.args[1]
        if isinstance(source, tuple | list):
            self._env[node] = source[index]  # type: ignore[index]
        elif isinstance(source.meta.get("val"), tuple | list):
            self._verbatim(node)
        else:
            return False
        return True

    def _verbatim(self, node: fx.Node) -> fx.Node:
        new = self._graph.node_copy(node, self._env.__getitem__)
        value = node.meta.get("example_value")
        if value is None and node.op == "get_attr":
            value = self._tracer.fake(_attribute(self._gm, node.target))
        if value is not None:
            new.meta["val"] = value
        self._env[node] = new
        return new

    def _trace(self, node: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._env.__getitem__)
        try:
            traced, operands = self._tracer.trace(node, args, kwargs)
            expected = node.meta.get("example_value")
            self._env[node] = self._inline(expected, _provenance(node), traced, operands)
        except TraceError as error:
            self._decisions.append(_left(node, ReasonCode.UNSUPPORTED_OP, str(error)))
            self._verbatim(node)

    def _vmapped(self, region: VmapRegion) -> bool:
        """Whether a part under ``torch.vmap`` could be traced as a whole."""
        given = [self._env[n] for n in region.inputs]
        operands = [x for x in given if isinstance(x, fx.Node)]

        def run(*values: Any) -> tuple[Any, ...]:
            taken = iter(values)
            return region([next(taken) if isinstance(x, fx.Node) else x for x in given])

        expected = tuple(n.meta.get("example_value") for n in region.results)
        try:
            traced = self._tracer.trace_below(run, operands)
            results = self._inline(expected, {}, traced, operands)
        except TraceError:
            return False  # the softmaxes in it are reported
        self._env.update(zip(region.results, results, strict=True))
        return True

    def _inline(
        self,
        expected: Any,
        provenance: dict[str, Any],
        traced: fx.GraphModule,
        operands: list[fx.Node],
    ) -> Any:
        """Copies traced calls into the graph; returns what stands for their result."""
        *body, output = traced.graph.nodes
        if not same_metadata(fx.node.map_arg(output.args[0], value_of), expected):
            raise TraceError("traced alone, it gives another shape, dtype or layout")
        env = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
        for inner in body[len(operands) :]:
            new = self._graph.node_copy(inner, env.__getitem__)
            if inner.op == "get_attr":
                new.target = self._constant(getattr(traced, str(inner.target)))
            meta = provenance or _provenance(inner)
            new.meta = {**meta, "val": inner.meta.get("val")}
            env[inner] = new
        result = fx.node.map_arg(output.args[0], env.__getitem__)
        if isinstance(result, fx.Node) and result not in operands:
            result.meta["val"] = expected
        return result

    def _constant(self, value: torch.Tensor) -> str:
        for name, known in self._attributes.items():
            if known is value:
                return name
        name = f"_lowered_constant{len(self._attributes)}"
        self._attributes[name] = value
        return name

    def _higher_order(self, node: fx.Node) -> None:
        new = self._verbatim(node)
        assert isinstance(node.target, HigherOrderOperator)
        if node.target.name() not in PLAIN_BODIES:
            return
        bodies = [a for a in node.args if isinstance(a, fx.Node) and _is_body(self._gm, a)]
        operands = [a for a in new.args[len(bodies) :] if not isinstance(a, str)]
        for position, attribute in enumerate(bodies):
            name = str(attribute.target)
            body = _attribute(self._gm, name)
            # Only the first body (of an autograd.Function, forward) is called with the operands.
            given = operands if position == 0 else []
            if name not in self._attributes:
                lowering = _GraphLowering(body, self._tracer, self._modes, self._decisions)
                self._attributes[name] = lowering.run(_body_inputs(body, given))


def _provenance(node: fx.Node) -> dict[str, Any]:
    return {k: v for k, v in node.meta.items() if k != "example_value"}


def _body_inputs(body: fx.GraphModule, operands: list[Any]) -> dict[fx.Node, Any]:
    placeholders = body.graph.find_nodes(op="placeholder")
    # Placeholders without operand (a context, incoming gradients) come first.
    padded = [None] * (len(placeholders) - len(operands)) + operands
    return {p: body_input(p, o) for p, o in zip(placeholders, padded, strict=True)}


def _is_body(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(_attribute(gm, node.target), fx.GraphModule)


def _attribute(gm: fx.GraphModule, target: Any) -> Any:
    return operator.attrgetter(str(target))(gm)


def _known_number(value: object) -> int | float | bool | None:
    """The number that Dynamo has already guarded this scalar to be."""
    if isinstance(value, int | float):
        return value
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        expression = value.node.expr
        if expression.is_number:
            return (
                int(expression)
                if isinstance(value, torch.SymInt)
                else float(expression)
                if isinstance(value, torch.SymFloat)
                else bool(expression)
            )
    return None


def _traceable(node: fx.Node) -> bool:
    if node.target is operator.setitem:
        return True
    value = node.meta.get("example_value")
    if isinstance(value, torch.SymInt):
        return node.op == "call_method"  # x.size(1); arithmetic is in the vocabulary already
    if value is None or isinstance(value, torch.SymFloat | torch.SymBool):
        return False
    named = isinstance(value, tuple) and type(value) not in (tuple, torch.Size)
    if named and not all(user.target is operator.getitem for user in node.users):
        return False
    return not creates_unbacked(node)


def _fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode | None:
    for node in gm.graph.nodes:
        mode = getattr(node.meta.get("example_value"), "fake_mode", None)
        if mode is not None:
            assert isinstance(mode, FakeTensorMode)
            return mode
    return None


def _changes_shapes_in_place(gm: fx.GraphModule) -> fx.Node | None:
    """``x.t_()``: then the shapes that Dynamo recorded before it are those after it."""
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            packet = getattr(torch.ops.aten, str(node.target), None)
            if node.op == "call_method" and isinstance(packet, torch._ops.OpOverloadPacket):
                overloads = (getattr(packet, name) for name in packet.overloads())
                if any(torch.Tag.inplace_view in o.tags for o in overloads):
                    return node
    return None


def _left(node: fx.Node, code: ReasonCode, why: str) -> Decision:
    name = getattr(node.target, "__name__", str(node.target))
    message = f"{name} stays as it is: {why}" if why else f"{name} changes a shape in place"
    location = user_location(node)
    return Decision(
        pass_name="lower",
        outcome=Outcome.LEFT,
        subject=name,
        module=module_of(node),
        location=location,
        reason=Reason(code, message, location),
    )
