"""Graphs as JSON: data only, no code, an allow-list of operations.

A node is ``{"name", "op", "args", "kwargs"}``, with ``"module"`` where the user's is known;
arguments are JSON values, with objects of one key
for what JSON lacks: ``{"node": name}``, ``{"dtype": "float32"}``, ``{"float": "-inf"}``,
``{"dtype": "model"}`` (the parameters' dtype), ``{"device": "model"}``, ``{"layout": "strided"}``,
``{"memory_format": ...}``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxport.capture.location import module_of
from fxport.errors import SavedPortError
from fxport.serving import Part

__all__ = ["Allowed", "part_from_dict", "part_to_dict"]

Allowed = Callable[[Any], bool]

_MAX_NODES = 1_000_000
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}\Z")
_MODULE = re.compile(r"[\w.\[\]'-]{1,500}\Z")
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        torch.complex128,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
_FORMATS = {
    str(f).removeprefix("torch."): f
    for f in (torch.contiguous_format, torch.preserve_format, torch.channels_last)
}
# Arithmetic on sizes, and picking one of several outputs.
_SCALAR_OPS: dict[str, Callable[..., Any]] = {
    f"operator.{op.__name__}": op
    for op in (
        operator.getitem,
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.neg,
        operator.mod,
    )
}

_SIZE_OPS = {torch.ops.aten.sym_size.int}


# --- writing ----------------------------------------------------------------------------------


def part_to_dict(part: Part, allowed: Allowed, dtype: torch.dtype) -> dict[str, Any]:
    """A part as JSON values; `dtype` is the parameters', written as ``"model"``.

    Raises:
        SavedPortError: an op that is not allowed in a saved port.
    """
    nodes = []
    for node in part.graph.nodes:
        if node.op == "placeholder":
            nodes.append({"name": node.name, "op": "placeholder"})
        elif node.op == "output":
            nodes.append(
                {"name": node.name, "op": "output", "args": [_encode(node.args[0], dtype)]}
            )
        else:
            nodes.append(
                {
                    "name": node.name,
                    "op": _op_name(node.target, allowed),
                    "args": [_encode(a, dtype) for a in node.args],
                    "kwargs": {k: _encode(v, dtype) for k, v in node.kwargs.items()},
                    **_module_entry(node),
                }
            )
    return {"inputs": list(part.inputs), "weights": dict(part.weights), "nodes": nodes}


def _module_entry(node: fx.Node) -> dict[str, str]:
    """The user's module, for `fxport diff`; readers that do not know it pass it over."""
    module = module_of(node)
    return {"module": module} if _MODULE.match(module) else {}


def _op_name(target: Any, allowed: Allowed) -> str:
    for name, function in _SCALAR_OPS.items():
        if target is function:
            return name
    if isinstance(target, torch._ops.OpOverload) and (target in _SIZE_OPS or allowed(target)):
        return str(target)
    raise SavedPortError(f"the operation `{target}` cannot be saved: it is not on the allow-list")


def _encode(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, list | tuple):
        return [_encode(v, dtype) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": "model" if value == dtype else str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "model"}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if value is torch.strided:
        return {"layout": "strided"}
    raise SavedPortError(f"an argument of type {type(value).__name__} cannot be saved")


# --- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """What ``"model"`` stands for in a saved graph."""

    dtype: torch.dtype
    device: torch.device


def part_from_dict(data: Any, allowed: Allowed, dtype: torch.dtype, device: torch.device) -> Part:
    """Builds a part from JSON values. Nothing is executed.

    Args:
        data: what `part_to_dict` wrote; not trusted.
        allowed: whether an operation may occur.
        dtype: the parameters' dtype.
        device: where tensors that the graph makes are put.

    Raises:
        SavedPortError: anything that is not exactly as it should be.
    """
    record = _expect(data, dict, "a graph")
    nodes = _expect(record.get("nodes"), list, "a graph's nodes")
    inputs = [_name(n) for n in _expect(record.get("inputs"), list, "inputs")]
    weights = {
        _name(k): _expect(v, str, "a weight's name")
        for k, v in _expect(record.get("weights"), dict, "weights").items()
    }
    if len(nodes) > _MAX_NODES:
        raise SavedPortError(f"the graph has {len(nodes)} nodes")
    graph = fx.Graph()
    model = _Model(dtype, device)
    built: dict[str, fx.Node] = {}
    finished = False
    for entry in nodes:
        if finished:
            raise SavedPortError("the graph goes on after its output")
        finished = _add(graph, _expect(entry, dict, "a node"), built, allowed, model)
    placeholders = {n.name for n in graph.nodes if n.op == "placeholder"}
    if not finished or placeholders != {*inputs, *weights} or set(inputs) & set(weights):
        raise SavedPortError("the graph's inputs and output do not fit its record")
    return Part(graph, tuple(inputs), weights)


def _add(
    graph: fx.Graph,
    entry: dict[str, Any],
    built: dict[str, fx.Node],
    allowed: Allowed,
    model: _Model,
) -> bool:
    name, op = _name(entry.get("name")), _expect(entry.get("op"), str, "an operation")
    if name in built:
        raise SavedPortError(f"the node `{name}` occurs twice")
    args = [_decode(a, built, model) for a in _expect(entry.get("args", []), list, "arguments")]
    if op == "output":
        if len(args) != 1 or not isinstance(args[0], fx.Node):
            raise SavedPortError("the output is not one node")
        graph.output(args[0])
        return True
    if op == "placeholder":
        node = graph.placeholder(name)
    else:
        keywords = _expect(entry.get("kwargs", {}), dict, "arguments")
        kwargs = {_name(k): _decode(v, built, model) for k, v in keywords.items()}
        node = graph.create_node("call_function", _op(op, allowed), tuple(args), kwargs, name=name)
    module = entry.get("module", "")
    if isinstance(module, str) and _MODULE.match(module):
        node.meta["nn_module_stack"] = {module: (module, "")}
    if node.name != name:
        raise SavedPortError(f"`{name}` is not a possible node name")
    built[name] = node
    return False


def _op(name: str, allowed: Allowed) -> Any:
    if name in _SCALAR_OPS:
        return _SCALAR_OPS[name]
    parts = name.split(".")
    if len(parts) == 3 and parts[0] in ("aten", "fxport"):
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        if isinstance(packet, torch._ops.OpOverloadPacket) and parts[2] in packet.overloads():
            target = getattr(packet, parts[2])
            if target in _SIZE_OPS or allowed(target):
                return target
    raise SavedPortError(f"the operation `{name}` is not on the allow-list")


def _decode(value: Any, built: Mapping[str, fx.Node], model: _Model) -> Any:
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, list):
        return [_decode(v, built, model) for v in value]
    if isinstance(value, dict) and len(value) == 1:
        ((kind, content),) = value.items()
        found = _object(kind, content, built, model)
        if found is not None:
            return found
    raise SavedPortError(f"an argument cannot be read: {str(value)[:80]}")


def _object(kind: str, content: Any, built: Mapping[str, fx.Node], model: _Model) -> Any:
    if not isinstance(content, str):
        return None
    if kind == "node":
        return built.get(content)
    if kind == "dtype":
        return model.dtype if content == "model" else _DTYPES.get(content)
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "device" and content == "model":
        return model.device
    if kind == "layout" and content == "strided":
        return torch.strided
    if kind == "memory_format":
        return _FORMATS.get(content)
    return None


def _expect(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise SavedPortError(f"{what} should be {kind.__name__}, not {type(value).__name__}")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.match(value):
        raise SavedPortError(f"`{str(value)[:80]}` is not a name")
    return value
