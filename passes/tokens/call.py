"""One op under the token-locality analysis, and the table of rules.

A rule sees arguments by schema name and the axes of every tensor input. It returns the axes of
the output, or raises `Refusal` when the op mixes values along the token or the batch axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxport.capture.arguments import shape_of
from fxport.errors import ReasonCode
from fxport.passes.axes import Axes, Dim, Refusal, Symbols, has_axis, name

__all__ = ["RULES", "Call", "Rule", "free", "rule"]


@dataclass(frozen=True)
class Call:
    """One node under analysis.

    Attributes:
        node: the call.
        arguments: by schema name, `fx.Node`s included.
        axes: axes of each tensor-valued input node (a tuple of axes for several outputs).
        symbols: B and T.
    """

    node: fx.Node
    arguments: dict[str, Any]
    axes: dict[fx.Node, Any]
    symbols: Symbols

    def of(self, argument: str) -> Axes:
        """Axes of a tensor argument."""
        return self.axes[self.arguments[argument]]

    def all(self) -> list[Axes]:
        return [self.axes[n] for n in self.node.all_input_nodes if n in self.axes]

    def dim(self, argument: str, rank: int) -> int:
        """A dimension argument, counted from the front."""
        return int(self.arguments[argument]) % max(rank, 1)

    def sizes(self) -> tuple[Any, ...]:
        return shape_of(self.node)


Rule = Callable[[Call], Any]
RULES: dict[Any, Rule] = {}


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Registers a rule for every overload of these ops."""

    def register(function: Rule) -> Rule:
        for op in ops:
            for overload in op.overloads():
                RULES[getattr(op, overload)] = function
        return function

    return register


def free(dim: Dim, what: str) -> None:
    """Refuses an op that works along a dimension which holds tokens or the batch."""
    if has_axis(dim):
        raise Refusal(
            ReasonCode.MIXES_TOKENS,
            f"{what} runs along {name(dim)}, so tokens are mixed outside attention",
            "only attention may look at other tokens",
        )
