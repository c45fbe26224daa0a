"""One name for each operation: ATen has several for some, and rules know one.

Before                          After
    subtract(k, q)                  sub(k, q)
    swapaxes(x, 1, 2)               transpose(x, 1, 2)
    pad(x, [0, 0])                  clone(x)

Only where an overload of that name takes the same arguments, whatever they are called.
"""

from __future__ import annotations

import torch
from torch import fx

from fxport.capture.arguments import arguments

__all__ = ["plain_names"]

# torch's documentation calls each of them "Alias for ...".
_NAMES = {
    "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    "absolute": "abs", "negative": "neg", "fix": "trunc", "clip": "clamp",
    "concat": "cat", "concatenate": "cat", "swapaxes": "transpose", "swapdims": "transpose",
    "moveaxis": "movedim", "special_expit": "sigmoid", "special_softmax": "softmax",
    "special_exp2": "exp2", "special_erf": "erf",
    "special_logsumexp": "logsumexp", "special_log1p": "log1p", "special_expm1": "expm1",
    "arccos": "acos", "arcsin": "asin", "arctan": "atan", "arctan2": "atan2", "arccosh": "acosh",
    "arcsinh": "asinh", "arctanh": "atanh",
}  # fmt: skip
# Python's operators: their underscores do not say that they change something.
_OPERATORS = {
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor",
    "__iand__": "bitwise_and_", "__ior__": "bitwise_or_", "__ixor__": "bitwise_xor_",
}  # fmt: skip
aten = torch.ops.aten


def plain_names(graph: fx.Graph) -> None:
    """Rewrites the graph in place; in-place operations too."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            plain = _plain(node.target)
            if plain is not node.target:
                _rename(node, plain)
            if plain is aten.pad.default and not any(arguments(node)["pad"]):
                node.args, node.kwargs = (arguments(node)["self"],), {}
                node.target = aten.clone.default


def _rename(node: fx.Node, plain: torch._ops.OpOverload) -> None:
    assert isinstance(node.target, torch._ops.OpOverload)
    old, new = ([a.name for a in op._schema.arguments] for op in (node.target, plain))
    node.kwargs = {new[old.index(name)]: value for name, value in node.kwargs.items()}
    node.target = plain


def _plain(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    namespace, name = target._schema.name.split("::")
    plain = _OPERATORS.get(name) or _plain_name(name)
    packet = getattr(aten, plain, None) if plain and namespace == "aten" else None
    overload = next((o for o in _overloads(packet) if _takes_the_same(o, target)), None)
    return overload or target


def _plain_name(name: str) -> str | None:
    in_place = "_" if name.endswith("_") else ""
    plain = _NAMES.get(name.removesuffix("_"))
    return f"{plain}{in_place}" if plain else None


def _overloads(packet: torch._ops.OpOverloadPacket | None) -> list[torch._ops.OpOverload]:
    return [] if packet is None else [getattr(packet, name) for name in packet.overloads()]


def _takes_the_same(one: torch._ops.OpOverload, other: torch._ops.OpOverload) -> bool:
    def declared(op: torch._ops.OpOverload) -> list[tuple[str, object, bool]]:
        return [(str(a.type), a.default_value, a.kwarg_only) for a in op._schema.arguments]

    return declared(one) == declared(other)
