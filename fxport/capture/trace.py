"""One run of torch.export, and the graph that comes out of it as an own GraphModule.

exported program (guards, hooks, numbered inputs)  ->  graph whose placeholders are `GraphInput`
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch.export.graph_signature import InputKind as ExportInput
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fxport.capture.aliases import plain_names
from fxport.capture.as_eager import asked_as_eager
from fxport.capture.drawn import drawn_by_python, noting_draws
from fxport.capture.experts.runs import narrowed_as_slices
from fxport.capture.gradients import note_view_of_parameter, stop_gradients
from fxport.capture.inline import inline_regions
from fxport.capture.inputs import GraphInput, InputKind
from fxport.capture.location import forward_line, location_in, record_user_lines
from fxport.capture.memos import nothing_remembered
from fxport.capture.rephrase import rephrased
from fxport.capture.row_numbers import lists_of_rows
from fxport.capture.selections import Empties, NumbersTaken, Selections, is_marker
from fxport.capture.stored_values import StoredValues
from fxport.capture.uncopied import nothing_uncopied_used
from fxport.capture.unwritten import require_unwritten
from fxport.errors import PortError, Reason, ReasonCode

__all__ = [
    "aliases_of",
    "as_traced",
    "explain_failure",
    "export",
    "first_line",
    "graph_of",
    "in_one_line",
    "quiet",
    "token_argument",
]

_LOGGERS = (
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.utils._sympy.interp",
)
_NOTHING_EMPTY: Empties = frozenset[int]().__contains__


def export(
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    dynamic: dict[str, Any] | None,
    empty: Empties = _NOTHING_EMPTY,
) -> torch.export.ExportedProgram:
    """Exports in inference mode with the user's lines on the nodes.

    Args:
        dynamic: argument name -> dynamic dimensions, as `torch.export.export` takes them; None
            for plain sizes.
        empty: which selections of tokens are taken to be empty, see `Selections`.

    Raises:
        Exception: whatever the user's code or torch raises; see `explain_failure`.
    """
    python, numpy = drawn_by_python(), _of_numpy()
    program = _exported(model, inputs, dynamic, empty)
    if drawn_by_python() != python:
        with noting_draws() as draws:  # the same again, and this time looked at
            program = _exported(model, inputs, dynamic, empty)
        if not draws.only_to_check:
            raise _drawing(model)
    if _of_numpy() != numpy:
        raise _drawing(model)
    return program


def _exported(
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    dynamic: dict[str, Any] | None,
    empty: Empties,
) -> torch.export.ExportedProgram:
    selections = Selections(empty, StoredValues(model, plain=dynamic is None))
    with (
        _without_waste(),
        as_traced(model),
        narrowed_as_slices(),
        nothing_remembered(model),
        nothing_uncopied_used(),
        _without_partial_graph(),
        record_user_lines(),
        selections,
        lists_of_rows(selections.found),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        return torch.export.export(model, inputs, dynamic_shapes=dynamic, strict=False)


@contextmanager
def as_traced(model: nn.Module) -> Iterator[None]:
    """What forward is asked with shapes alone is asked as a trace would ask it."""
    with asked_as_eager(model), _no_fast_path(), rephrased(), quiet(), torch.no_grad():
        yield


def _drawing(model: nn.Module) -> PortError:
    """Random numbers of torch's are operations of the graph; others would be constants."""
    text = "forward draws random numbers from Python or NumPy: its result depends on the call"
    hint = "draw with torch; a decorator that checks types may draw where its result does not show"
    return PortError([Reason(ReasonCode.MUTATED_STATE, text, forward_line(model), hint)])


def _of_numpy() -> tuple[bytes, int]:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return b"", 0
    _, key, position, *_ = numpy.random.get_state()
    return key.tobytes(), position


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """The fused inference path of nn.MultiheadAttention is one opaque node."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def quiet() -> Iterator[None]:
    """Torch logs what it then raises; the reason that we give says it once."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _without_partial_graph() -> Iterator[None]:
    """A failed export prints all that it has traced so far. What else is printed is passed on."""
    written, graph = io.StringIO(), None
    try:
        with redirect_stderr(written):
            yield
    except Exception as error:
        graph = getattr(error, "partial_fx_graph", None)
        raise
    finally:
        text = written.getvalue()
        sys.stderr.write(text if graph is None else text.replace(f"{graph}\n", ""))


@contextmanager
def _without_waste() -> Iterator[None]:
    """Torch keeps a printed stack on every node, where we note one line, and writes the code of
    every graph that it makes, though nobody runs it."""
    kept = getattr(fx.config, "do_not_emit_stack_traces", None)  # older versions always do
    if kept is not None:
        fx.config.do_not_emit_stack_traces = True
    try:
        with _use_lazy_graph_module(True):
            yield
    finally:
        if kept is not None:
            fx.config.do_not_emit_stack_traces = kept


def token_argument(model: nn.Module) -> str:
    parameters = list(inspect.signature(model.forward).parameters.values())
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL
    ]
    if not parameters or len(required) > 1:
        names = ", ".join(p.name for p in required)
        reason = Reason(
            ReasonCode.CAPTURE_FAILED,
            f"forward must be callable with the token ids alone, but needs ({names})",
            hint="give the other arguments defaults",
        )
        raise PortError([reason])
    return (required or parameters)[0].name


