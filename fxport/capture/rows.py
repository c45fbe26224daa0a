"""Work on selected rows becomes the same work on every row, and is kept where the mask holds.

Before (u: known only when it runs)               After (R rows, every one)
    rows, slot = where(chosen == 3)   [u]             mask = any(chosen == 3, 1)           [R]
    z = expert(x[rows])               [u, C]          z = expert(x)                        [R, C]
    z = z * w[rows, slot, None]       [u, C]          z = z * sum(where(chosen == 3, w, 0), 1)
    y = index_add(y, 0, rows, z)      [R, C]          y = y + where(mask, z, 0)            [R, C]

Exact because every operation between the choice and the way back is proven to treat each row on
its own (by the rules of the token-locality analysis), and each row goes back to where it came
from. A selection of no rows then adds nothing by construction.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.symbol import SymT, symbol_is_type

from fxport.capture.arguments import arguments, shape_of, shape_of_tensor
from fxport.capture.every_row import EVERY_ROW
from fxport.capture.flat_slots import flat_slots_apart
from fxport.capture.frames import ADDS, Builder, Coordinate, Frame, refuse_selection
from fxport.capture.location import user_location
from fxport.capture.memory import is_mutation
from fxport.capture.slot_numbers import slots_apart
from fxport.capture.whole_rows import take_whole_rows
from fxport.errors import PortError, Reason

__all__ = ["dense_rows", "without_empty_rows"]

aten = torch.ops.aten

_SCATTERS = {
    aten.index_add.default,
    aten.index_put.default,
    aten.index_copy.default,
    aten.index_add_.default,
    aten.index_put_.default,
    aten.index_copy_.default,
}
_AT_RUN_TIME = SymT.UNBACKED_INT
# Leave the numbers of the rows as they are.
_COORDINATE_VIEWS = (
    aten.unsqueeze, aten.squeeze, aten.view, aten.reshape, aten.flatten, aten.to, aten.clone,
    aten.contiguous, aten.alias, aten.detach,
)  # fmt: skip


def _values(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    found = value if isinstance(value, list | tuple) else [value]
    return [v for v in found if isinstance(v, torch.Tensor)]


def _counts(node: fx.Node) -> set[sympy.Symbol]:
    """Symbols of sizes that only the run knows, in the shape of a value."""
    sizes = [s for v in _values(node) for s in shape_of_tensor(v) if not isinstance(s, int)]
    return {s for size in sizes for s in size.free_symbols if symbol_is_type(s, _AT_RUN_TIME)}


def without_empty_rows(gm: fx.GraphModule) -> None:
    """Removes what puts a selection of no rows back: it changes nothing."""
    for node in list(gm.graph.nodes):
        if node.target in _SCATTERS and any(0 in shape_of(i) for i in _indices(node)):
            changed = arguments(node)["self"]
            node.replace_all_uses_with(changed)
            gm.graph.erase_node(node)


def _indices(node: fx.Node) -> list[fx.Node]:
    bound = arguments(node)
    given = bound["indices"] if "indices" in bound else [bound["index"]]
    return [i for i in given if isinstance(i, fx.Node)]


def dense_rows(gm: fx.GraphModule) -> tuple[Frame, ...]:
    """Rewrites every selection of a captured graph.

    Raises:
        PortError: rows are not treated one by one, or do not go back to where they came from.
    """
    if not any(n.target is aten.where.default for n in gm.graph.nodes):
        return ()
    _without_mutation(gm)
    take_whole_rows(gm)
    flat_slots_apart(gm)
    slots_apart(gm)
    rewriting = _Rewriting(gm)
    for node in list(gm.graph.nodes):
        rewriting.visit(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return tuple(rewriting.frames.values())


def _without_mutation(gm: fx.GraphModule) -> None:
    """In-place operations on selected rows, and in-place ways back, as out-of-place ones."""
    from fxport.passes.functional import write_anew  # core loads no pass at import
    from fxport.passes.view_writes import drop_ways_back

    reasons = []
    for node in list(gm.graph.nodes):
        if is_mutation(node):
            inputs = [node, *node.all_input_nodes]
            reason = write_anew(gm, node) if any(map(_counts, inputs)) else None
            reasons += [] if reason is None else [reason]
    if reasons:
        raise PortError(reasons)
    drop_ways_back(gm.graph)


class _Rewriting:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.build = Builder(gm.graph)
        self.frames: dict[fx.Node, Frame] = {}
        self.coordinates: dict[fx.Node, tuple[Coordinate, ...]] = {}
        # What a value of selected rows became, and its axes (the rows are the token axis).
        self.dense: dict[fx.Node, Any] = {}
        self.axes: dict[fx.Node, Any] = {}
        self.of: dict[fx.Node, Frame] = {}

    def visit(self, node: fx.Node) -> None:
        self.build.at = node
        inputs = node.all_input_nodes
        if node.target is aten.where.default:
            self._choose(node)
        elif any(i in self.coordinates for i in inputs):
            self._with_coordinates(node)
        elif any(i in self.dense for i in inputs):
            if node.op == "output":
                refuse_selection(node, "rows that the tokens select are returned as they are")
            self._row_by_row(node)

    # --- the choice ------------------------------------------------------------------------------

    def _choose(self, node: fx.Node) -> None:
        mask = arguments(node)["condition"]
        count = shape_of_tensor(node.meta["val"][0])[0]
        if mask not in self.frames:
            self.frames[mask] = self.build.frame(mask, count)
        frame = self.frames[mask]
        rank = len(shape_of(mask))
        self.coordinates[node] = tuple(Coordinate(frame, axis) for axis in range(rank))

    def _with_coordinates(self, node: fx.Node) -> None:
        target = node.target
        if target is operator.getitem:
            self.coordinates[node] = (self.coordinates[node.args[0]][node.args[1]],)  # type: ignore[index]
        elif target is aten.sym_size.int:
            self._row_count(node)
        elif target in _SCATTERS:
            self._put_back(node)
        elif target is aten.index.Tensor:
            bound = arguments(node)
            self._take(node, bound["self"], list(bound["indices"]))
        elif target is aten.index_select.default:
            bound = arguments(node)
            before = [None] * (bound["dim"] % len(shape_of(bound["self"])))
            self._take(node, bound["self"], [*before, bound["index"]])
        elif not self._same_coordinates(node):
            refuse_selection(node, "the numbers of the selected rows enter the computation")

    def _same_coordinates(self, node: fx.Node) -> bool:
        """Views of row numbers; a stack of them, and one column of it."""
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            return False
        found = [self.coordinates.get(i) for i in node.all_input_nodes]
        if target is aten.stack.default and all(f is not None and len(f) == 1 for f in found):
            self.coordinates[node] = tuple(f[0] for f in found if f is not None)
            return True
        given = found[0]
        whole = given is not None and not node.meta["val"].is_floating_point()
        if not whole or given is None:
            return False
        if target is aten.select.int:
            index = arguments(node)["index"]
            fits = arguments(node)["dim"] % 2 == 1 and isinstance(index, int)
            if fits:
                self.coordinates[node] = (given[index],)
            return fits
        if target.overloadpacket in _COORDINATE_VIEWS and len(given) == 1:
            self.coordinates[node] = given
            return True
        return False

    def _row_count(self, node: fx.Node) -> None:
        source, axis = node.args
        assert isinstance(source, fx.Node)
        frame = self.coordinates[source][0].frame
        known = shape_of(source)[axis]  # type: ignore[index]
        self.dense[node] = known if isinstance(known, int) else self.build.size(frame.row_mask, 0)

    # --- rows out of a value ---------------------------------------------------------------------

    def _take(self, node: fx.Node, value: fx.Node, indices: list[Any]) -> None:
        first, found = self._coordinates_of(node, value, indices)
        frame = found[0].frame
        order = [c.axis for c in found]
        if frame.slot_axis is None and len(set(order)) == len(order):
            dense = self.build.rows(self._every_row(value, frame, first, order), frame, first)
        elif order == list(frame.row_axes):
            dense = self.build.rows(value, frame, first)
        elif sorted(order) == list(range(len(shape_of(frame.mask)))):
            rows = [axis for axis in order if axis != frame.slot_axis]
            if frame.slot_axis is None or rows != list(frame.row_axes):
                refuse_selection(node, "the selected rows are taken in another order")
            if value.meta["val"].dtype == torch.bool:
                refuse_selection(node, "truth values are selected by token and slot")
            dense = self.build.by_slot(frame, value, first, order)
        else:
            refuse_selection(node, "the selected rows are taken by their slots alone")
        self._now(node, dense, frame, self._axes_of_rows(node, first))

    def _every_row(self, value: fx.Node, frame: Frame, first: int, order: Sequence[int]) -> fx.Node:
        """A value with axes `order` of the mask, from axis `first` on, with all of its row axes.

        Where a token may be selected twice its slots are rows of their own: all have its value.
        """
        rank = len(shape_of(value))
        by_axis = [first + order.index(axis) for axis in sorted(order)]
        placed = [*range(first), *by_axis, *range(first + len(order), rank)]
        if placed != list(range(rank)):
            value = self.build.call(aten.permute.default, value, placed)
        sizes = self.build.sizes(value)
        for axis in frame.row_axes:
            if axis not in order:
                value = self.build.call(aten.unsqueeze.default, value, first + axis)
                sizes.insert(first + axis, self.build.size(frame.mask, axis))
        return self.build.call(aten.expand.default, value, sizes) if len(sizes) > rank else value

    def _axes_of_rows(self, node: fx.Node, first: int) -> Any:
        from fxport.passes.axes import Axis

        sizes = shape_of(node)
        return tuple(
            (Axis.TOKEN,) if i == first else (() if s == 1 else (s,)) for i, s in enumerate(sizes)
        )

    def _coordinates_of(
        self, node: fx.Node, value: fx.Node, indices: list[Any]
    ) -> tuple[int, list[Coordinate]]:
        """Where the row numbers index a value, and which ones they are, in order."""
        used = [i for i, index in enumerate(indices) if index is not None]
        found = [self.coordinates.get(indices[i]) for i in used]
        plain = all(f is not None and len(f) == 1 for f in found) and value not in self.dense
        flat = all(indices[i].meta["val"].dim() == 1 for i in used)
        if not plain or not flat or used != list(range(used[0], used[0] + len(used))):
            refuse_selection(node, "the selected rows are indexed in a way that is not understood")
        coordinates = [f[0] for f in found if f is not None]
        frame = coordinates[0].frame
        sizes, mask = shape_of(value), shape_of(frame.mask)
        for axis, coordinate in zip(used, coordinates, strict=True):
            if coordinate.frame is not frame or sizes[axis] != mask[coordinate.axis]:
                refuse_selection(node, "rows are selected by the numbers of other rows")
        return used[0], coordinates

    # --- and back --------------------------------------------------------------------------------

    def _put_back(self, node: fx.Node) -> None:
        bound = arguments(node)
        into: fx.Node = bound["self"]
        if "indices" in bound:
            indices, values = list(bound["indices"]), bound["values"]
            adds = bool(bound["accumulate"])
        else:
            axis = bound["dim"] % len(shape_of(into))
            indices, values = [None] * axis + [bound["index"]], bound["source"]
            adds = node.target is aten.index_add.default
        first, found = self._coordinates_of(node, into, indices)
        frame = found[0].frame
        order = [c.axis for c in found]
        by_slot = len(shape_of(frame.mask)) == 2 and sorted(order) == [0, 1]
        if frame.slot_axis is not None and by_slot:
            self._put_slot(node, into, values, frame, first, order, adds=adds)
            return
        if order != list(frame.row_axes):
            if frame.slot_axis is not None or not adds or order != sorted(set(order)):
                refuse_selection(node, "rows go back to other places than they were taken from")
            self._add_back(node, into, values, frame, first, order)
            return
        rows = self.build.rows(into, frame, first)
        after = len(shape_of(rows)) - first - 1
        values = self._aligned(node, values, frame, after)
        mask = self.build.before(frame.row_mask, after)
        if adds:
            kept = self.build.call(aten.where.ScalarOther, mask, values, 0)
            alpha = {"alpha": bound["alpha"]} if bound.get("alpha", 1) != 1 else {}
            new = self.build.call(aten.add.Tensor, rows, kept, **alpha)
        else:
            new = self.build.call(aten.where.self, mask, values, rows)
        new.meta[EVERY_ROW] = True
        if len(frame.row_axes) > 1:
            new = self.build.call(aten.reshape.default, new, self.build.sizes(into))
        self._is_back(node, new, into, frame)

    def _put_slot(
        self,
        node: fx.Node,
        into: fx.Node,
        values: Any,
        frame: Frame,
        first: int,
        order: Sequence[int],
        *,
        adds: bool,
    ) -> None:
        """Puts each row at the one slot of its own where the mask holds."""
        after = len(shape_of(into)) - first - 2
        given = self._aligned(node, values, frame, after)
        if values in self.dense:
            assert frame.slot_axis is not None
            at = len(shape_of(given)) - after - 1 + order.index(frame.slot_axis)
            given = self.build.call(aten.unsqueeze.default, given, at)
        mask = self.build.call(aten.permute.default, frame.truth, list(order))
        mask = self.build.before(mask, after)
        if adds:
            given = self.build.call(aten.where.ScalarOther, mask, given, 0)
            new = self.build.call(aten.add.Tensor, into, given)
        else:
            new = self.build.call(aten.where.self, mask, given, into)
        new.meta[EVERY_ROW] = True
        self._is_back(node, new, into, frame)

    def _add_back(
        self,
        node: fx.Node,
        into: fx.Node,
        values: Any,
        frame: Frame,
        first: int,
        order: Sequence[int],
    ) -> None:
        """Adds what a token's slots give, of which several may have been selected."""
        after = len(shape_of(into)) - first - len(order)
        values = self._aligned(node, values, frame, after)
        mask = self.build.before(frame.row_mask, after)
        kept = self.build.call(aten.where.ScalarOther, mask, values, 0)
        at = len(shape_of(kept)) - after - 1
        by_slot = self.build.sizes(kept)
        by_slot[at : at + 1] = self.build.sizes(frame.mask)
        kept = self.build.call(aten.reshape.default, kept, by_slot)
        slots = [at + axis for axis in frame.row_axes if axis not in order]
        kept = self.build.call(aten.sum.dim_IntList, kept, slots)
        bound = arguments(node)
        alpha = {"alpha": bound["alpha"]} if bound.get("alpha", 1) != 1 else {}
        new = self.build.call(aten.add.Tensor, into, kept, **alpha)
        new.meta[EVERY_ROW] = True
        self._is_back(node, new, into, frame)

    def _is_back(self, node: fx.Node, new: fx.Node, into: fx.Node, frame: Frame) -> None:
        if shape_of(new) != shape_of(into) or new.meta["val"].dtype != into.meta["val"].dtype:
            refuse_selection(node, "the rows that are put back have another shape")
        new.meta[ADDS] = (into, frame.mask)
        node.replace_all_uses_with(new)

    def _aligned(self, node: fx.Node, values: Any, frame: Frame, after: int) -> Any:
        if values not in self.dense:
            if _counts(values):
                refuse_selection(node, "other rows are put back than were selected")
            return values
        from fxport.passes.axes import Axis

        axes = self.axes[values]
        at = [i for i, dim in enumerate(axes) if dim == (Axis.TOKEN,)]
        if self.of[values].rows != frame.rows or at != [len(axes) - 1 - after]:
            refuse_selection(node, "other rows are put back than were selected")
        return self.dense[values]

    # --- in between ------------------------------------------------------------------------------

    def _row_by_row(self, node: fx.Node) -> None:
        """The same call on all rows, once it is proven to treat each on its own."""
        args, kwargs = fx.node.map_arg(
            (node.args, dict(node.kwargs)), lambda n: self.dense.get(n, n)
        )
        if not _values(node):
            self.dense[node] = self._size(node, args)
            return
        frames = {self.of[i].rows: self.of[i] for i in node.all_input_nodes if i in self.of}
        if not frames:
            refuse_selection(node, "the number of selected tokens enters the computation")
        if len(frames) > 1:
            refuse_selection(node, "rows of different selections are combined")
        frame = next(iter(frames.values()))
        counts = _counts(node)
        if len(counts) != 1:
            refuse_selection(node, "the selected tokens are mixed here")
        axes = self._proven(node, next(iter(counts)))
        if node.target is operator.getitem:
            self._now(node, self.dense[node.args[0]], frame, axes)  # type: ignore[index]
            self.dense[node] = self.build.call(operator.getitem, *args)
        else:
            self._now(node, self.build.call(node.target, *args, **kwargs), frame, axes)

    def _size(self, node: fx.Node, args: Any) -> Any:
        if node.target is aten.sym_size.int:
            return self.build.size(args[0], args[1])
        if not any(isinstance(a, fx.Node) for a in args):
            return node.target(*args)  # type: ignore[operator]
        return self.build.call(node.target, *args)

    def _proven(self, node: fx.Node, count: sympy.Symbol) -> Any:
        """The axes of a result: the rules of token locality with the rows as tokens."""
        from fxport.passes.axes import Refusal, Symbols
        from fxport.passes.tokens.rules import propagate

        symbols = Symbols(sympy.Symbol("_no_batch"), count)
        try:
            if node.target is operator.getitem:
                return self.axes[node.args[0]][node.args[1]]  # type: ignore[index]
            known = {}
            for other in node.all_input_nodes:
                if other in self.axes:
                    known[other] = self.axes[other]
                elif _values(other):
                    known[other] = tuple(symbols.factor(size) for size in shape_of(other))
            return propagate(node, known, symbols)
        except Refusal as refusal:
            message = f"among the tokens selected here: {refusal.message}"
            reason = Reason(refusal.code, message, user_location(node), refusal.hint)
            raise PortError([reason]) from refusal

    def _now(self, node: fx.Node, dense: fx.Node, frame: Frame, axes: Any) -> None:
        self.dense[node], self.axes[node], self.of[node] = dense, axes, frame
