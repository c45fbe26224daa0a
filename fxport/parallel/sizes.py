"""A divided model takes the sizes for which its graph was shown to hold, and no others.

Before                    After
    x = wte(tokens)           known = sizes(tokens)      (raises for others)
                              x = wte(known)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from fxport.capture.export import Captured
from fxport.errors import FxportError, Reason

__all__ = ["KnownSizes", "Smallest", "limit_sizes"]

_NAME = "fxport_sizes"


@dataclass(frozen=True)
class Smallest:
    """The fewest rows and tokens, 1 or 2, for which a graph holds.

    Attributes:
        reason: why one is not enough; None where it is.
    """

    rows: int
    tokens: int
    reason: Reason | None = None


class KnownSizes(nn.Module):
    """Raises for token ids ``[B, T]`` of other sizes than those that were looked at."""

    def __init__(self, smallest: Smallest, longest: int | None, where: str) -> None:
        super().__init__()
        self.smallest, self.longest, self.where = smallest, longest, where

    def forward(self, tokens: Tensor) -> Tensor:
        """The same ids.

        Raises:
            FxportError: there are fewer or more.
        """
        rows, length = tokens.shape
        if rows < self.smallest.rows or length < self.smallest.tokens:
            raise FxportError(
                f"{rows} x {length} tokens (rows x length): this divided model takes at least "
                f"{self.smallest.rows} x {self.smallest.tokens}: {self.smallest.reason}"
            )
        if self.longest is not None and length > self.longest:
            raise FxportError(
                f"{length} tokens: this model was captured for at most {self.longest}, "
                f"what it does beyond was not looked at ({self.where})"
            )
        return tokens


def limit_sizes(module: fx.GraphModule, captured: Captured, smallest: Smallest) -> None:
    """Rewrites the module of one rank in place."""
    longest = captured.limit
    if longest is None and captured.walked is not None:  # what it asks beyond, nobody saw
        longest = captured.walked.longest
    if longest is None and smallest.reason is None:
        return
    (tokens,) = module.graph.find_nodes(op="placeholder")
    where = str(captured.length_line or "")
    module.add_submodule(_NAME, KnownSizes(smallest, longest, where))
    with module.graph.inserting_after(tokens):
        known = module.graph.call_module(_NAME, (tokens,))
    known.meta = dict(tokens.meta)
    tokens.replace_all_uses_with(known, delete_user_cb=lambda user: user is not known)
    module.graph.lint()
    module.recompile()
