"""Models that return a loss and never logits: the logits are what the cross entropy is asked.

loss = cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))   ->   logits
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxport.capture.adapt import adapted
from fxport.capture.location import forward_line
from fxport.capture.outputs import plain
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["logits_of_the_loss", "returns_losses"]

_LOSSES = (F.cross_entropy, F.nll_loss)
# They show the values of their first argument in another shape, or fewer of them.
_VIEWS = {
    Tensor.view, Tensor.reshape, torch.reshape, Tensor.contiguous, Tensor.flatten, torch.flatten,
    Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, Tensor.__getitem__,
    Tensor.squeeze, Tensor.clone, Tensor.swapaxes,
}  # fmt: skip


class _Losses(TorchFunctionMode):
    """Notes what every cross entropy is asked, and what that is a view of."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Tensor] = []
        self._sources: dict[int, tuple[Tensor, Tensor]] = {}  # the views are kept: ids stay theirs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOSSES:
            self.asked.append(kwargs["input"] if "input" in kwargs else args[0])
        result = func(*args, **kwargs)
        shown = args[0] if func in _VIEWS and args else None
        # contiguous() gives back what is contiguous: no view of itself
        if isinstance(shown, Tensor) and isinstance(result, Tensor) and result is not shown:
            self._sources[id(result)] = (result, shown)
        return result

    def whole(self, asked: Tensor, ids: Tensor) -> Tensor | None:
        """The value for every token ``[.., V]`` that `asked` shows all or a part of.

        Logits of ``[B T, V]`` hidden states are taken to be in the order of the ids; where they
        are not, the passes find tokens in other rows than their own.
        """
        shape = (*ids.shape, asked.shape[1])
        while asked.shape not in (shape, (1, *shape)):
            if id(asked) not in self._sources:
                in_rows = asked.shape == (ids.numel(), shape[-1])
                return asked.unflatten(0, ids.shape) if in_rows else None
            asked = self._sources[id(asked)][1]
        return asked if asked.shape == shape else asked[0]


def returns_losses(model: nn.Module, ids: Tensor) -> bool:
    """Whether forward gives numbers only and asks a cross entropy for one.

    Raises:
        PortError: it is not asked for one row of logits for each token.
        Exception: forward does not take these ids.
    """
    with _Losses() as losses:
        leaves = [t for t in tree_leaves(plain(model(ids))) if isinstance(t, Tensor)]
    if not losses.asked or not leaves or any(t.dim() > 0 for t in leaves):
        return False
    if any(losses.whole(asked, ids) is None for asked in losses.asked):
        raise PortError([_not_whole(model)])
    return True


def logits_of_the_loss(model: nn.Module) -> nn.Module:
    """A copy that returns what its cross entropies are asked, ``[B, T, V]`` each."""

    def call(forward: Callable[..., Any], ids: Tensor) -> Any:
        with _Losses() as losses:
            forward(ids)
        return [losses.whole(asked, ids) for asked in losses.asked]

    return adapted(model, call)


def _not_whole(model: nn.Module) -> Reason:
    return Reason(
        ReasonCode.NO_LOGITS,
        "forward returns a loss, and the loss is not asked for one row of logits for each token",
        forward_line(model),
        "port the module inside that gives the logits, or return the logits too",
    )
