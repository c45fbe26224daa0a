"""What the placeholders of a graph from Dynamo stand for, read off their sources."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch._dynamo.source import GlobalSource, LocalSource, NNModuleSource

from fxport.capture.inputs import GraphInput, InputKind

__all__ = ["body_input", "describe_input"]

# Dynamo reaches a module's state through these dictionaries; users never write their names.
_REGISTRIES = frozenset({"_modules", "_parameters", "_buffers"})


def describe_input(node: fx.Node) -> GraphInput:
    """The meaning of a top-level placeholder.

    A tensor reached through a module is PARAMETER or BUFFER (a plain tensor attribute counts as
    BUFFER: it is state of the module as well); everything else depends on the call.
    """
    argument = node.meta["grapharg"]
    if not argument.is_tensor:
        return GraphInput(InputKind.SIZE, node.name)
    value = argument.example
    name, in_module = _qualified_name(argument.source)
    if not in_module or not isinstance(value, torch.Tensor):
        return GraphInput(InputKind.DATA, name or node.name)
    if isinstance(value, nn.Parameter) or value.requires_grad:
        return GraphInput(InputKind.PARAMETER, name, value)
    return GraphInput(InputKind.BUFFER, name, value)


def body_input(placeholder: fx.Node, operand: object) -> GraphInput:
    """The meaning of a placeholder in the body of a higher-order op, given the outer operand."""
    if isinstance(operand, fx.Node):
        if "input" in operand.meta:
            found = operand.meta["input"]
            assert isinstance(found, GraphInput)
            return found
        if isinstance(operand.meta.get("val"), torch.SymInt):
            return GraphInput(InputKind.SIZE, placeholder.name)
    if isinstance(operand, int | torch.SymInt):
        return GraphInput(InputKind.SIZE, placeholder.name)
    return GraphInput(InputKind.DATA, placeholder.name)


def _qualified_name(source: object) -> tuple[str, bool]:
    """`L['self']._modules['h']._modules['0']._buffers['mask']` -> (``"h.0.mask"``, True)."""
    parts: list[str] = []
    in_module = False
    while source is not None:
        in_module = in_module or isinstance(source, NNModuleSource)
        member = getattr(source, "member", None)
        if member is not None and member not in _REGISTRIES:
            parts.append(str(member))
        elif hasattr(source, "index"):
            parts.append(str(source.index))
        elif isinstance(source, LocalSource) and not in_module:
            parts.append(source.local_name)
        elif isinstance(source, GlobalSource) and not in_module:
            parts.append(source.global_name)
        source = getattr(source, "base", None)
    return ".".join(reversed(parts)), in_module
