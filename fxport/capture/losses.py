"""Models that return a loss and never logits: the logits are what the cross entropy is asked.

loss = cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))   ->   logits
loss = nll_loss(logits.log_softmax(-1).transpose(1, 2), ids)                  ->   logits
loss = -logits.log_softmax(-1).gather(-1, ids[..., None]).mean()              ->   logits

Several of these, as in a model that scores experts so, are told apart by their width, like several
outputs.
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
_NORMALISING = (F.log_softmax, torch.log_softmax, Tensor.log_softmax)
_LOG_SUMS = (torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp)
# They show the values of their first argument in another shape, or fewer of them.
_VIEWS = {
    Tensor.view, Tensor.reshape, torch.reshape, Tensor.contiguous, Tensor.flatten, torch.flatten,
    Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, Tensor.__getitem__,
    Tensor.squeeze, Tensor.clone, Tensor.swapaxes,
}  # fmt: skip


class _Losses(TorchFunctionMode):
    """Notes what every loss is made of, and what that is a view of."""

    def __init__(self) -> None:
        super().__init__()
        self._entropies: list[Tensor] = []
        self._normalised: list[Tensor] = []
        self._normal: set[int] = set()  # log-probabilities
        self._looked_up: list[tuple[Tensor, int]] = []  # and the rows of the table
        self._sources: dict[int, tuple[Tensor, Tensor]] = {}  # the views are kept: ids stay theirs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given: Any = kwargs["input"] if "input" in kwargs else args[0] if args else None
        result = func(*args, **kwargs)
        shown = given if func in _VIEWS else None
        if func is F.embedding:
            table = kwargs["weight"] if "weight" in kwargs else args[1]
            self._looked_up.append((given, table.shape[0]))
        if func in _LOSSES:
            self._entropies.append(given)
        elif _over_the_last(func, args, kwargs):
            self._normalised.append(given)
            if func in _NORMALISING:
                shown = given
                self._normal.add(id(result))
        # contiguous() gives back what is contiguous: no view of itself
        if isinstance(shown, Tensor) and isinstance(result, Tensor) and result is not shown:
            self._sources[id(result)] = (result, shown)
        return result

    def found(self, ids: Tensor) -> list[Tensor | None]:
        """What every loss is made of, ``[.., V]`` for every token; None for one that is not that.

        What is normalised may be no logits (a router's scores): it is not if the token ids are
        looked up in a longer table, or in none. What a cross entropy is asked must be.
        """
        rows = [count for indices, count in self._looked_up if self._is_shown(ids, indices)]
        asked = [self._whole(t, t.shape[1], ids) for t in self._entropies]
        others = (self._whole(t, t.shape[-1], ids) for t in self._normalised)
        asked += [t for t in others if rows and t is not None and t.shape[-1] >= max(rows)]
        return list({id(t): t for t in asked}.values())

    def _is_shown(self, value: Tensor, by: Tensor) -> bool:
        while by is not value and id(by) in self._sources:
            by = self._sources[id(by)][1]
        return by is value

    def _whole(self, asked: Tensor, classes: int, ids: Tensor) -> Tensor | None:
        """The value for every token ``[.., V]`` that `asked` shows all or a part of.

        Logits of ``[B T, V]`` hidden states are taken to be in the order of the ids; where they
        are not, the passes find tokens in other rows than their own.
        """
        shape = (*ids.shape, classes)
        while id(asked) in self._sources and (
            asked.shape not in (shape, (1, *shape)) or id(asked) in self._normal
        ):
            asked = self._sources[id(asked)][1]
        if asked.shape not in (shape, (1, *shape)):
            in_rows = asked.shape == (ids.numel(), shape[-1])
            return asked.unflatten(0, ids.shape) if in_rows else None
        return asked if asked.shape == shape else asked[0]


def _over_the_last(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a call normalises over the last axis."""
    if func not in (*_NORMALISING, *_LOG_SUMS):
        return False
    value = kwargs.get("input", args[0] if args else None)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    dims = dim if isinstance(dim, list | tuple) else [dim]
    rank = value.dim() if isinstance(value, Tensor) else 0
    return rank > 1 and len(dims) == 1 and dims[0] in (-1, rank - 1)


def returns_losses(model: nn.Module, ids: Tensor) -> bool:
    """Whether forward gives numbers only, of which one is a loss of logits.

    Raises:
        PortError: it is not asked for one row of logits for each token.
        Exception: forward does not take these ids.
    """
    with _Losses() as losses:
        leaves = [t for t in tree_leaves(plain(model(ids))) if isinstance(t, Tensor)]
    found = losses.found(ids)
    if not found or not leaves or any(t.dim() > 0 for t in leaves):
        return False
    if any(logits is None for logits in found):
        raise PortError([_not_whole(model)])
    return True


def logits_of_the_loss(model: nn.Module) -> nn.Module:
    """A copy that returns what its losses are made of, ``[B, T, V]`` each."""

    def call(forward: Callable[..., Any], ids: Tensor) -> Any:
        with _Losses() as losses:
            forward(ids)
        return losses.found(ids)

    return adapted(model, call)


def _not_whole(model: nn.Module) -> Reason:
    return Reason(
        ReasonCode.NO_LOGITS,
        "forward returns a loss, and the loss is not asked for one row of logits for each token",
        forward_line(model),
        "port the module inside that gives the logits, or return the logits too",
    )
