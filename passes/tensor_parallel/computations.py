"""What a graph computes, in a form that can be compared with another graph of the same model.

    y = mul(x, 2.0);  z = dropout(y, 0.1, True);  r = add(z, b)
    (mul, x, 2.0), (dropout, 0, 0.1, True), (add, 1, b)         with randomness
    (mul, x, 2.0), (add, 0, b)                                  without

Numbers stand for earlier results; inputs have their names, constants their values.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, fx

from fxport.capture.arguments import arguments
from fxport.capture.checkpoints import checkpoints_of
from fxport.capture.inputs import InputKind, graph_input

__all__ = ["computations", "value_of"]

aten = torch.ops.aten
_RANDOM = ("seed", "dropout_p")


def computations(graph: fx.Graph, *, random: bool = True) -> list[tuple[Hashable, ...]]:
    """The computations in order.

    Args:
        random: without, dropout is its input, and attention has none.
    """
    known: dict[fx.Node, Hashable] = {}
    symbols: dict[str, str] = {}
    found: list[tuple[Hashable, ...]] = []

    def said(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return known[value]
        if isinstance(value, list | tuple):
            return tuple(map(said, value))
        if isinstance(value, torch.SymInt):
            names = sorted(str(s) for s in value.node.expr.free_symbols)
            for name in names:
                symbols.setdefault(name, f"size {len(symbols)}")
            return (str(value.node.expr), *(symbols[name] for name in names))
        return repr(value)

    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = _input(node)
        elif node.op == "call_function":
            if not random and node.target is aten.dropout.default:
                known[node] = known[arguments(node)["input"]]
                continue
            known[node] = len(found)
            if not random and node.target is aten.randint.low:
                known[node] = "seed"
                continue
            given = _given(node, random)
            checkpointed = bool(checkpoints_of(node)) if random else False
            found.append((str(node.target), said(given), checkpointed))
        else:
            known[node] = f"{node.op} {node.target}"
            found.append((node.op, said(node.args)))
    return found


def _given(node: fx.Node, random: bool) -> list[Any]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return [*node.args, *node.kwargs.values()]
    return [v for name, v in arguments(node).items() if random or name not in _RANDOM]


def _input(node: fx.Node) -> Hashable:
    source = graph_input(node)
    if source.kind is InputKind.BUFFER and source.value is not None:
        return (source.name, value_of(source.value))
    return (source.kind.name, source.name)


def value_of(value: Tensor) -> Hashable:
    """The shape, dtype and bytes of a tensor; of one without values, the first two."""
    if value.is_meta:
        return (tuple(value.shape), value.dtype)
    held = value.detach().cpu()
    held = (torch.view_as_real(held) if held.is_complex() else held).contiguous().reshape(-1)
    return (tuple(value.shape), value.dtype, hash(held.view(torch.uint8).numpy().tobytes()))
