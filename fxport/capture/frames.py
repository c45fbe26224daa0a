"""The frame of a selection: which rows a mask chooses among, and where each of them is.

rows, slot = torch.where(chosen == 3)     chosen [N, 2] from topk: a token holds 3 once at most
frame: N rows, mask `any(chosen == 3, 1)`; the slot of a row is where its one True is
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import shape_of
from fxport.capture.location import user_location
from fxport.capture.mask_facts import one_true_along, rows_source
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["ADDS", "Builder", "Coordinate", "Frame", "refuse_selection"]

aten = torch.ops.aten

# On a node that puts selected rows back: (the node to use when the selection is empty, the mask).
ADDS = "fxport_adds"


@dataclass(frozen=True)
class Frame:
    """The rows that a mask selects from.

    Attributes:
        count: the number of selected rows, a symbol that only the run knows.
        mask: the mask as given to `where`.
        row_axes: its axes that are rows, in order; all but the slot axis.
        slot_axis: the axis along which at most one element is True, if one is known.
        row_mask: ``[R]`` bool: whether the row is selected.
        truth: the mask as bool.
        source: masks with an equal source select equal rows in the same order.
    """

    count: Any
    mask: fx.Node
    row_axes: tuple[int, ...]
    slot_axis: int | None
    row_mask: fx.Node
    truth: fx.Node
    source: fx.Node

    @property
    def rows(self) -> tuple[Any, ...]:
        """Equal where the same rows are selected out of rows that are laid out alike."""
        return self.source, shape_of(self.row_mask)


@dataclass(frozen=True)
class Coordinate:
    """One of the index tensors that ``where(mask)`` returns."""

    frame: Frame
    axis: int


def refuse_selection(node: fx.Node, what: str, code: ReasonCode = ReasonCode.MIXES_TOKENS) -> Any:
    """Raises a `PortError` at the line of this node."""
    hint = "treat every selected token on its own, and add the result back at its own row"
    raise PortError([Reason(code, what, user_location(node), hint)])


class Builder:
    """Adds nodes before the one at hand, with fake values and its source facts."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.at: fx.Node | None = None

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call before the node at hand."""
        assert self.at is not None
        with self.graph.inserting_before(self.at):
            node = self.graph.call_function(target, args, kwargs)
        given = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with _fake_mode(self.at, node.all_input_nodes), torch.no_grad():
            value = target(*given[0], **given[1])
        kept = ("stack_trace", "nn_module_stack", "custom", "source_fn_stack")
        node.meta.update({k: v for k, v in self.at.meta.items() if k in kept}, val=value)
        return node

    def sizes(self, node: fx.Node) -> list[Any]:
        """The sizes of a value, as numbers where they are, else as nodes."""
        return [self.size(node, axis) for axis in range(len(shape_of(node)))]

    def size(self, node: fx.Node, axis: int) -> Any:
        size = shape_of(node)[axis]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, node, axis)

    def frame(self, mask: fx.Node, count: Any) -> Frame:
        """The frame of a mask, and its ``[R]`` row mask."""
        slot = one_true_along(mask)
        rank = len(shape_of(mask))
        rows = tuple(axis for axis in range(rank) if axis != slot)
        if not rows:
            slot, rows = None, tuple(range(rank))
        truth = mask
        if mask.meta["val"].dtype != torch.bool:
            truth = self.call(aten.ne.Scalar, mask, 0)
        row_mask = truth if slot is None else self.call(aten.any.dim, truth, slot)
        if len(rows) > 1:
            row_mask = self.call(aten.reshape.default, row_mask, [-1])
        return Frame(count, mask, rows, slot, row_mask, truth, rows_source(mask))

    def rows(self, value: fx.Node, frame: Frame, first: int) -> fx.Node:
        """A value whose axes from `first` on are the frame's row axes, with one axis of R rows."""
        if len(frame.row_axes) == 1:
            return value
        return self.call(aten.flatten.using_ints, value, first, first + len(frame.row_axes) - 1)

    def before(self, mask: fx.Node, axes: int) -> fx.Node:
        """A mask with axes of size 1 added at the right."""
        for _ in range(axes):
            mask = self.call(aten.unsqueeze.default, mask, -1)
        return mask

    def by_slot(self, frame: Frame, value: fx.Node, first: int, order: Sequence[int]) -> fx.Node:
        """``value[rows, slot]`` for every row: the sum over the slots, of which one counts.

        Args:
            order: the mask's axes as `value` has them from axis `first` on.
        """
        mask = self.call(aten.permute.default, frame.truth, list(order))
        mask = self.before(mask, len(shape_of(value)) - first - len(order))
        kept = self.call(aten.where.ScalarOther, mask, value, 0)
        assert frame.slot_axis is not None
        summed = self.call(aten.sum.dim_IntList, kept, [first + order.index(frame.slot_axis)])
        return self.rows(summed, frame, first)


def _fake_mode(at: fx.Node, inputs: Sequence[fx.Node]) -> Any:
    for node in (*inputs, *at.all_input_nodes, *at.graph.nodes):
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    raise AssertionError("a captured graph without fake values")
