"""Models that take ``[T, B]``, called as if they took ``[B, T]``.

tokens [T, B] -> logits [T, B, V]        forward(ids.t()).transpose(0, 1)

What is captured and proven is the model together with what is put around it.
"""

from __future__ import annotations

import enum
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from fxport.capture.clone import clone_for_capture, clone_to_run
from fxport.capture.location import forward_line
from fxport.capture.outputs import plain
from fxport.capture.questions import forward_only
from fxport.capture.sample import device_of
from fxport.errors import Reason, ReasonCode

__all__ = ["Layout", "layout_of", "no_batch_axis", "time_first_as_batch_first"]

# The sizes of the tokens that are tried: different from each other and from few features.
_SEQUENCES, _LENGTH = 4, 7


class Layout(enum.StrEnum):
    """How forward wants its token ids."""

    BATCH_FIRST = "[B, T]"
    ONE_SEQUENCE = "[T]"
    TIME_FIRST = "[T, B]"


def layout_of(model: nn.Module) -> Layout:
    """What the model's answers on a few tokens look like; the model is not changed.

    A guess that saves a refusal, no proof: what is called in that layout is proven afterwards.

    Raises:
        PortError: the model cannot be copied.
    """
    clone = clone_to_run(model)
    if "forward" in vars(clone):
        return Layout.BATCH_FIRST  # somebody else has put something around it
    device = device_of(clone)
    rows = torch.zeros(_SEQUENCES, _LENGTH, dtype=torch.long, device=device)
    if not _shapes(clone, rows) and (_LENGTH,) in _shapes(clone, rows[0]):
        return Layout.ONE_SEQUENCE
    if device.type != "meta" and _mixes_rows(clone, rows):
        return Layout.TIME_FIRST
    return Layout.BATCH_FIRST


def _shapes(model: nn.Module, ids: Tensor) -> set[tuple[int, ...]]:
    """Of the outputs, without their last axis; none where forward fails."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with forward_only(model), mode:
        try:
            result = model(mode.from_tensor(ids))
        except Exception:  # an index, a shape: not tokens that the model takes
            return set()
    return {tuple(t.shape[:-1]) for t in tree_leaves(plain(result)) if isinstance(t, Tensor)}


def _mixes_rows(model: nn.Module, ids: Tensor) -> bool:
    """Whether a token changes what its column gets further on, and nothing of other columns."""
    row, column = ids.clone(), ids.clone()
    row[0], column[:, 0] = 1, 1
    try:
        before, by_row, by_column = (_run(model, t) for t in (ids, row, column))
    except Exception:  # forward does not take such tokens; the refusal says what is wrong
        return False
    if before is None or by_row is None or by_column is None:
        return False
    return not _equal(before[1:], by_row[1:]) and _equal(before[:, 1:], by_column[:, 1:])


def _run(model: nn.Module, ids: Tensor) -> Tensor | None:
    """The first output of three axes, of which two are those of the ids."""
    with forward_only(model):
        leaves = tree_leaves(plain(model(ids)))
    found = (t for t in leaves if isinstance(t, Tensor) and t.dim() == 3)
    return next((t for t in found if t.shape[:2] == ids.shape), None)


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


def no_batch_axis(model: nn.Module) -> Reason:
    """Why a model that takes one sequence is refused."""
    return Reason(
        ReasonCode.CAPTURE_FAILED,
        "forward takes one sequence of token ids, `[T]`, without a batch axis",
        forward_line(model),
        "take the token ids as [B, T]",
    )


def time_first_as_batch_first(model: nn.Module) -> nn.Module:
    """A copy that shares its tensors and takes ``[B, T]`` where the model takes ``[T, B]``.

    Raises:
        PortError: the model cannot be copied.
    """
    clone = clone_for_capture(model)
    for copied, original in zip(clone.modules(), model.modules(), strict=True):
        copied.training = original.training
    cls = type(clone)

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        return tree_map(_batch_to_front, plain(cls.forward(self, ids.t(), *args, **kwargs)))

    # A class, not an attribute of the instance: copies of the copy call themselves.
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    clone.__class__ = type(cls.__name__, (cls,), {"forward": forward, **names})
    return clone


def _batch_to_front(value: Any) -> Any:
    return value.transpose(0, 1) if isinstance(value, Tensor) and value.dim() > 1 else value
