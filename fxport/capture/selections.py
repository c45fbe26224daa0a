"""Answers what forward asks about the tokens while it is traced: is this selection empty?

    if self.table[0] == 0: ...           see `fxport.capture.stored_values`
    if not mask.any(): continue          "no" is assumed, and a marker with its number is left
    rows, slot = torch.where(mask)       at least one row; `rows.numel() == 0` is then False
    x[None, rows.tolist()]               x[None, rows]
    for expert in hit.nonzero(): ...     every expert, one after the other
    for expert in chosen.unique(): ...   again
    y[mask] += f(x[mask])                through rows: index and index_put by integers
    order = chosen.argsort()             see `fxport.capture.experts.sorts`

The same forward is traced again with other answers; `fxport.capture.skips` compares the graphs.
"""

from __future__ import annotations

import functools
import itertools
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode

from fxport.capture.experts.sorts import SortedExperts
from fxport.capture.location import asks_for_zero, line_of_user
from fxport.capture.mask_facts import (
    Emptiness,
    class_count,
    emptiness,
    index_bound,
    question,
    rows_source,
    values_of,
)
from fxport.capture.row_numbers import with_rows
from fxport.capture.run_lengths import NumbersTaken, RunLength
from fxport.capture.selected import SORTS
from fxport.capture.stored_values import StoredValues
from fxport.capture.unwritten import mark_unwritten
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["Empties", "NumbersTaken", "Selections", "is_marker", "marked"]

Empties = Callable[[int], bool]

_MARK = "fxport question "
_NONZERO = (torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere)
_UNIQUE = (torch.unique, Tensor.unique)
_NUMBERS = (Tensor.item, Tensor.__int__, Tensor.__index__)
_ASKED: dict[Any, Callable[[Any], Any]] = {
    Tensor.__bool__: bool,
    Tensor.__float__: float,
    Tensor.__int__: int,
    Tensor.__index__: operator.index,
    Tensor.item: lambda number: number,
}


def is_marker(node: fx.Node) -> bool:
    """Whether this node only records that forward asked something."""
    is_assert = node.target is torch.ops.aten._assert_async.msg
    return is_assert and str(node.args[1]).startswith(_MARK)


def marked(node: fx.Node) -> tuple[int, fx.Node]:
    """The number of a marker's question, and what was asked about."""
    asked = node.args[0]
    assert isinstance(asked, fx.Node)
    return int(str(node.args[1]).removeprefix(_MARK)), asked


