"""The serving door: one pre-dispatch ATen graph of a plain model, valid for every length.

model(tokens[B, T])  ->  Captured(graph: parameters, buffers, tokens -> logits [B, T, V])
"""

from __future__ import annotations

import dataclasses
import inspect
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from traceback import FrameSummary
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind as ExportInput

from fxport.capture.clone import clone_for_capture, convert, watch_attributes
from fxport.capture.inputs import GraphInput, InputKind
from fxport.capture.location import is_library, location_at, location_in, record_user_lines
from fxport.errors import Location, PortError, Reason, ReasonCode

__all__ = ["Captured", "capture", "forward_line"]

# Sizes that share no factors and are unlikely to be a feature size, longest first: a model
# with a short limit is traced at a short length.
_BATCH = 2
_LENGTHS = (37, 23, 11, 5, 3)


@dataclass(frozen=True)
class Captured:
    """The captured model.

    Attributes:
        graph: placeholders carry `GraphInput`; exactly one of them is DATA, the token ids
            ``[B, T]`` int64; the only output is the logits.
        tokens: name of that placeholder.
        batch, length: the symbols of B and T in ``meta["val"]`` shapes.
        shortest: the smallest T (at least 2) for which the graph is valid; a model that takes one
            path for every length has 2 here, and length 1 is checked with numbers.
        limit: the largest T for which the graph is valid, None when nothing bounds it.
        parameters: qualified name -> real parameter (tied weights under their first name).
        length_line: the user's line that asked about the length, else where forward begins.
        state: every name of the original's state_dict.
        aliases: further names of tied parameters -> first name.
        output: which output of the model the logits are, in words.
    """

    graph: fx.GraphModule
    tokens: str
    batch: sympy.Symbol
    length: sympy.Symbol
    shortest: int
    limit: int | None
    parameters: Mapping[str, torch.Tensor]
    length_line: Location | None
    state: tuple[str, ...]
    aliases: Mapping[str, str]
    output: str


def capture(
    model: nn.Module, dtype: torch.dtype | None = None, *, convert_buffers: bool = False
) -> Captured:
    """Captures `model(tokens)` in eval mode, without gradient, for dynamic batch and length.

    The model itself is not run and not changed: a copy that shares its tensors is.

    Args:
        dtype: capture as if the parameters had this dtype; they have no values then.
        convert_buffers: with `dtype`, convert floating point buffers too.

    Raises:
        PortError: when the model cannot be captured as one graph that holds for every length.
    """
    clone = clone_for_capture(model)
    if dtype is not None:
        convert(clone, dtype, buffers=convert_buffers)
    with watch_attributes(clone) as changed:
        exported = _export(clone)
    if changed:
        raise PortError(list(changed.values()))
    aliases = _aliases(clone)
    graph = _with_inputs(exported, aliases)
    tokens = next(
        n for n in graph.graph.nodes if n.op == "placeholder" and _kind(n) is InputKind.DATA
    )
    batch, length = (s.node.expr for s in tokens.meta["val"].shape)
    shortest, limit = _range(exported, length, model)
    output = _keep_logits(graph, exported)
    return Captured(
        graph=graph,
        tokens=tokens.name,
        batch=batch,
        length=length,
        shortest=shortest,
        limit=limit,
        parameters=dict(clone.named_parameters(remove_duplicate=True)),
        length_line=_guard_line(exported, sympy.Rel) or forward_line(model),
        state=tuple(clone.state_dict()),
        aliases=aliases,
        output=output,
    )


def _kind(node: fx.Node) -> InputKind:
    return node.meta["input"].kind


def _export(clone: nn.Module) -> torch.export.ExportedProgram:
    device = next((p.device for p in clone.parameters()), torch.device("cpu"))
    name = _token_argument(clone)
    errors: list[Exception] = []
    for length in _LENGTHS:
        ids = torch.zeros(_BATCH, length, dtype=torch.long, device=device)
        dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        try:
            # The fused inference path of nn.MultiheadAttention is one opaque node.
            with _no_fast_path(), record_user_lines(), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.export.export(
                    clone, (ids,), dynamic_shapes={name: dynamic}, strict=False
                )
        except Exception as error:  # any failure of user code; all of them are reported below
            errors.append(error)
    # The shortest length failed too: the cause is not a limit. The first error is the plainest.
    raise PortError([_explain(errors[0])]) from errors[0]


class _no_fast_path:
    def __enter__(self) -> None:
        self.enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.backends.mha.set_fastpath_enabled(self.enabled)


def _token_argument(model: nn.Module) -> str:
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


