"""A copy of the user's model that capture may run without leaving a trace on the original."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxport.errors import Location, PortError, Reason, ReasonCode

__all__ = ["changed_state", "clone_for_capture", "snapshot"]


def clone_for_capture(model: nn.Module) -> nn.Module:
    """Deep-copies modules and plain attributes, shares every parameter and buffer; eval mode.

    Raises:
        PortError: when an attribute cannot be copied.
    """
    shared: dict[int, Any] = {id(t): t for t in _tensors(model)}
    try:
        clone = copy.deepcopy(model, shared)
    except (TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
        reason = Reason(
            ReasonCode.CAPTURE_FAILED,
            f"the model cannot be copied for capture: {error}",
            hint="keep locks, open files, generators and tensors with a history out of attributes",
        )
        raise PortError([reason]) from error
    return clone.eval()


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and tensors that modules hold as plain attributes."""
    for module in model.modules():
        yield from (p for p in module._parameters.values() if p is not None)
        yield from (b for b in module._buffers.values() if b is not None)
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                yield value


_Plain = int | float | bool | str | None | tuple[Any, ...]


def _plain(value: Any) -> Any:
    """A comparable picture of an attribute: numbers by value, objects by identity."""
    if value is None or isinstance(value, int | float | bool | str | torch.dtype | torch.device):
        return value
    if isinstance(value, list | tuple):
        return (type(value).__name__, *(_plain(v) for v in value))
    if isinstance(value, dict):
        return ("dict", *((k, _plain(v)) for k, v in value.items()))
    return ("object", id(value))


def snapshot(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Every plain attribute of every module, to see later whether `forward` changed one."""
    internal = {"_parameters", "_buffers", "_modules"}
    taken: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in internal:
                taken[path, name] = _plain(value)
        for name, tensor in module._buffers.items():
            taken[path, name] = ("object", id(tensor))
    return taken


def changed_state(model: nn.Module, before: dict[tuple[str, str], Any]) -> list[Reason]:
    """One reason for each attribute that differs from the snapshot, with the line that set it."""
    after = snapshot(model)
    reasons = []
    for path, name in sorted(set(before) | set(after)):
        if before.get((path, name), _MISSING) == after.get((path, name), _MISSING):
            continue
        module = model.get_submodule(path)
        reasons.append(
            Reason(
                ReasonCode.MUTATED_STATE,
                f"forward changes the attribute `{name}` of "
                f"{f'`{path}`' if path else 'the model'} ({type(module).__name__}), "
                "so its result may depend on earlier calls",
                _assignment(type(module), name),
                hint="compute the value in __init__, or pass it through forward",
            )
        )
    return reasons


_MISSING = object()


def _assignment(cls: type, attribute: str) -> Location | None:
    """The line of the class that assigns `self.<attribute>` outside `__init__`."""
    try:
        lines, first = inspect.getsourcelines(cls)
        file = inspect.getsourcefile(cls)
    except (OSError, TypeError):  # no source: a class made at a prompt; the name must do
        return None
    tree = ast.parse(textwrap.dedent("".join(lines)))
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function.name == "__init__":
            continue
        for node in ast.walk(function):
            written = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if written and node.attr == attribute:  # type: ignore[attr-defined]
                line = node.lineno  # type: ignore[attr-defined]
                return Location(file or "", first + line - 1, function.name, lines[line - 1].strip())
    return None