class Selections(TorchFunctionMode):
    """While active inside a trace, questions about emptiness have answers.

    Args:
        empty: which questions, by the order in which they first come up, are answered "empty".
        stored: what the model's own numbers are.
    """

    def __init__(self, empty: Empties, stored: StoredValues) -> None:
        super().__init__()
        self._empty = empty
        self._stored = stored
        self._numbers: dict[Emptiness, int] = {}
        self._sizes: dict[fx.Node, Any] = {}
        # Tensors whose value is known here: members of a loop over all classes; the tensor is
        # kept so that its identity is not given away.
        self._known: dict[int, tuple[Tensor, int]] = {}
        self._hits: dict[int, tuple[Tensor, Tensor]] = {}
        self._found: dict[int, Tensor] = {}  # rows that a mask gave
        self._classes: dict[int, tuple[Tensor, list[int]]] = {}  # what `unique` gave
        self._sorts = SortedExperts(_node, self._number_of, self._is_empty, self._rows)
        self._handlers = self._handled()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        own = func in _ASKED or func in self._handlers or func in SORTS
        if not (own or self._sorts.concerns(func)) or not args or get_proxy_mode() is None:
            return func(*args, **kwargs)  # most calls: torch asks for sizes, types, ..
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], with_rows(args[1]), *args[2:])
        if func in _ASKED and (number := self._own_number(args[0])) is not None:
            return _ASKED[func](number)
        found = self._sorts.call(func, args, kwargs)
        if found is NotImplemented and isinstance(args[0], Tensor):
            handler = self._handler(func, args, kwargs)
            found = NotImplemented if handler is None else handler(*args, **kwargs)
        if found is not NotImplemented:
            return found
        result = func(*args, **kwargs)
        self._sorts.follow(args, result)
        return result

    def _handler(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any] | None:
        if func is torch.where and (len(args) > 1 or kwargs):
            return None
        if func in _UNIQUE and len(args) > 1:
            return None
        if func in SORTS:
            return functools.partial(self._sorts.sort, func)
        return self._handlers.get(func)

    def _handled(self) -> dict[Any, Callable[..., Any]]:
        return {
            torch.where: self._where,
            **dict.fromkeys(_NONZERO, self._nonzero),
            **dict.fromkeys(_UNIQUE, self._unique),
            **dict.fromkeys(_NUMBERS, self._plain_number),
            Tensor.item: self._number,
            Tensor.numpy: self._sorts.numpy,
            Tensor.__bool__: self._bool,
            Tensor.unbind: self._iterate,  # what a loop over a tensor calls
            Tensor.__len__: self._length,
            Tensor.__getitem__: self._get,
            Tensor.__setitem__: self._set,
            Tensor.__eq__: self._equal,
            Tensor.eq: self._equal,
            torch.eq: self._equal,
        }

    # --- answers -------------------------------------------------------------------------------

    def _own_number(self, tensor: Tensor) -> bool | int | float | None:
        """What is asked about the model's own numbers, which stay what they are."""
        node = _node(tensor)
        number = None if node is None else self._stored.number(node)
        if number is not None:
            mark_unwritten(tensor, origin=True)
        return number

    def _is_empty(self, asked: Emptiness, witness: Tensor) -> bool:
        """The answer to a question; `witness` marks it in the graph."""
        number = self._number_of(asked)
        torch.ops.aten._assert_async.msg(witness, f"{_MARK}{number}")
        return self._empty(number)

    def _number_of(self, asked: Emptiness) -> int:
        return self._numbers.setdefault(asked, len(self._numbers))

    def _bool(self, tensor: Tensor) -> Any:
        if id(tensor) in self._known:
            return bool(self._known[id(tensor)][1])
        node = _node(tensor)
        if node is None or tensor.numel() != 1:
            return NotImplemented
        found = question(node)
        if found is None:
            return NotImplemented
        asked, when_empty = found
        return when_empty if self._is_empty(asked, tensor) else not when_empty

    def _number(self, tensor: Tensor) -> Any:
        if id(tensor) in self._known:
            return self._known[id(tensor)][1]
        if tensor.dtype == torch.bool:
            return self._bool(tensor)
        if (number := self._sorts.number(tensor)) is not NotImplemented:
            return number
        node = _node(tensor)
        asked = emptiness(node) if node is not None else None
        if asked is None or asked.class_axis is not None:
            return NotImplemented
        if self._is_empty(asked, tensor):
            return 0
        count = tensor.item()
        torch._check(count >= 1)
        return count

    def _plain_number(self, tensor: Tensor) -> Any:
        """``int(tensor)``, for which Python takes nothing but an int."""
        number = self._number(tensor)
        if isinstance(number, RunLength):
            reason = Reason(
                ReasonCode.CAPTURE_FAILED,
                "int() takes the number of tokens of an expert, or where its run begins, out of "
                "torch: which of them it is, is not known any more",
                line_of_user(sys._getframe()),
                "counts[i].item(), or counts.tolist()",
            )
            raise PortError([reason])
        return number

    def _counts(self, tensor: Tensor) -> Any:
        """How often each class occurs, one by one: a known number of them."""
        if (entries := self._sorts.unbound(tensor)) is not NotImplemented:
            return entries
        node = _node(tensor)
        size = class_count(node) if node is not None and tensor.dim() == 1 else None
        if size is None:
            return NotImplemented
        torch._check(tensor.shape[0] == size)
        return tuple(tensor.select(0, i) for i in range(size))

    def _length(self, tensor: Tensor) -> Any:
        """``len(rows) > 0`` where a comparison with 0, or a truth value, is all that follows."""
        size = tensor.shape[0]
        if not isinstance(size, torch.SymInt) or not free_unbacked_symbols(size):
            return NotImplemented
        return 1 if asks_for_zero() else NotImplemented

    # --- loops over what was hit -----------------------------------------------------------------

    def _members(self, hits: Tensor) -> list[int]:
        mask = self._hits[id(hits)][1]
        node = _node(mask)
        asked = emptiness(node) if node is not None else None
        assert asked is not None
        bound = index_bound(asked.node)  # classes beyond it are there for padding alone
        return [
            i
            for i in range(mask.shape[0] if bound is None else min(bound, mask.shape[0]))
            if not self._is_empty(asked.of_class(i), mask.select(0, i))
        ]

    def _iterate(self, tensor: Tensor, dim: int = 0) -> Any:
        if dim != 0:
            return NotImplemented
        if id(tensor) in self._classes:
            return tuple(self._constant(tensor, i) for i in self._classes[id(tensor)][1])
        if id(tensor) not in self._hits:
            return self._counts(tensor)
        return tuple(self._constant(tensor, [i]) for i in self._members(tensor))

    def _unique(self, chosen: Tensor, **options: Any) -> Any:
        """The classes that any row chose, in order."""
        node = _node(chosen)
        bound = None if node is None else index_bound(values_of(node))
        more = any(options.get(k) for k in ("return_inverse", "return_counts"))
        if node is None or bound is None or more or options.get("dim") is not None:
            return NotImplemented
        found = []
        for number in range(bound):
            witness = chosen == number
            asked = Emptiness(values_of(node), number)
            if not self._is_empty(asked, witness):
                found.append(number)
        classes = torch.tensor(found, dtype=torch.int64, device=chosen.device)
        self._classes[id(classes)] = (classes, found)
        return classes

    def _constant(self, like: Tensor, value: Any) -> Tensor:
        tensor = torch.tensor(value, dtype=torch.int64, device=like.device)
        self._known[id(tensor)] = (tensor, value[0] if isinstance(value, list) else value)
        return tensor

    def _equal(self, tensor: Tensor, other: Any) -> Any:
        if id(tensor) in self._known and isinstance(other, int):
            return self._known[id(tensor)][1] == other
        if isinstance(other, Tensor) and id(other) in self._known and other.dim() == 0:
            return tensor == self._known[id(other)][1]
        return NotImplemented

    # --- selections ------------------------------------------------------------------------------

    def _where(self, mask: Tensor) -> Any:
        node = _node(mask)
        if node is None:
            return NotImplemented
        asked = emptiness(node)
        if asked is None or asked.class_axis is not None:
            return NotImplemented
        if (places := self._stored.places(node)) is not None:
            mark_unwritten(mask, origin=True)
            return tuple(torch.tensor(p, dtype=torch.int64, device=mask.device) for p in places)
        self._sorts.selects(asked)
        if self._is_empty(asked, mask):
            return tuple(_no_rows(mask) for _ in range(mask.dim()))
        return self._rows(mask, node)

    def _rows(self, mask: Tensor, node: fx.Node) -> tuple[Tensor, ...]:
        """Where a mask holds, which it does somewhere."""
        rows = torch.where(mask)
        size = rows[0].shape[0]
        torch._check(size >= 1)
        source = rows_source(node)
        if source in self._sizes:
            torch._check(size == self._sizes[source])
        self._sizes.setdefault(source, size)
        self._found.update((id(r), r) for r in rows)
        return rows

    def found(self, tensor: Tensor) -> bool:
        """Whether these are rows that a mask gave."""
        return id(tensor) in self._found

    def _nonzero(self, mask: Tensor, *, as_tuple: bool = False) -> Any:
        node = _node(mask)
        asked = emptiness(node) if node is not None else None
        if asked is not None and asked.class_axis is not None and mask.dim() == 1:
            hits = torch.nonzero(mask)
            self._hits[id(hits)] = (hits, mask)
            return hits if not as_tuple else NotImplemented
        rows = self._where(mask)
        if rows is NotImplemented or as_tuple:
            return rows
        return torch.stack(rows, dim=-1) if len(rows) > 1 else rows[0].unsqueeze(-1)

    def _get(self, tensor: Tensor, index: Any) -> Any:
        if id(tensor) in self._known and isinstance(index, int) and tensor.dim() == 1:
            return self._constant(tensor, self._known[id(tensor)][1])
        if type(index) is int and tensor.dim() == 1:
            return self._sorts.entry(tensor, index)
        by_rows = self._by_rows(index)
        return NotImplemented if by_rows is None else tensor[by_rows]

    def _set(self, tensor: Tensor, index: Any, value: Any) -> Any:
        by_rows = self._by_rows(index)
        if by_rows is None:
            return NotImplemented
        tensor[by_rows] = value
        return None

    def _by_rows(self, index: Any) -> Any:
        """An index without boolean masks and known tensors; None where it holds neither."""
        items = index if isinstance(index, tuple) else (index,)
        parts = [self._item(item) for item in items]
        if all(part is None for part in parts):
            return None
        unchanged = [
            (item,) if part is None else part for item, part in zip(items, parts, strict=True)
        ]
        return tuple(itertools.chain.from_iterable(unchanged))

    def _item(self, item: Any) -> tuple[Any, ...] | None:
        if not isinstance(item, Tensor):
            return None
        if id(item) in self._known:
            value = self._known[id(item)][1]
            return (value,) if item.dim() == 0 else (slice(value, value + 1),)
        if item.dtype == torch.bool and item.dim() > 0:
            rows = self._where(item)
            return None if rows is NotImplemented else tuple(rows)
        return None


def _no_rows(mask: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=mask.device)


def _node(tensor: Tensor) -> fx.Node | None:
    """The node that stands for a tensor in the graph being traced."""
    mode = get_proxy_mode()
    if mode is None:
        return None
    slot = get_proxy_slot(tensor, mode.tracer, None)
    return None if slot is None else slot.proxy.node