def explain_failure(error: Exception) -> Reason:
    """A capture error in the user's terms: the innermost line of theirs, the first sentence."""
    if isinstance(error, PortError):  # by what was put around the model
        return error.reasons[0]
    frames = "".join(traceback.format_tb(error.__traceback__))
    where = location_in(frames) or location_in(str(error))
    if isinstance(error, GuardOnDataDependentSymNode):
        return Reason(
            ReasonCode.CAPTURE_FAILED,
            "forward takes another path, or another shape, for other values of a tensor",
            where,
            hint="control flow must not depend on the values of the tokens",
        )
    if isinstance(error, NumbersTaken):
        return Reason(
            ReasonCode.CAPTURE_FAILED,
            "forward takes the values of a tensor as numbers, for instance how many tokens each "
            "expert got",
            where,
            hint="keep them in tensors; experts can take their tokens by masks: "
            "rows, slot = torch.where(chosen == i)",
        )
    if isinstance(error, TorchDynamoException):
        return Reason(
            ReasonCode.CAPTURE_FAILED,
            "forward compiles a part of itself while it runs (flex_attention does, where nothing "
            "around it is compiled), which no trace of the whole can look into",
            where,
            hint="serve it with scaled_dot_product_attention and the same mask; training keeps "
            "it: torch.compile(model, backend='vllm_generic')",
        )
    hint = _TIME_FIRST if _is_in_time_first_attention(error) else ""
    return Reason(ReasonCode.CAPTURE_FAILED, in_one_line(error), where, hint)


_TIME_FIRST = "nn.MultiheadAttention takes [T, B, C] where it is not made with batch_first=True"


def _is_in_time_first_attention(error: Exception) -> bool:
    """Whether torch's attention raised it, whose layout is not that of the token ids."""
    calls = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in calls)


def in_one_line(error: Exception) -> str:
    """``RuntimeError: shape '[3, 4]' is invalid``: torch's messages go on for pages."""
    return f"{type(error).__name__}: {first_line(str(error))}"


def first_line(text: str) -> str:
    """The first that is not empty; "" without one."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def graph_of(exported: torch.export.ExportedProgram, aliases: Mapping[str, str]) -> fx.GraphModule:
    """An own GraphModule (no guards, no hooks) whose placeholders know what they are."""
    gm: fx.GraphModule = _LazyGraphModule({}, fx.Graph())  # its code is written once it runs
    for name, body in exported.graph_module._modules.items():
        gm.add_module(name, body)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(exported.graph, copied)
    graph.output(output)
    for name, value in exported.graph_module.named_buffers(recurse=False):
        gm.register_buffer(name, value, persistent=False)
    gm.graph = graph
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for old, new in copied.items():
        if old.op == "placeholder":
            new.meta["input"] = _input(specs[old.name], exported)
    inline_regions(gm)
    stop_gradients(gm)
    require_unwritten(gm.graph)
    plain_names(gm.graph)
    _merge_tied(gm.graph, aliases)
    for node in list(gm.graph.nodes):
        if _only_checks(node) and not is_marker(node):
            gm.graph.erase_node(node)
    gm.recompile()
    return gm


def _merge_tied(graph: fx.Graph, aliases: Mapping[str, str]) -> None:
    """One placeholder for each parameter, under its first name."""
    first: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="placeholder"):
        source: GraphInput = node.meta["input"]
        name = aliases.get(source.name, source.name)
        node.meta["input"] = dataclasses.replace(source, name=name)
        if source.kind is InputKind.PARAMETER and first.setdefault(name, node) is not node:
            node.replace_all_uses_with(first[name])
            graph.erase_node(node)


def _only_checks(node: fx.Node) -> bool:
    """Assertions that torch or the user put in: they return nothing and change nothing."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.returns
        and not target._schema.is_mutable
    )


def _input(spec: Any, exported: torch.export.ExportedProgram) -> GraphInput:
    target = spec.target
    if spec.kind is ExportInput.PARAMETER:
        return GraphInput(InputKind.PARAMETER, target, exported.state_dict[target])
    if spec.kind is ExportInput.BUFFER:
        held = exported.state_dict if spec.persistent else exported.constants
        return GraphInput(InputKind.BUFFER, target, held[target])
    if spec.kind is ExportInput.CONSTANT_TENSOR:
        return _constant(target, exported)
    if spec.kind is ExportInput.USER_INPUT:
        return GraphInput(InputKind.DATA, spec.arg.name)
    reason = Reason(ReasonCode.CAPTURE_FAILED, f"the model takes an input of kind {spec.kind}")
    raise PortError([reason])


def _constant(name: str, exported: torch.export.ExportedProgram) -> GraphInput:
    """A tensor that forward does not reach through its modules: in a closure, as an attribute.

    Torch takes it for a constant, without a gradient, even if it is a parameter of the model.
    """
    value = exported.constants[name]
    for own in exported.graph_signature.parameters:
        parameter = exported.state_dict[own]
        address = parameter.untyped_storage().data_ptr()
        if not address or value.untyped_storage().data_ptr() != address:
            continue
        if value.shape == parameter.shape and value.stride() == parameter.stride():
            return GraphInput(InputKind.PARAMETER, own, parameter)
        note_view_of_parameter(name, own)
    return GraphInput(InputKind.BUFFER, name, value)


def aliases_of(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in first:
            aliases[name] = first[id(p)]
        else:
            first[id(p)] = name
    return aliases
