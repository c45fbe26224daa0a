"""The user's own model, called for its logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fxport.capture.outputs import plain
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["logits_function"]


def logits_function(model: nn.Module, vocab_size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model as ids ``[1, T]`` int64 -> logits ``[T, V]``, or ``[V]`` of the last token only.

    Args:
        model: in eval mode; its forward may return more than the logits.

    Raises:
        PortError: (by the function) none or several outputs could be the logits.
    """

    @torch.no_grad()
    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        tensors = [
            t
            for t in torch.utils._pytree.tree_leaves(plain(model(ids)))
            if isinstance(t, torch.Tensor) and t.dim() in (2, 3) and t.shape[-1] == vocab_size
        ]
        if len(tensors) != 1:
            raise PortError(
                [Reason(ReasonCode.NO_LOGITS, f"{len(tensors)} outputs could be the logits")]
            )
        logits = tensors[0][0]
        last_only = logits.dim() == 2 and logits.shape[0] == 1 and ids.shape[1] > 1
        return logits[-1] if last_only else logits

    return logits_of
