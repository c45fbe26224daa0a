"""A divided model takes the lengths for which its graph was shown to hold, and no others.

Before                    After
    x = wte(tokens)           known = lengths(tokens)      (raises for others)
                              x = wte(known)
"""

from __future__ import annotations

from torch import Tensor, fx, nn

from fxport.capture.export import Captured
from fxport.errors import FxportError

__all__ = ["KnownLengths", "limit_lengths"]

_NAME = "fxport_lengths"


class KnownLengths(nn.Module):
    """Raises for token ids ``[B, T]`` that are longer than `longest`."""

    def __init__(self, longest: int, where: str) -> None:
        super().__init__()
        self.longest, self.where = longest, where

    def forward(self, tokens: Tensor) -> Tensor:
        """The same ids.

        Raises:
            FxportError: they are longer.
        """
        length = tokens.shape[1]
        if length > self.longest:
            raise FxportError(
                f"{length} tokens: this model was captured for at most {self.longest}, "
                f"what it does beyond was not looked at ({self.where})"
            )
        return tokens


def limit_lengths(module: fx.GraphModule, captured: Captured) -> None:
    """Rewrites the module of one rank in place."""
    longest = captured.limit
    if longest is None and captured.walked is not None:  # what it asks beyond, nobody saw
        longest = captured.walked.longest
    if longest is None:
        return
    (tokens,) = module.graph.find_nodes(op="placeholder")
    where = str(captured.length_line or "")
    module.add_submodule(_NAME, KnownLengths(longest, where))
    with module.graph.inserting_after(tokens):
        known = module.graph.call_module(_NAME, (tokens,))
    known.meta = dict(tokens.meta)
    tokens.replace_all_uses_with(known, delete_user_cb=lambda user: user is not known)
    module.graph.lint()
    module.recompile()
