"""Tokens sorted by their expert, computed on in runs, put back: the same without the order.

    order = chosen.argsort()                       S slots, [S]; chosen is [S]
    y = x[order // K]                              y' = x[arange(S) // K], in the order of slots
    z = f_e(y[start_e:end_e])                      z_e = f_e(y'[where(chosen == e)])
    out[order] = cat([z_0, .., z_E])               out = zeros; out[where(chosen == e)] = z_e

Sorted slots are all slots, each once, and run e of them is those that chose e. What forward holds
stays what it computes, order and all; beside it goes the same value in the order of slots, and
the calls below compute from that. Whatever else reads a sorted value reads the true one, and is
refused later: `argsort` mixes tokens. Inside a run the slots may come in another order than
forward has them: `fxport.capture.rows` proves that each is treated on its own and goes back.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fxport.capture.run_lengths import RunLength, run_between

__all__ = ["ExpertOrder", "Kind", "Orders"]

Ask = Callable[["ExpertOrder"], None]
Where = Callable[[Tensor], Any]


class Kind(enum.Enum):
    """What a tensor of a dispatch holds along its first axis."""

    ORDER = enum.auto()  # the numbers of the slots, sorted by expert
    TOKEN = enum.auto()  # those divided by the number of slots of a token
    INVERSE = enum.auto()  # where in the order each slot is
    VALUE = enum.auto()  # one row for each slot, sorted by expert
    RUN_TOKEN = enum.auto()  # TOKEN of one expert's slots
    RUN = enum.auto()  # any of the others, of one expert's slots


@dataclass(eq=False)
class ExpertOrder:
    """The slots sorted by the expert that they chose.

    Attributes:
        chosen: ``[S]`` whole numbers below `experts`.
        lengths: how many slots each expert got, once forward has asked.
        rows: the slots of each expert that has any.
        cells: ``where(chosen.view(-1, each) == expert)`` by (expert, each): token, slot.
    """

    chosen: Tensor
    version: int
    experts: int
    lengths: tuple[RunLength | int, ...] | None = None
    rows: dict[int, Tensor] = field(default_factory=dict)
    cells: dict[tuple[int, int], tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def slots(self) -> Any:
        """S."""
        return self.chosen.shape[0]


@dataclass(frozen=True, eq=False)
class _Label:
    """What is known of a tensor that forward holds, as long as nobody writes into it.

    Attributes:
        raw: of a VALUE, the same in the order of slots.
        each: of TOKEN and RUN_TOKEN, how many slots a token has.
        expert: of RUN_TOKEN.
    """

    tensor: Tensor
    version: int
    kind: Kind
    order: ExpertOrder
    raw: Tensor | None = None
    each: int = 1
    expert: int = 0


# Each row keeps its place, whatever it is computed to.
_BY_ELEMENT = {
    Tensor.mul: torch.mul, torch.mul: torch.mul, Tensor.__mul__: torch.mul, Tensor.mul_: torch.mul,
    Tensor.__imul__: torch.mul, Tensor.__rmul__: torch.mul,
}  # fmt: skip
_IN_PLACE = (Tensor.mul_, Tensor.__imul__)
_CASTS = (
    Tensor.to, Tensor.type, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double,
    Tensor.long, Tensor.int, Tensor.contiguous, Tensor.type_as, Tensor.cuda, Tensor.cpu,
    Tensor.detach, Tensor.clone,
)  # fmt: skip
_COLUMNS = (Tensor.view, Tensor.reshape, torch.reshape)
_WIDENED = (Tensor.expand, Tensor.repeat, Tensor.expand_as)
_ADDS = (Tensor.scatter_add, Tensor.scatter_add_, torch.scatter_add,
         Tensor.index_add, Tensor.index_add_, torch.index_add)  # fmt: skip
_ADDS_IN_PLACE = (Tensor.scatter_add_, Tensor.index_add_)
_JOINS = (torch.cat, torch.concat, torch.concatenate, torch.vstack)
_SPLITS = (torch.split, Tensor.split, torch.functional.split)


def _same(one: Any, other: Any) -> bool:
    """Whether two sizes are equal for all inputs."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(one == other))