def _explain(error: Exception) -> Reason:
    """A capture error in the user's terms: the innermost line of theirs, the first sentence."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    where = location_in(frames) or location_in(str(error))
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    data_dependent = "data-dependent" in str(error) or "Data-dependent" in str(error)
    return Reason(
        ReasonCode.CAPTURE_FAILED,
        f"{type(error).__name__}: {message}",
        where,
        hint="control flow must not depend on the values of the tokens" if data_dependent else "",
    )


def _with_inputs(
    exported: torch.export.ExportedProgram, aliases: Mapping[str, str]
) -> fx.GraphModule:
    """An own GraphModule (no guards, no hooks) whose placeholders know what they are."""
    gm = fx.GraphModule(dict(exported.graph_module.named_children()), fx.Graph())
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
    _merge_tied(graph, aliases)
    for node in list(graph.nodes):
        if _only_checks(node):
            graph.erase_node(node)
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
        return GraphInput(InputKind.BUFFER, target, exported.constants[target])
    if spec.kind is ExportInput.USER_INPUT:
        return GraphInput(InputKind.DATA, spec.arg.name)
    reason = Reason(ReasonCode.CAPTURE_FAILED, f"the model takes an input of kind {spec.kind}")
    raise PortError([reason])


def _range(
    exported: torch.export.ExportedProgram, length: sympy.Expr, model: nn.Module
) -> tuple[int, int | None]:
    """The lengths for which the captured graph holds."""
    if not isinstance(length, sympy.Symbol):
        reason = Reason(
            ReasonCode.LENGTH_SPECIALISED,
            f"the captured graph holds for one length only (T = {length})",
            _guard_line(exported, sympy.Eq) or forward_line(model),
            hint="sizes must come from the input's shape, not from a stored number, and the "
            "number of tokens must not enter the computation",
        )
        raise PortError([reason])
    bounds = exported.range_constraints[length]
    # Beyond 2**30 the bound is torch's own, not the model's.
    upper = int(bounds.upper) if bounds.upper < 2**30 else None
    return max(int(bounds.lower), 2), upper


def _guard_line(exported: torch.export.ExportedProgram, kind: type[sympy.Basic]) -> Location | None:
    """The user's line at which torch had to know something of this kind about a size."""
    environments = {
        id(env): env
        for node in exported.graph.nodes
        for value in [node.meta.get("val")]
        if hasattr(value, "fake_mode") and (env := value.fake_mode.shape_env) is not None
    }
    for environment in environments.values():
        for guard in environment.guards:
            frame = guard.sloc.framework_loc
            numeric = any(argument.is_Integer for argument in guard.expr.args)
            user = isinstance(frame, FrameSummary) and not is_library(frame.filename)
            if isinstance(guard.expr, kind) and numeric and user:
                return location_at(frame.filename, frame.lineno or 0, frame.name)
    return None


def forward_line(model: nn.Module) -> Location | None:
    try:
        file = inspect.getsourcefile(type(model).forward)
        lines, first = inspect.getsourcelines(type(model).forward)
    except (OSError, TypeError):  # made at a prompt: there is no file to name
        return None
    return Location(file or "", first, "forward", lines[0].strip())


def _aliases(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in first:
            aliases[name] = first[id(p)]
        else:
            first[id(p)] = name
    return aliases


def _keep_logits(gm: fx.GraphModule, exported: torch.export.ExportedProgram) -> str:
    """Leaves one output, the logits: the only floating output whose last axis is a feature."""
    output = next(n for n in gm.graph.nodes if n.op == "output")
    flat: list[Any] = list(output.args[0])
    found = [
        (index, node)
        for index, node in enumerate(flat)
        if isinstance(node, fx.Node)
        and isinstance(node.meta.get("val"), torch.Tensor)
        and node.meta["val"].is_floating_point()
        and node.meta["val"].dim() in (2, 3)
    ]
    if not found:
        raise PortError([Reason(ReasonCode.NO_LOGITS, "forward returns no tensor [B, T, V]")])
    # Several candidates (hidden states beside the logits): the widest is over the vocabulary.
    # A wrong choice cannot pass: the head must end in the token embedding's vocabulary.
    index, logits = found[0] if len(found) == 1 else _widest(found)
    output.args = (logits,)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return "the only output" if len(flat) == 1 else f"output {index} of {len(flat)}"


def _widest(found: list[tuple[int, fx.Node]]) -> tuple[int, fx.Node]:
    sizes = [(node.meta["val"].shape[-1], index, node) for index, node in found]
    fixed = [(s, i, n) for s, i, n in sizes if isinstance(s, int)]
    if not fixed or [s for s, _, _ in fixed].count(max(s for s, _, _ in fixed)) > 1:
        reason = Reason(
            ReasonCode.NO_LOGITS, f"forward returns {len(found)} tensors that could be the logits"
        )
        raise PortError([reason])
    _, index, node = max(fixed, key=lambda f: f[0])
    return index, node
