"""What each placeholder of a captured graph stands for.

Both doors (export for serving, Dynamo for training) store one `GraphInput` in
``node.meta["input"]`` of every placeholder; passes read nothing else about inputs.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import fx

__all__ = ["GraphInput", "InputKind", "add_input", "graph_input"]


class InputKind(enum.StrEnum):
    PARAMETER = "parameter"  # learned: its value must never be baked into a decision
    BUFFER = "buffer"  # a constant tensor of the module; its value may be read
    DATA = "data"  # depends on the call: token ids, masks passed in, activations
    SIZE = "size"  # a SymInt placeholder (Dynamo passes sizes as inputs)


@dataclass(frozen=True)
class GraphInput:
    """Meaning of a placeholder.

    Attributes:
        kind: see `InputKind`.
        name: qualified name in the user's model (``"blocks.0.attn.mask"``), first name of tied
            weights; for data, the argument's name.
        value: the real tensor for buffers, and for parameters where one exists; None otherwise.
    """

    kind: InputKind
    name: str
    value: torch.Tensor | None = None


def graph_input(node: fx.Node) -> GraphInput:
    """The facts of a placeholder; KeyError when the capture forgot to record them."""
    found = node.meta["input"]
    assert isinstance(found, GraphInput)
    return found


def add_input(graph: fx.Graph, name: str) -> fx.Node:
    """A new placeholder, named like no other node: FX takes the names of arguments as they are."""
    node = graph.placeholder(name)
    node.target = node.name
    return node
