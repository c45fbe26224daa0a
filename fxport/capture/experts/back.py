"""What the experts gave goes back to the slots, and to the tokens.

    forward                                       instead
    z = cat([z_0, .., z_E])                       z' = zeros; z'[where(chosen == e)] = z_e
    out[order] = z                                out = z'
    back[order] = arange(S); z[back]              z': see `rows`
    out.scatter_add(0, order // K, z)             out + z'.view(N, K, ..).sum(1)
    out.index_add(0, (order // K)[run e], z_e)    out.index_add(0, where(chosen == e)[0], z_e)

That each z_e belongs to where it is put is proven by `fxport.capture.rows`; here, by its size,
it is only guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxport.capture.experts.order import ExpertOrder, Kind, Label, Labels, same_sizes
from fxport.capture.run_lengths import same

__all__ = ["ADDS", "JOINS", "SCATTERS", "add", "invert", "join", "put"]

JOINS = (torch.cat, torch.concat, torch.concatenate, torch.vstack)
_SCATTERS_IN_PLACE = (Tensor.scatter_add_,)
_ADDS_IN_PLACE = (*_SCATTERS_IN_PLACE, Tensor.index_add_)
_SCATTERS = (*_SCATTERS_IN_PLACE, Tensor.scatter_add, torch.scatter_add)
SCATTERS = (Tensor.scatter_, Tensor.scatter, torch.scatter)
ADDS = (*_SCATTERS, Tensor.index_add_, Tensor.index_add, torch.index_add)


def join(labels: Labels, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs one after the other; parts without rows add nothing."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    parts = args[0] if args else ()
    if dim != 0 or not isinstance(parts, list | tuple) or kwargs.keys() - {"dim"}:
        return NotImplemented
    least = 2 if func is torch.vstack else 1
    if not parts or not all(isinstance(p, Tensor) and p.dim() >= least for p in parts):
        return NotImplemented
    if any(p.dtype != parts[0].dtype or p.dim() != parts[0].dim() for p in parts):
        return NotImplemented
    filled = [p for p in parts if not same(p.shape[0], 0)]
    if len(filled) == 1 and len(parts) > 1 and labels.of(filled[0]) is not None:
        return filled[0]
    order = _order_of(labels, filled)
    if order is None or not all(same_sizes(p.shape[1:], parts[0].shape[1:]) for p in parts):
        return NotImplemented
    raw = _nothing(order, filled[0])
    for part, rows in zip(filled, order.rows.values(), strict=True):
        raw = raw.index_put((rows,), part)
    # What forward holds is sorted: that is what anybody else reads.
    by_expert = torch.argsort(order.chosen, stable=True)
    return labels.value(raw[by_expert], order, raw)


def _order_of(labels: Labels, parts: Sequence[Tensor]) -> ExpertOrder | None:
    """The order of which these may be all the runs, by their sizes."""
    for order in labels.orders:
        rows = list(order.rows.values())
        if rows and same_sizes([p.shape[0] for p in parts], [r.shape[0] for r in rows]):
            return order
    return None


def _nothing(order: ExpertOrder, like: Tensor) -> Tensor:
    """Zeros for all slots, to put rows of some into."""
    zeros = torch.zeros_like(order.chosen, dtype=like.dtype)
    for _ in like.shape[1:]:
        zeros = zeros.unsqueeze(-1)
    return zeros.expand(-1, *like.shape[1:])


def put(labels: Labels, into: Tensor, at: Any, given: Any) -> Any:
    """``into[order] = z``: every row of `into` is written."""
    by, value = labels.of(at), labels.of(given)
    if by is None or by.kind is not Kind.ORDER or at.dim() != 1:
        return NotImplemented
    if _is_inverse(labels, into, by, given):
        into[at] = given
        labels.inverts(into, by.order, written=True)
        return None
    if value is None or value.raw is None or value.order is not by.order:
        return NotImplemented
    if labels.of(into) is not None or into.dtype != value.raw.dtype:
        return NotImplemented
    if not same_sizes(into.shape, value.raw.shape):
        return NotImplemented
    into.copy_(value.raw)
    return None


def invert(labels: Labels, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``scatter(into, 0, order, arange(S))``: where in the order each slot is."""
    if kwargs or len(args) != 4 or args[1] not in (0, -1):
        return NotImplemented
    into, _, at, given = args
    by = labels.of(at)
    if by is None or by.kind is not Kind.ORDER or not _is_inverse(labels, into, by, given):
        return NotImplemented
    return labels.inverts(func(*args), by.order, written=func is Tensor.scatter_)


def _is_inverse(labels: Labels, into: Tensor, by: Label, given: Any) -> bool:
    """Whether the numbers of all places in the order are put where the order says."""
    if not isinstance(given, Tensor) or labels.of(given) or labels.numbered(given) != 1:
        return False
    vectors = into.dim() == given.dim() == by.tensor.dim() == 1
    whole = into.dtype in (torch.int64, torch.int32) and labels.of(into) is None
    sizes = (into.shape[0], given.shape[0]) if vectors else ()
    return vectors and whole and all(same(size, by.order.slots) for size in sizes)


def add(labels: Labels, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``index_add(into, 0, index, z)``, and `scatter_add` with an index as wide as z."""
    names = ("self", "dim", "index", "src")
    given = dict(zip(names, args, strict=False)) | kwargs
    for name, other in (("input", "self"), ("source", "src")):
        if name in given:
            given[other] = given.pop(name)
    if given.keys() != set(names) or given["dim"] != 0:
        return NotImplemented
    into, index, value = given["self"], given["index"], given["src"]
    by = labels.of(index)
    if by is None or labels.of(into) is not None or not isinstance(value, Tensor):
        return NotImplemented
    if func in _SCATTERS and not same_sizes(index.shape, value.shape):
        return NotImplemented
    if func not in _SCATTERS and index.dim() != 1:
        return NotImplemented
    if value.dtype != into.dtype or not value.is_floating_point():
        return NotImplemented
    fits = same_sizes(value.shape[1:], into.shape[1:])
    if not fits or not same(into.shape[0] * by.each, by.order.slots):
        return NotImplemented
    in_place = func in _ADDS_IN_PLACE
    if by.kind is Kind.RUN_TOKEN:
        return _add_run(labels, into, by, value, in_place=in_place)
    held = labels.of(value)
    if held is None or held.raw is None or held.order is not by.order:
        return NotImplemented
    if by.kind not in (Kind.ORDER, Kind.TOKEN):
        return NotImplemented
    raw = held.raw
    if by.kind is Kind.TOKEN:
        raw = raw.view(-1, by.each, *into.shape[1:]).sum(1)
    return into.add_(raw) if in_place else into.add(raw)


def _add_run(labels: Labels, into: Tensor, by: Label, value: Tensor, *, in_place: bool) -> Any:
    """What one expert gives is added to its tokens."""
    token = by.order.cells[by.expert, by.each][0]
    if labels.of(value) is not None or not same(value.shape[0], token.shape[0]):
        return NotImplemented
    return into.index_add_(0, token, value) if in_place else into.index_add(0, token, value)
