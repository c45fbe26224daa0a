"""Sorted tensors cut into the runs of the experts.

    forward                                       instead
    order[start_e:end_e]                          where(chosen == e)
    (order // K)[start_e:end_e]                   where(chosen.view(-1, K) == e)[0]
    y[start_e:end_e], y.split(counts)[e]          y'[where(chosen == e)]; y'.view(-1, K, ..)[token,
    y.narrow(0, start_e, n_e)                     slot] of both where the run's tokens were taken
    y[:sum(counts)]                               y
    y[start:start]                                y[:0]

Where a run begins and ends is known as sums of `RunLength`; a cut at anything else is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fxport.capture.experts.order import ExpertOrder, Kind, Label, Labels
from fxport.capture.experts.rows import keep_rows, take
from fxport.capture.run_lengths import RunLength, alike, run_between, same
from fxport.capture.unwritten import mark_unwritten

__all__ = ["SPLITS", "by_lengths", "index", "narrowed_as_slices", "split"]

SPLITS = (torch.split, Tensor.split, torch.functional.split)


def index(labels: Labels, tensor: Tensor, at: Any) -> Any:
    """``tensor[at]`` where one of the two is labelled."""
    label, by = labels.of(tensor), labels.of(at)
    if label is None:
        known = by is not None and at.dim() == 1
        return take(labels, tensor, by, lambda: tensor[at]) if known and by else NotImplemented
    if isinstance(at, slice):
        return NotImplemented if at.step is not None else _cut(labels, label, at.start, at.stop)
    if isinstance(at, tuple) and len(at) == 2 and at[1] is None and _is_everything(at[0]):
        return keep_rows(labels, Tensor.unsqueeze, label, (tensor, -1), {})
    inverse = by is not None and by.kind is Kind.INVERSE and by.order is label.order
    if inverse and at.dim() == 1 and label.raw is not None:
        return label.raw.clone()
    return NotImplemented


@contextmanager
def narrowed_as_slices() -> Iterator[None]:
    """``narrow(y, 0, start, n_e)`` is ``y[start : start + n_e]`` for the time of a trace.

    Torch's own parser refuses a length that is no number before any mode sees the call.
    """
    function, method = torch.narrow, Tensor.narrow

    def cut(input: Tensor, dim: int, start: Any, length: Any) -> Tensor:
        if dim == 0 and any(isinstance(n, RunLength) for n in (start, length)):
            return input[start : start + length]
        return method(input, dim, start, length)

    torch.narrow, Tensor.narrow = cut, cut  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.narrow, Tensor.narrow = function, method  # type: ignore[method-assign]


def by_lengths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is given a list with the number of slots of an expert."""
    given = (a for a in (*args, *kwargs.values()) if isinstance(a, list | tuple))
    return any(isinstance(n, RunLength) for sizes in given for n in sizes)


def _is_everything(at: Any) -> bool:
    return isinstance(at, slice) and at.start is None and at.stop is None and at.step is None


def split(labels: Labels, label: Label, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``y.split(counts)``: all runs, one after the other."""
    given = dict(zip(("tensor", "sizes", "dim"), args, strict=False)) | kwargs
    for name in ("split_size_or_sections", "split_size"):
        if name in given:
            given["sizes"] = given.pop(name)
    sizes = given.get("sizes")
    known = given.keys() <= {"tensor", "sizes", "dim"} and given.get("dim", 0) == 0
    if not known or not isinstance(sizes, list | tuple):
        return NotImplemented
    if not all(isinstance(n, RunLength) or (type(n) is int and n == 0) for n in sizes):
        return NotImplemented
    ends: list[Any] = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    if not _is_all(ends[-1], label.order):
        return NotImplemented
    parts = [_cut(labels, label, a, b) for a, b in itertools.pairwise(ends)]
    return NotImplemented if any(p is NotImplemented for p in parts) else tuple(parts)


def _is_all(total: Any, order: ExpertOrder) -> bool:
    return total == order.slots if isinstance(total, RunLength) else same(total, order.slots)


def _cut(labels: Labels, label: Label, start: Any, stop: Any) -> Any:
    """``tensor[start:stop]``."""
    tensor, order = label.tensor, label.order
    start = 0 if start is None else start
    if alike(start, stop):
        return tensor[:0]
    if same(start, 0) and _is_end(stop, labels, order):
        return tensor
    if not any(isinstance(at, RunLength) for at in (start, stop)):
        return NotImplemented
    expert = run_between(start, stop, labels.lengths(order))
    if expert is None:
        return NotImplemented
    if label.kind in (Kind.RUN, Kind.RUN_TOKEN, Kind.ONLY):  # a run's own run is all of it
        return tensor if expert == label.expert and same(start, 0) else NotImplemented
    if label.kind is Kind.ORDER:
        return labels.numbers(order.rows[expert], Kind.RUN, order, expert=expert)
    if label.kind is Kind.TOKEN:
        token = _cells(labels, order, expert, label.each)[0]
        return labels.numbers(token, Kind.RUN_TOKEN, order, each=label.each, expert=expert)
    return NotImplemented if label.raw is None else _run(labels, order, label.raw, expert)


def _is_end(stop: Any, labels: Labels, order: ExpertOrder) -> bool:
    """Whether all slots come before; of an only expert that is the end of its run as well."""
    if isinstance(stop, RunLength):
        return stop.whole and alike(stop, sum(labels.lengths(order)))
    return stop is None or same(stop, order.slots)


def _run(labels: Labels, order: ExpertOrder, raw: Tensor, expert: int) -> Tensor:
    """What forward holds shares the memory of all rows; this is a copy: nobody may write to it."""
    cells = [(each, found) for (e, each), found in order.cells.items() if e == expert]
    if cells:
        each, (token, slot) = cells[0]
        run = raw.view(-1, each, *raw.shape[1:])[token, slot]
    else:
        run = raw[order.rows[expert]]
    if len(order.rows) == 1:
        return labels.numbers(run, Kind.ONLY, order, expert=expert)
    mark_unwritten(run)
    return run


def _cells(labels: Labels, order: ExpertOrder, expert: int, each: int) -> tuple[Tensor, ...]:
    """Tokens and slots of an expert's run."""
    if (expert, each) not in order.cells:
        order.cells[expert, each] = labels.rows(order.chosen.view(-1, each) == expert)
    return order.cells[expert, each]
