"""A part of a divided model whose results are computed again in backward, not kept."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Checkpointed"]


class Checkpointed(nn.Module):
    """Runs a graph under `torch.utils.checkpoint`, as the user's forward did.

    Nothing in a divided graph draws random numbers but the seed of the step, which is an input.

    Args:
        early_stop: backward may leave out what comes after the last result that it needs.
    """

    def __init__(self, body: fx.GraphModule, early_stop: bool) -> None:
        super().__init__()
        self.body, self.early_stop = body, early_stop

    def forward(self, *args: Any) -> Any:
        return checkpoint(
            self.body,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            early_stop=self.early_stop,
        )