class Orders:
    """The sorted tensors of one trace.

    Args:
        ask: fills in `lengths` and `rows` of an order.
        where: ``torch.where`` of a mask that holds somewhere.
    """

    def __init__(self, ask: Ask, where: Where) -> None:
        self._where = where
        self._labels: dict[int, _Label] = {}
        self._known: list[ExpertOrder] = []
        self._ask = ask

    def note(self, result: Tensor, order: ExpertOrder) -> None:
        """Notes that `result` is ``argsort(order.chosen)``."""
        self._known.append(order)
        self._note(result, Kind.ORDER, order)

    def known(self) -> list[ExpertOrder]:
        """All orders whose experts are still what they were when they were sorted."""
        return [order for order in self._known if order.chosen._version == order.version]

    def lengths(self, order: ExpertOrder) -> tuple[RunLength | int, ...]:
        """How many slots each expert got."""
        if order.lengths is None:
            self._ask(order)
        assert order.lengths is not None
        return order.lengths

    def label(self, value: Any) -> _Label | None:
        """What is known of a tensor; nothing once somebody has written into it."""
        found = self._labels.get(id(value)) if isinstance(value, Tensor) else None
        if found is None or found.version != value._version:
            return None
        return found if found.order.chosen._version == found.order.version else None

    def _note(self, tensor: Tensor, kind: Kind, order: ExpertOrder, **more: Any) -> Tensor:
        label = _Label(tensor, tensor._version, kind, order, **more)
        self._labels[id(tensor)] = label
        return tensor

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call on sorted tensors; `NotImplemented` leaves it as it is."""
        if not self._labels:
            return NotImplemented
        if func in _JOINS:
            return self._join(func, args, kwargs)
        given = [self.label(a) for a in (*args, *kwargs.values())]
        inner = args[1] if func in (Tensor.__getitem__, Tensor.__setitem__) else None
        inside = inner if isinstance(inner, tuple) else (inner,)
        if all(g is None for g in (*given, *map(self.label, inside))):
            return NotImplemented
        if func is Tensor.__getitem__:
            return self._get(*args)
        if func is Tensor.__setitem__:
            return self._set(*args)
        if func in (torch.argsort, Tensor.argsort):
            return self._inverse(func, args, kwargs)
        if func in _BY_ELEMENT:
            return self._by_element(func, args, kwargs)
        if func in _ADDS:
            return self._add(func, args, kwargs)
        first = self.label(args[0]) if args else None
        if first is None:
            return self._gather(func, args, kwargs)
        if func in _SPLITS:
            return self._split(first, args, kwargs)
        if func in (Tensor.__floordiv__, torch.div, Tensor.div, torch.floor_divide,
                    Tensor.floor_divide):  # fmt: skip
            return self._divide(func, first, args, kwargs)
        return self._keeps_rows(func, first, args, kwargs)

    # --- the same rows, one by one ---------------------------------------------------------------

    def _keeps_rows(
        self, func: Any, first: _Label, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Views that add axes at the right, casts; of indices also copies of the column."""
        rank = args[0].dim()
        column = func in _COLUMNS and rank == 1 and _sizes(args[1:]) in ((-1, 1), (-1,))
        column = column or (
            rank == 1
            and func in (Tensor.unsqueeze, torch.unsqueeze)
            and _sizes(args[1:]) in ((-1,), (1,))
        )
        cast = func in _CASTS and not any(self.label(a) for a in args[1:])
        if func in (Tensor.to, Tensor.long, Tensor.int, Tensor.type) and first.raw is None:
            cast = cast and not _narrows(func(*args, **kwargs))
        numbers = first.kind in (Kind.ORDER, Kind.TOKEN, Kind.RUN_TOKEN)
        wide = func in _WIDENED and numbers and rank == 2 and _sizes(args[1:])[:1] in ((-1,), (1,))
        if func is Tensor.expand_as or (func is Tensor.repeat and _sizes(args[1:])[:1] != (1,)):
            wide = False
        if not (column or cast or wide):
            return NotImplemented
        made = func(*args, **kwargs)
        if made is args[0]:
            return made
        raw = None if first.raw is None else func(first.raw, *args[1:], **kwargs).clone()
        return self._again(first, made, raw)

    def _again(self, label: _Label, made: Tensor, raw: Tensor | None) -> Tensor:
        self._labels[id(made)] = replace(label, tensor=made, version=made._version, raw=raw)
        return made

    def _by_element(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        labels = [self.label(a) for a in args]
        values = [g for g in labels if g is not None and g.kind is Kind.VALUE]
        fits = len(args) == 2 and not kwargs and values and len({id(g.order) for g in values}) == 1
        for label, arg in zip(labels, args, strict=True):
            fits = fits and (label in values if label else isinstance(arg, int | float))
        ranks = {a.dim() for a in args if isinstance(a, Tensor)}
        if not fits or len(ranks) > 1 or (func in _IN_PLACE and labels[0] is None):
            return NotImplemented
        raws = [g.raw if g is not None else a for g, a in zip(labels, args, strict=True)]
        raw = _BY_ELEMENT[func](*raws)
        made = func(*args)
        return self._again(values[0], made, raw.to(made.dtype))

    def _divide(
        self, func: Any, first: _Label, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        mode = kwargs.get("rounding_mode")
        floor = mode in ("floor", "trunc") if func in (torch.div, Tensor.div) else not kwargs
        if first.kind is not Kind.ORDER or not floor or len(args) != 2:
            return NotImplemented
        if type(args[1]) is not int or args[1] < 1:
            return NotImplemented
        made = func(*args, **kwargs)
        return self._note(made, Kind.TOKEN, first.order, each=args[1])

    def _inverse(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = self.label(args[0])
        plain = all(v in (0, -1, False) for v in (*args[1:], kwargs.get("dim", -1)))
        if first is None or first.kind is not Kind.ORDER or not plain or args[0].dim() != 1:
            return NotImplemented
        if kwargs.get("descending", False):
            return NotImplemented
        return self._note(func(*args, **kwargs), Kind.INVERSE, first.order)

    # --- into the order --------------------------------------------------------------------------

    def _gather(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``gather(x, 0, index)`` with an index that is a widened column, and `index_select`."""
        given = dict(zip(("self", "dim", "index"), args, strict=False)) | kwargs
        given.setdefault("self", given.pop("input", None))
        gathers = func in (torch.gather, Tensor.gather)
        if not gathers and func not in (torch.index_select, Tensor.index_select):
            return NotImplemented
        source, label = given["self"], self.label(given.get("index"))
        if label is None or given.get("dim") != 0 or self.label(source) is not None:
            return NotImplemented
        index = given["index"]
        if gathers and (index.dim() != source.dim() or not _same_sizes(index, source)):
            return NotImplemented
        return self._taken(source, label, lambda: func(*args, **kwargs))

    def _taken(self, source: Tensor, label: _Label, true: Callable[[], Tensor]) -> Any:
        """``source[index]`` for a labelled index of whole rows."""
        if label.kind is Kind.RUN_TOKEN:
            fits = _same(source.shape[0] * label.each, label.order.slots)
            return source[label.tensor] if fits and label.tensor.dim() == 1 else NotImplemented
        if label.kind is Kind.RUN:
            return self._of_run(source, label)
        if label.kind is Kind.ORDER and _same(source.shape[0], label.order.slots):
            raw: Tensor | None = source.clone()
        elif label.kind is Kind.TOKEN:
            raw = self._of_each_slot(source, label)
        else:
            return NotImplemented
        return raw if raw is None else self._note(true(), Kind.VALUE, label.order, raw=raw)

    def _of_run(self, source: Tensor, label: _Label) -> Any:
        """``source[order[start:end]]``: by token and slot where the tokens are taken, too."""
        cells = [(key, c) for key, c in label.order.cells.items() if key[0] == label.expert]
        first = label.order.rows[label.expert] is label.tensor
        if not cells or not first or not _same(source.shape[0], label.order.slots):
            return NotImplemented
        (_, each), found = cells[0]
        return source.view(-1, each, *source.shape[1:])[found[0], found[1]]

    def _of_each_slot(self, source: Tensor, label: _Label) -> Tensor | None:
        """``source[arange(S) // each]``."""
        if not _same(source.shape[0] * label.each, label.order.slots):
            return None
        rest = source.shape[1:]
        wide = source.unsqueeze(1).expand(-1, label.each, *rest)
        return wide.reshape(source.shape[0] * label.each, *rest).clone()

    # --- runs ------------------------------------------------------------------------------------

    def _get(self, tensor: Tensor, index: Any) -> Any:
        label, at = self.label(tensor), self.label(index)
        if label is None:
            return NotImplemented if at is None else self._taken(tensor, at, lambda: tensor[index])
        if isinstance(index, slice) and index.step is None:
            return self._run(label, tensor, index.start or 0, index.stop)
        if index == (slice(None), None) if isinstance(index, tuple) and at is None else False:
            return self._keeps_rows(Tensor.unsqueeze, label, (tensor, -1), {})
        inverse = at is not None and at.kind is Kind.INVERSE and at.order is label.order
        if inverse and label.raw is not None:
            return label.raw.clone()
        return NotImplemented

    def _run(self, label: _Label, tensor: Tensor, start: Any, stop: Any) -> Any:
        order = label.order
        if not any(isinstance(at, RunLength) for at in (start, stop)):
            whole = start == 0 and (stop is None or _same(stop, order.slots))
            return tensor if whole else self._at_the_end(label, tensor, start, stop)
        expert = run_between(start, stop, self.lengths(order))
        if expert is None:
            return NotImplemented
        rows = order.rows[expert]
        if label.kind in (Kind.RUN, Kind.RUN_TOKEN):
            return tensor if expert == label.expert else NotImplemented
        if label.kind is Kind.TOKEN:
            cells = self._cells(order, expert, label.each)
            if cells is None:
                return NotImplemented
            return self._note(cells[0], Kind.RUN_TOKEN, order, each=label.each, expert=expert)
        if label.kind is not Kind.ORDER and label.raw is None:
            return NotImplemented
        run = rows if label.raw is None else label.raw[rows]
        # Where no other expert got any, this is all of them: it may be taken again.
        if len(order.rows) == 1 or label.kind is Kind.ORDER:
            self._note(run, Kind.RUN, order, expert=expert)
        return run

    def _cells(self, order: ExpertOrder, expert: int, each: int) -> tuple[Tensor, ...] | None:
        """Tokens and slots of an expert's run."""
        if (expert, each) not in order.cells:
            found = self._where(order.chosen.view(-1, each) == expert)
            if found is NotImplemented:
                return None
            order.cells[expert, each] = found
        return order.cells[expert, each]

    def _at_the_end(self, label: _Label, tensor: Tensor, start: Any, stop: Any) -> Any:
        """The run of an expert without slots is none of them."""
        return tensor[:0] if type(start) is type(stop) is int and start == stop else NotImplemented

    def _split(self, label: _Label, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(("tensor", "sizes", "dim"), args, strict=False)) | kwargs
        sizes = given.get("sizes", given.get("split_size_or_sections", given.get("split_size")))
        if given.get("dim", 0) != 0 or not isinstance(sizes, list | tuple):
            return NotImplemented
        parts: list[Any] = []
        start: Any = 0
        for size in sizes:
            empty = type(size) is int and size == 0
            part = args[0][:0] if empty else self._run(label, args[0], start, start + size)
            if part is NotImplemented:
                return NotImplemented
            parts.append(part)
            start = start + size
        return tuple(parts) if _same_number(start, label.order) else NotImplemented

    # --- and back --------------------------------------------------------------------------------

    def _join(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the experts gave, one after the other; empty parts add nothing."""
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        parts = args[0] if args else ()
        if dim != 0 or not isinstance(parts, list | tuple) or kwargs.keys() - {"dim"}:
            return NotImplemented
        if not all(isinstance(p, Tensor) for p in parts):
            return NotImplemented
        filled = [p for p in parts if p.dim() == 0 or not _same(p.shape[0], 0)]
        if len(filled) == 1 and len(parts) > 1 and self.label(filled[0]) is not None:
            return self._again_joined(filled[0], parts)
        order = self._order_of(filled)
        if order is None or len({(p.dtype, p.shape[1:]) for p in filled}) > 1:
            return NotImplemented
        raw = _nothing(order, filled[0])
        for part, rows in zip(filled, order.rows.values(), strict=True):
            raw = raw.index_put((rows,), part)
        # What forward holds is sorted: that is what anybody else reads.
        by_expert = torch.argsort(order.chosen, stable=True)
        return self._note(raw[by_expert], Kind.VALUE, order, raw=raw)

    def _again_joined(self, filled: Tensor, parts: Sequence[Tensor]) -> Any:
        return filled if all(p.dtype == filled.dtype for p in parts) else NotImplemented

    def _order_of(self, parts: Sequence[Tensor]) -> ExpertOrder | None:
        """The order of which these are all the runs, by their sizes, one by one."""
        for order in {id(g.order): g.order for g in self._labels.values()}.values():
            rows = list(order.rows.values())
            same = (
                p.dim() and _same(p.shape[0], r.shape[0]) for p, r in zip(parts, rows, strict=True)
            )
            if rows and len(rows) == len(parts) and all(same):
                return order
        return None

    def _set(self, into: Tensor, index: Any, value: Any) -> Any:
        at, given = self.label(index), self.label(value)
        if at is None or at.kind is not Kind.ORDER or index.dim() != 1:
            return NotImplemented
        if given is None or given.raw is None or given.order is not at.order:
            return NotImplemented
        if not _same(into.shape[0], at.order.slots) or into.shape[1:] != value.shape[1:]:
            return NotImplemented
        into.copy_(given.raw)
        return None

    def _add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``index_add(y, 0, index, value)``, and `scatter_add` with a widened index."""
        names = ("self", "dim", "index", "src")
        given = dict(zip(names, args, strict=False)) | kwargs
        given.setdefault("self", given.pop("input", None))
        given.setdefault("src", given.pop("source", None))
        if set(given) - set(names) or given.get("dim") != 0:
            return NotImplemented
        into, value, at = given["self"], given["src"], self.label(given.get("index"))
        if at is None or self.label(into) is not None or not isinstance(value, Tensor):
            return NotImplemented
        scatters = "scatter" in str(getattr(func, "__name__", ""))
        if scatters and not _same_sizes(given["index"], value):
            return NotImplemented
        if value.shape[1:] != into.shape[1:] or value.dtype != into.dtype:
            return NotImplemented
        if at.kind is Kind.RUN_TOKEN:
            return self._add_run(func in _ADDS_IN_PLACE, into, at, value)
        held = self.label(value)
        known = at.kind in (Kind.ORDER, Kind.TOKEN) and held is not None and held.order is at.order
        if held is None or held.raw is None or not known:
            return NotImplemented
        raw = held.raw
        if not _same(into.shape[0] * at.each, at.order.slots):
            return NotImplemented
        if at.kind is Kind.TOKEN:
            raw = raw.view(-1, at.each, *into.shape[1:]).sum(1)
        return into.add_(raw) if func in _ADDS_IN_PLACE else into.add(raw)

    def _add_run(self, in_place: bool, into: Tensor, at: _Label, value: Tensor) -> Any:
        """What one expert gives is added to its tokens."""
        token = at.order.cells[at.expert, at.each][0]
        fits = _same(into.shape[0] * at.each, at.order.slots)
        if not fits or self.label(value) is not None or not _same(value.shape[0], token.shape[0]):
            return NotImplemented
        return into.index_add_(0, token, value) if in_place else into.index_add(0, token, value)


def _nothing(order: ExpertOrder, like: Tensor) -> Tensor:
    """Zeros for all slots, to put rows of some into."""
    zeros = torch.zeros_like(order.chosen, dtype=like.dtype)
    for _ in like.shape[1:]:
        zeros = zeros.unsqueeze(-1)
    return zeros.expand(-1, *like.shape[1:])


def _same_number(total: Any, order: ExpertOrder) -> bool:
    if isinstance(total, RunLength):
        return total == order.slots
    return _same(total, order.slots)


def _same_sizes(index: Tensor, value: Tensor) -> bool:
    """Whether whole rows are meant: an index as wide as what it is used on."""
    return index.dim() == value.dim() and index.shape[1:] == value.shape[1:]


def _narrows(made: Any) -> bool:
    return not isinstance(made, Tensor) or made.dtype not in (torch.int64, torch.int32)


def _sizes(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Whole numbers that are known now; others as None."""
    one = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    return tuple(n if type(n) is int else None for n in one)
