"""What labelling finds; `factors` fills it in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from fxport.passes.tensor_parallel.classes import Classes

__all__ = ["Attention", "Labels", "Linear"]


@dataclass(frozen=True)
class Linear:
    """A projection ``[K] -> [N]`` of one position.

    Attributes:
        inputs, outputs: atoms of the K features and of the N results.
    """

    node: fx.Node
    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Attention:
    """Atoms ``[1, H, 1, D]`` of one attention."""

    node: fx.Node
    q: Tensor
    k: Tensor
    v: Tensor
    shared: bool
    """Query heads of one kv head may be on several ranks."""


@dataclass
class Labels:
    """What labelling found.

    Attributes:
        atoms: node -> atoms with batch and time of size 1; a tuple for ops with several outputs.
            Absent: the value does not depend on the tokens.
        full: atoms that every rank must have, each with the reason.
        leaves: nodes that made new atoms.
    """

    classes: Classes = field(default_factory=Classes)
    atoms: dict[fx.Node, Any] = field(default_factory=dict)
    full: list[tuple[Tensor, fx.Node, str]] = field(default_factory=list)
    leaves: dict[fx.Node, Tensor] = field(default_factory=dict)
    linears: list[Linear] = field(default_factory=list)
    shared: list[list[Linear]] = field(default_factory=list)
    """Products with a weight for each expert, or for each head."""
    attentions: list[Attention] = field(default_factory=list)
    reductions: list[tuple[fx.Node, Tensor, Tensor]] = field(default_factory=list)
    """(node, atoms reduced ``[groups, n]``, atoms of the results ``[groups]``)."""
    gates: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(atoms that each gate is multiplied with ``[gates, n]``, atoms of the gates ``[gates]``)."""
    equal_heads: bool = False
    spread: set[fx.Node] = field(default_factory=set)
    """Copies of one vector for all heads, with labels of their own."""
