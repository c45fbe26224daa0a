"""What both ways of capture give: one symbolic graph and the lengths for which it holds."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch import fx

from fxport.capture.walk import Walked
from fxport.errors import Location

__all__ = ["Traced"]


@dataclass(frozen=True)
class Traced:
    """A symbolic graph.

    Attributes:
        graph: placeholders carry `GraphInput`; one of them is DATA, the only output is the logits.
        tokens: the DATA placeholder.
        batch, length: the symbols of B and T.
        shortest: the smallest T (at least 2) for which the graph holds.
        limit: the largest T for which the graph holds, None when nothing bounds it.
        length_line: the user's line that asked about the length, where one did.
        output: which output of the model the logits are, in words.
        way: how it was captured, in words.
        unkept: inputs that forward writes to and the logits do not depend on.
        doubtful: lengths at which forward may take another path that nobody has seen, since it
            takes the length as a plain number.
        walked: what was seen of the lengths then; None where that was not needed or not possible.
        unseen: what that leaves open, in words; "" where nothing.
        symbolic: whether a symbolic trace gave it, but perhaps for the longest sequence.
        shown: the length at which any two questions about selections got all their answers, 0
            where none did.
    """

    graph: fx.GraphModule
    tokens: fx.Node
    batch: sympy.Symbol
    length: sympy.Symbol
    shortest: int
    limit: int | None
    length_line: Location | None
    output: str
    way: str
    unkept: tuple[str, ...] = ()
    doubtful: tuple[int, ...] = ()
    walked: Walked | None = None
    unseen: str = ""
    symbolic: bool = False
    shown: int = 0
