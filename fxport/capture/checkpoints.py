"""Notes on every traced operation which running calls of `torch.utils.checkpoint` it is part of.

    y = checkpoint(block, x)        every node of `block`: (0,), the first call of checkpoint
    z = checkpoint(outer, y)        nodes of `outer`: (1,); of a checkpoint in it: (1, 2)

torch.export runs the function and forgets that its results were not to be kept.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from types import FrameType

from torch import fx
from torch.utils.checkpoint import checkpoint, noop_context_fn

__all__ = ["CheckpointCall", "CheckpointCalls", "checkpoints_of", "under_checkpoint"]

CHECKPOINTS = "fxport_checkpoints"
_CHECKPOINT = inspect.unwrap(checkpoint).__code__


@dataclass(frozen=True)
class CheckpointCall:
    """One call.

    Attributes:
        number: of the call, in the order in which they ran.
        selective: the user's code chooses what is kept.
    """

    number: int
    selective: bool


class CheckpointCalls:
    """The calls that were seen while one trace ran."""

    def __init__(self) -> None:
        # The frames are kept: another one could be made at the place of one that is gone.
        self._seen: dict[FrameType, CheckpointCall] = {}

    def running(self) -> tuple[CheckpointCall, ...]:
        """The calls that are running now, outermost first."""
        return tuple(map(self._call, reversed(_frames())))

    def _call(self, frame: FrameType) -> CheckpointCall:
        if frame not in self._seen:
            selective = frame.f_locals.get("context_fn") is not noop_context_fn
            self._seen[frame] = CheckpointCall(len(self._seen), selective)
        return self._seen[frame]


def under_checkpoint() -> bool:
    """Whether a call of checkpoint is running."""
    return bool(_frames())


def _frames() -> list[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    found = []
    while frame is not None:
        if frame.f_code is _CHECKPOINT:
            found.append(frame)
        frame = frame.f_back
    return found


def checkpoints_of(node: fx.Node) -> tuple[CheckpointCall, ...]:
    """The calls around what a node stands for, outermost first."""
    found: tuple[CheckpointCall, ...] = node.meta.get("custom", {}).get(CHECKPOINTS, ())
    return found
