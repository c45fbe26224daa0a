"""Models that take no ``[B, T]``, called as if they did.

tokens [T, B] -> logits [T, B, V]        forward(ids.t()).transpose(0, 1)
tokens [B, T] -> logits [T, B, V]        forward(ids).transpose(0, 1)
tokens [T]    -> logits [T, V]           forward(ids[0])[None]      vLLM has one sequence, B = 1
tokens [1, T], or a loop over the rows   forward(ids[:1])

What is captured and proven is the model together with what is put around it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fxport.capture.adapt import adapted
from fxport.capture.clone import clone_to_run
from fxport.capture.outputs import plain
from fxport.capture.questions import forward_only
from fxport.capture.sample import device_of

__all__ = ["Layout", "as_batch_first", "layout_of"]

# The sizes of the tokens that are tried: different from each other and from few features.
_SEQUENCES, _LENGTH = 4, 7


class Layout(enum.StrEnum):
    """How forward wants its token ids."""

    BATCH_FIRST = "[B, T]"
    ONE_SEQUENCE = "[T]"
    ONE_ROW = "[1, T]"
    ROW_BY_ROW = "[B, T], one row after the other"
    TIME_FIRST = "[T, B]"
    LOGITS_TIME_FIRST = "[B, T] and gives [T, B, V]"


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
    several, one = _shapes(clone, rows), _shapes(clone, rows[:1])
    if not several and (_LENGTH,) in _shapes(clone, rows[0]):
        return Layout.ONE_SEQUENCE
    if (not several and one & {(1, _LENGTH), (_LENGTH,)}) or (_LENGTH,) in one:
        return Layout.ONE_ROW
    if (_LENGTH, _SEQUENCES) in several and tuple(rows.shape) not in several:
        return Layout.LOGITS_TIME_FIRST
    if device.type == "meta":
        return Layout.BATCH_FIRST
    if not _takes(clone, rows) and _takes(clone, rows[:1]):
        return Layout.ONE_ROW  # shapes alone do not say that a cache has one row only
    if _mixes_rows(clone, rows):
        return Layout.TIME_FIRST
    return Layout.ROW_BY_ROW if _loops_over_rows(clone, rows) else Layout.BATCH_FIRST


def _shapes(model: nn.Module, ids: Tensor) -> set[tuple[int, ...]]:
    """Of the outputs, without their last axis; none where forward fails."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with forward_only(model), mode:
        try:
            result = model(mode.from_tensor(ids))
        except Exception:  # an index, a shape: not tokens that the model takes
            return set()
    return {tuple(t.shape[:-1]) for t in tree_leaves(plain(result)) if isinstance(t, Tensor)}


def _takes(model: nn.Module, ids: Tensor) -> bool:
    """Whether forward runs, with numbers."""
    try:
        with forward_only(model):
            model(ids)
    except Exception:  # an index, a shape: not tokens that the model takes
        return False
    return True


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


class _Calls(TorchFunctionMode):
    """Counts them."""

    count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _loops_over_rows(model: nn.Module, ids: Tensor) -> bool:
    """Whether more rows take more calls of torch, and each row gets what it gets alone."""
    ids = (torch.arange(ids.numel(), device=ids.device) % 2).view_as(ids)
    counts, found = [], []
    try:
        for rows in (ids[1:2], ids[:2], ids[:3]):
            with _Calls() as calls:
                found.append(_of_each_row(model, rows))
            counts.append(calls.count)
    except Exception:  # forward does not take such tokens; the refusal says what is wrong
        return False
    alone, two, three = found
    if alone is None or two is None or three is None or not counts[0] < counts[1] < counts[2]:
        return False
    return _equal(alone, two[1:2]) and _equal(two, three[:2])


def _of_each_row(model: nn.Module, ids: Tensor) -> Tensor | None:
    """The first output for every token, or for the last token of every row."""
    with forward_only(model):
        leaves = tree_leaves(plain(model(ids)))
    shapes = (ids.shape, (len(ids), 1), (len(ids),))
    found = (t for t in leaves if isinstance(t, Tensor) and t.dim() > 1)
    return next((t for t in found if t.shape[:-1] in shapes), None)


# --- called as if ------------------------------------------------------------------------------


def as_batch_first(model: nn.Module, layout: Layout) -> nn.Module:
    """A copy that shares its tensors and takes ``[B, T]`` where the model takes `layout`.

    Raises:
        PortError: the model cannot be copied.
    """
    return adapted(model, _CALLS[layout])


def _of_time_first(forward: Callable[..., Any], ids: Tensor) -> Any:
    return tree_map(_batch_to_front, plain(forward(ids.t())))


def _gives_time_first(forward: Callable[..., Any], ids: Tensor) -> Any:
    return tree_map(_batch_to_front, plain(forward(ids)))


def _batch_to_front(value: Any) -> Any:
    return value.transpose(0, 1) if isinstance(value, Tensor) and value.dim() > 1 else value


def _of_one_sequence(forward: Callable[..., Any], ids: Tensor) -> Any:
    return tree_map(_with_batch_axis, plain(forward(ids[0])))


def _with_batch_axis(value: Any) -> Any:
    return value[None] if isinstance(value, Tensor) and value.dim() > 0 else value


def _of_one_row(forward: Callable[..., Any], ids: Tensor) -> Any:
    """One row may come back without its batch axis (``squeeze(0)``)."""

    def row(value: Any) -> Any:
        squeezed = isinstance(value, Tensor) and value.dim() == 2 and len(value) == ids.shape[1]
        return value[None] if squeezed else value

    return tree_map(row, plain(forward(ids[:1])))


_CALLS: dict[Layout, Callable[[Callable[..., Any], Tensor], Any]] = {
    Layout.TIME_FIRST: _of_time_first,
    Layout.LOGITS_TIME_FIRST: _gives_time_first,
    Layout.ONE_SEQUENCE: _of_one_sequence,
    Layout.ONE_ROW: _of_one_row,
    Layout.ROW_BY_ROW: _of_one_row,
}
