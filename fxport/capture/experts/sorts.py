"""Calls on tokens that forward sorts by their expert, while it is traced.

    order = chosen.argsort()             noted: see `fxport.capture.experts.order`
    counts = bincount(chosen)
    counts.cpu().numpy(), .tolist()      an entry for each expert: `RunLength`s, 0 if it has none;
                                         also before the sorting
    grouped_mm(x[order // K], w, ends)   see `by_row`
    anything on `order` and what it      see `rows`, `by_row`, `runs`, `back`
    sorted

Which experts have no slots is asked like any other question about emptiness.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxport.capture.experts import back, rows, runs
from fxport.capture.experts.by_row import GROUPED, call_by_row, grouped, owners
from fxport.capture.experts.counts import Counts, counts_of, holds
from fxport.capture.experts.order import ExpertOrder, Labels
from fxport.capture.experts.tokens import numbers_experts, slots_of_each_token
from fxport.capture.location import line_of_user
from fxport.capture.mask_facts import Emptiness, emptiness, index_bound, values_of
from fxport.capture.run_lengths import NumbersTaken, RunLength, array_of, run_lengths
from fxport.capture.unwritten import mark_unwritten
from fxport.errors import Location, PortError, Reason, ReasonCode

__all__ = ["SortedExperts"]

_REPEATS = (torch.repeat_interleave, Tensor.repeat_interleave)


class SortedExperts:
    """The orders of one trace.

    Args:
        node: the node of a tensor in the graph being traced.
        number: gives a question its number.
        is_empty: answers a question, with a witness; see `Selections`.
        rows: ``torch.where`` of a mask that holds somewhere.
    """

    def __init__(
        self,
        node: Callable[[Tensor], fx.Node | None],
        number: Callable[[Emptiness], int],
        is_empty: Callable[[Emptiness, Tensor], bool],
        rows: Callable[[Tensor, fx.Node], tuple[Tensor, ...]],
    ) -> None:
        self._node, self._number, self._is_empty, self._rows = node, number, is_empty, rows
        self._labels = Labels(self._ask_lengths, self._where, self._numbered)
        # Entries of counts: the entry, the counts, which one.
        self._entries: dict[int, tuple[Tensor, Tensor, int]] = {}
        # What sorted tensors were computed to in a way that is not understood, and where.
        self._lost: dict[int, tuple[Tensor, Location | None]] = {}
        # What each expert got, of values that are not sorted yet.
        self._ahead: dict[fx.Node, tuple[RunLength | int, ...]] = {}
        self._by_mask: set[Emptiness] = set()
        self._unstable: set[Emptiness] = set()

    def concerns(self, func: Any) -> bool:
        """Whether a call may be of interest."""
        return bool(self._labels.orders) or func is GROUPED

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call on sorted tensors; `NotImplemented` leaves it as it is."""
        labels = self._labels
        if func is GROUPED and (kwargs.get("offs") is not None or len(args) > 2):
            return self._grouped(*args, **kwargs)
        if not labels.orders:
            return NotImplemented
        if func in back.JOINS:
            return back.join(labels, func, args, kwargs)
        if (made := call_by_row(labels, func, args, kwargs)) is not NotImplemented:
            return made
        if func in _REPEATS:
            return self._repeated(*args, **kwargs)
        if func is Tensor.__getitem__:
            return self._index(*args)
        if func is Tensor.__setitem__:
            return back.put(labels, *args)
        if func in runs.SPLITS and not labels.of(args[0]) and runs.by_lengths(args, kwargs):
            raise PortError([self._not_runs(args[0])])
        given = [labels.of(a) for a in (*args, *kwargs.values())]
        if all(g is None for g in given):
            return NotImplemented
        if func in back.ADDS:
            return back.add(labels, func, args, kwargs)
        if func in back.SCATTERS:
            return back.invert(labels, func, args, kwargs)
        first = labels.of(args[0]) if args else None
        if first is None:
            return rows.gather(labels, func, args, kwargs)
        if func in rows.ARGSORTS:
            return rows.invert(first, labels, func, args, kwargs)
        if func in rows.PARTS:
            parts = rows.apart(labels, func, first, args, kwargs)
            whole = func in runs.SPLITS and parts is NotImplemented
            return runs.split(labels, first, args, kwargs) if whole else parts
        if func in rows.DIVIDES:
            return rows.divide(first, labels, func, args, kwargs)
        return rows.keep_rows(labels, func, first, args, kwargs)

    def _index(self, tensor: Tensor, at: Any) -> Any:
        known = self._labels.of(tensor) or self._labels.of(at)
        found = runs.index(self._labels, tensor, at) if known else NotImplemented
        ends = (at.start, at.stop) if isinstance(at, slice) else ()
        if found is NotImplemented and any(isinstance(end, RunLength) for end in ends):
            raise PortError([self._not_runs(tensor)])
        return found

    def follow(self, args: tuple[Any, ...], result: Any) -> None:
        """Notes a call that was left as it is."""
        if not self._labels.orders or not isinstance(result, Tensor):
            return
        for arg in args:
            if id(arg) in self._lost and isinstance(arg, Tensor):
                self._lost[id(result)] = (result, self._lost[id(arg)][1])
                return
        if any(self._labels.of(arg) for arg in args):
            self._lost[id(result)] = (result, line_of_user(sys._getframe()))

    def _not_runs(self, tensor: Tensor) -> Reason:
        return Reason(
            ReasonCode.MIXES_TOKENS,
            "tokens sorted by their expert are not known to stay one row each, in their places, "
            "and the runs of the experts are cut out of the result",
            self._lost.get(id(tensor), (None, line_of_user(sys._getframe())))[1],
            "compute on the run of each expert alone",
        )

    def _not_groups(self, tensor: Tensor) -> Reason:
        return Reason(
            ReasonCode.MIXES_TOKENS,
            "the rows of a grouped product are not known to be tokens sorted by their expert, one "
            "row for each, or its groups to be the runs of the experts",
            self._lost.get(id(tensor), (None, None))[1] or line_of_user(sys._getframe()),
            "sort the experts that topk chose, count them by bincount, and pass counts.cumsum(0)",
        )

    def sort(self, func: Any, chosen: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``chosen.argsort()``, ascending, of the one axis."""
        given = dict(zip(("dim", "descending"), args, strict=False)) | kwargs
        dim, stable = given.pop("dim", -1), given.pop("stable", False)
        ascending = given.pop("descending", False) is False
        node = self._node(chosen)
        if given or len(args) > 2 or type(dim) is not int or not ascending or node is None:
            return NotImplemented
        source = values_of(node)
        experts = index_bound(source)
        if experts is None or chosen.dim() != 1 or not holds(node, source, experts):
            return NotImplemented
        result = func(chosen, *args, **kwargs)
        order = ExpertOrder(chosen, experts, stable is True)
        self._labels.sorts(result if isinstance(result, Tensor) else result[1], order)
        if not isinstance(result, Tensor):
            self._labels.value(result[0], order, chosen.clone())
        return result

    # --- how many each expert got ----------------------------------------------------------------

    def numbers(self, tensor: Tensor) -> list[Any] | None:
        """What each expert got, or where its run ends, if tokens are sorted by what is counted."""
        counts, order = self._counted(tensor)
        if counts is None or order is None:
            return None
        return _entries(counts, self._labels.lengths(order))

    def _told(self, tensor: Tensor) -> list[Any] | None:
        return self.numbers(tensor) or self._numbers_ahead(tensor)

    def _numbers_ahead(self, tensor: Tensor) -> list[Any] | None:
        """The same before anything is sorted; whether it will be nobody knows."""
        node = self._node(tensor)
        counts = None if node is None else counts_of(node)
        if counts is None or not counts.of_each:
            return None
        if counts.values not in self._ahead:
            asked = [Emptiness(counts.values, expert) for expert in range(counts.experts)]
            parts = [tensor.select(0, expert) for expert in range(counts.experts)]
            of = [self._node(part) for part in parts]
            if any(n is None or emptiness(n) != a for n, a in zip(of, asked, strict=True)):
                return None
            empty = self._ask_each(list(zip(asked, parts, strict=True)))
            slots = counts.values.meta["val"].numel()
            self._ahead[counts.values] = run_lengths(empty, slots, counts.values)
        mark_unwritten(tensor, origin=True)
        return _entries(counts, self._ahead[counts.values])

    def _counted(self, tensor: Any) -> tuple[Counts | None, ExpertOrder | None]:
        """What a tensor counts, and the order of these."""
        known = self._labels.orders and isinstance(tensor, Tensor) and tensor.dim() == 1
        node = self._node(tensor) if known else None
        counts = None if node is None else counts_of(node)
        for order in self._labels.orders if counts is not None else ():
            of = self._node(order.chosen)
            if of is not None and counts is not None and values_of(of) is counts.values:
                mark_unwritten(tensor, origin=True)
                return counts, order
        return None, None

    def _grouped(
        self,
        rows: Tensor,
        weight: Tensor,
        offs: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Any:
        """``grouped_mm(rows, weight, ends of the runs)``.

        Raises:
            PortError: the rows, or the ends, are not known to be those.
        """
        label = self._labels.of(rows)
        counts, order = self._counted(offs)
        plain = bias is None and out_dtype in (None, rows.dtype)
        ends = counts is not None and counts.ends and self._labels.of(weight) is None
        if plain and ends and label is not None and order is not None and label.order is order:
            made = grouped(self._labels, label, weight)
            if made is not NotImplemented:
                return made
        raise PortError([self._not_groups(rows)])

    def _repeated(self, numbers: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``repeat_interleave(arange(E), counts)``: the expert of each sorted slot."""
        given = dict(zip(("repeats", "dim"), args, strict=False)) | kwargs
        repeats, dim = given.get("repeats"), given.get("dim")
        counts, order = self._counted(numbers if repeats is None else repeats)
        if counts is None or order is None or not counts.of_each or dim not in (None, 0):
            return NotImplemented
        node = self._node(numbers)
        if repeats is not None and (node is None or not numbers_experts(node, order.experts)):
            return NotImplemented
        return owners(self._labels, order)

    def numpy(self, tensor: Tensor, **_: Any) -> Any:
        """``counts.numpy()``, an array of objects.

        Raises:
            NumbersTaken: of any other tensor.
        """
        found = self._told(tensor)
        if found is None:
            raise NumbersTaken
        return array_of(found)

    def unbound(self, tensor: Tensor) -> Any:
        """``counts.unbind()``: the entries, which `number` knows."""
        found = self._told(tensor)
        if found is None:
            return NotImplemented
        torch._check(tensor.shape[0] == len(found))
        return tuple(self._entry(tensor, tensor.select(0, i), i) for i in range(len(found)))

    def entry(self, tensor: Tensor, index: int) -> Any:
        """``counts[3]``"""
        found = self.numbers(tensor)
        if found is None or not -len(found) <= index < len(found):
            return NotImplemented
        return self._entry(tensor, tensor[index], index)

    def _entry(self, tensor: Tensor, entry: Tensor, index: int) -> Tensor:
        self._entries[id(entry)] = (entry, tensor, index)
        return entry

    def number(self, tensor: Tensor) -> Any:
        """An entry as a number."""
        source = self._entries.get(id(tensor))
        if source is None:
            return NotImplemented
        found = self._told(source[1])
        return NotImplemented if found is None else found[source[2]]

    def _ask_lengths(self, order: ExpertOrder) -> None:
        """Asks which experts got slots."""
        of = self._node(order.chosen)
        assert of is not None
        asked, masks = [], []
        for expert in range(order.experts):
            masks.append(order.chosen == expert)
            node = self._node(masks[-1])
            about = None if node is None else emptiness(node)
            if about is None:
                raise NumbersTaken
            asked.append(about)
        empty = self._ask_each(list(zip(asked, masks, strict=True)))
        for expert in (e for e in range(order.experts) if not empty[e]):
            node = self._node(masks[expert])
            assert node is not None
            order.rows[expert] = self._rows(masks[expert], node)[0]
            self._sorted_by(order, asked[expert])
        order.lengths = run_lengths(empty, order.slots, values_of(of))

    def _ask_each(self, asked: list[tuple[Emptiness, Tensor]]) -> list[bool]:
        """Which experts got nothing, by a witness of each; all slots went to somebody."""
        empty: list[bool] = []
        for about, witness in asked:
            self._number(about)  # questions have the same numbers whatever the answers are
            nobody_else = all(empty) and len(empty) == len(asked) - 1
            empty.append(not nobody_else and self._is_empty(about, witness))
        return empty

    def _where(self, mask: Tensor) -> tuple[Tensor, ...]:
        node = self._node(mask)
        if node is None:
            raise NumbersTaken
        return self._rows(mask, node)

    def _numbered(self, tensor: Tensor) -> int | None:
        node = self._node(tensor)
        return None if node is None else slots_of_each_token(node)

    # --- ties ------------------------------------------------------------------------------------

    def selects(self, mask: Emptiness) -> None:
        """Notes that forward itself asks where a mask holds."""
        self._by_mask.add(mask)
        self._require_stable()

    def _sorted_by(self, order: ExpertOrder, mask: Emptiness) -> None:
        if not order.stable:
            self._unstable.add(mask)
            self._require_stable()

    def _require_stable(self) -> None:
        """Rows in the order of a mask and of a sort that says nothing of ties may not meet."""
        if self._by_mask & self._unstable:
            reason = Reason(
                ReasonCode.MIXES_TOKENS,
                "the tokens of an expert are taken by a mask, and also by a sort that may leave "
                "them in any order",
                line_of_user(sys._getframe()),
                "sort with stable=True",
            )
            raise PortError([reason])


def _entries(counts: Counts, lengths: tuple[RunLength | int, ...]) -> list[Any]:
    """`bincount` ends at the last expert that has any."""
    filled = [e for e, n in enumerate(lengths) if isinstance(n, RunLength)]
    size = max(counts.least, min(filled[-1] + 1, len(counts.sums)))
    found: list[Any] = []
    for experts in counts.sums[:size]:
        total: Any = 0
        for expert in sorted(experts):
            total = total + lengths[expert]
        found.append(total)
    return found
