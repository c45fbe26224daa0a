"""Tokens sorted by their expert, computed on in runs, put back: the same without the order.

Before (S slots; K of each token)                After
    order = chosen.argsort()               [S]
    y = x[order // K]                      [S]       y' = x[arange(S) // K], in the order of slots
    z_e = f_e(y[start_e:end_e])            [n_e]     z_e = f_e(y'[where(chosen == e)])
    out[order] = cat([z_0, .., z_E])       [S]       out = zeros; out[where(chosen == e)] = z_e

Sorted slots are all slots, each once, and run e of them is those that chose e. What forward holds
stays what it computes, order and all; beside it goes the same value in the order of slots, and
the calls that are understood compute from that. Whatever else reads a sorted value reads the true
one, and is refused later: `argsort` mixes tokens. Inside a run the slots may come in another
order than forward has them: `fxport.capture.rows` proves that each is treated on its own and goes
back. Forward must not write to any of this: see `fxport.capture.unwritten`.

What is known of which tensor is here; what calls make of it is in `rows` (into the order),
`runs` (cut by expert) and `back`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fxport.capture.run_lengths import RunLength, same
from fxport.capture.unwritten import mark_unwritten

__all__ = ["ExpertOrder", "Kind", "Label", "Labels", "same_sizes"]


class Kind(enum.Enum):
    """What a tensor of a dispatch holds along its first axis."""

    ORDER = enum.auto()  # the numbers of the slots, sorted by expert
    TOKEN = enum.auto()  # those divided by the number of slots of a token
    INVERSE = enum.auto()  # where in the order each slot is
    VALUE = enum.auto()  # one row for each slot, sorted by expert
    RUN = enum.auto()  # ORDER of one expert's slots
    RUN_TOKEN = enum.auto()  # TOKEN of one expert's slots
    ONLY = enum.auto()  # VALUE of an expert's slots, where no other expert has any


@dataclass(eq=False)
class ExpertOrder:
    """The slots sorted by the expert that they chose.

    Attributes:
        chosen: ``[S]`` whole numbers below `experts`.
        stable: whether forward asked that slots of one expert stay in their order.
        lengths: how many slots each expert got, once forward has asked.
        rows: the slots of each expert that has any, ``[n_e]`` int64.
        cells: ``where(chosen.view(-1, each) == expert)`` by (expert, each): token, slot.
    """

    chosen: Tensor
    experts: int
    stable: bool
    lengths: tuple[RunLength | int, ...] | None = None
    rows: dict[int, Tensor] = field(default_factory=dict)
    cells: dict[tuple[int, int], tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def slots(self) -> Any:
        """S."""
        return self.chosen.shape[0]


@dataclass(frozen=True, eq=False)
class Label:
    """What is known of a tensor that forward holds.

    Attributes:
        tensor: kept, so that its identity is not given away.
        raw: of a VALUE, the same in the order of slots; of its shape and dtype.
        each: of TOKEN and RUN_TOKEN, how many slots a token has.
        expert: of RUN, RUN_TOKEN and ONLY.
    """

    tensor: Tensor
    kind: Kind
    order: ExpertOrder
    raw: Tensor | None = None
    each: int = 1
    expert: int = 0


class Labels:
    """The sorted tensors of one trace.

    Args:
        ask: fills in `lengths` and `rows` of an order.
        rows: ``torch.where`` of a mask that holds somewhere.
        numbered: how many slots a token has, where a vector holds the token of every slot.
    """

    def __init__(
        self,
        ask: Callable[[ExpertOrder], None],
        rows: Callable[[Tensor], tuple[Tensor, ...]],
        numbered: Callable[[Tensor], int | None],
    ) -> None:
        self.orders: list[ExpertOrder] = []
        self.rows = rows
        self.numbered = numbered
        self._ask = ask
        self._labels: dict[int, Label] = {}

    def of(self, value: Any) -> Label | None:
        """What is known of a tensor."""
        return self._labels.get(id(value)) if isinstance(value, Tensor) else None

    def lengths(self, order: ExpertOrder) -> tuple[RunLength | int, ...]:
        """How many slots each expert got; forward may have no other way to ask."""
        if order.lengths is None:
            self._ask(order)
        assert order.lengths is not None
        return order.lengths

    def sorts(self, tensor: Tensor, order: ExpertOrder) -> None:
        """Notes that `tensor` is ``argsort(order.chosen)``."""
        mark_unwritten(order.chosen, origin=True)
        self.orders.append(order)
        self.numbers(tensor, Kind.ORDER, order)

    def numbers(
        self, tensor: Tensor, kind: Kind, order: ExpertOrder, *, each: int = 1, expert: int = 0
    ) -> Tensor:
        """Notes what `tensor` numbers: slots, or tokens; or that it is ONLY."""
        self._labels[id(tensor)] = Label(tensor, kind, order, None, each, expert)
        mark_unwritten(tensor)
        return tensor

    def inverts(self, tensor: Tensor, order: ExpertOrder, *, written: bool) -> Tensor:
        """Notes that `tensor` says where in the order each slot is; `written`: just now."""
        self._labels[id(tensor)] = Label(tensor, Kind.INVERSE, order)
        mark_unwritten(tensor, once=written)
        return tensor

    def again(self, label: Label, tensor: Tensor) -> Any:
        """Notes that `tensor` has the same numbers, or rows that are ONLY, as another."""
        if not tensor.dim() or not same(tensor.shape[0], label.tensor.shape[0]):
            return NotImplemented
        return self.numbers(tensor, label.kind, label.order, each=label.each, expert=label.expert)

    def value(self, tensor: Tensor, order: ExpertOrder, raw: Tensor) -> Any:
        """Notes that `tensor` is ``raw[order]``."""
        fits = tensor.dtype == raw.dtype and same_sizes(tensor.shape, raw.shape)
        if not fits or not same(raw.shape[0], order.slots):
            return NotImplemented
        self._labels[id(tensor)] = Label(tensor, Kind.VALUE, order, raw)
        mark_unwritten(tensor)
        return tensor


def same_sizes(one: Any, other: Any) -> bool:
    """Whether shapes are equal for all inputs."""
    return len(one) == len(other) and all(map(same, one, other))
