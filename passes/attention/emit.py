"""Builds nodes: layout changes between dimensions, sizes, and their ``meta["val"]``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from fxport.capture.arguments import shape_of
from fxport.errors import ReasonCode
from fxport.passes.attention.frame import Axes, Frame, Recipe
from fxport.passes.attention.layout import Axis, Dims, Size, product, resolve, resolve_all
from fxport.passes.attention.site import Left
from fxport.passes.attention.trace import Step

__all__ = ["Emitter"]

aten = torch.ops.aten

_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


class Emitter:
    """Inserts nodes before one node of a graph.

    Args:
        gm: the module of the graph.
        anchor: new nodes go before it, and count as made by the same line of the user's code.
        values: nodes in whose shapes the symbolic sizes are looked up.
    """

    def __init__(self, gm: fx.GraphModule, anchor: fx.Node, values: Iterable[fx.Node]) -> None:
        self.gm = gm
        self.anchor = anchor
        self._values = tuple(values)
        self._sizes: dict[Size, fx.Node] = {}
        self.made: list[fx.Node] = []
        made = tree_leaves([n.meta.get("val") for n in (anchor, *self._values)])
        self._mode = next((v.fake_mode for v in made if isinstance(v, FakeTensor)), None)

    @property
    def fake_mode(self) -> FakeTensorMode:
        assert self._mode is not None
        return self._mode

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call, with its fake value in ``meta["val"]``."""
        with self.gm.graph.inserting_before(self.anchor):
            node = self.gm.graph.call_function(target, args, kwargs)
        node.meta = {k: self.anchor.meta[k] for k in _PROVENANCE if k in self.anchor.meta}
        given, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        assert self._mode is not None
        with torch.no_grad(), self._mode:
            node.meta["val"] = target(*given, **named)
        self.made.append(node)
        return node

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """A tensor stored with the graph, equal ones once."""
        for known, stored in self.gm.named_buffers(recurse=False):
            same = stored.dtype == value.dtype and known.startswith(f"_fxport_{name}")
            if same and torch.equal(stored, value):
                break
        else:
            known = f"_fxport_{name}_{len(list(self.gm.named_buffers(recurse=False)))}"
            self.gm.register_buffer(known, value, persistent=False)
        with self.gm.graph.inserting_before(self.anchor):
            node = self.gm.graph.get_attr(known)
        assert self._mode is not None
        node.meta["val"] = self._mode.from_tensor(value, static_shapes=True)
        self.made.append(node)
        return node

    def for_each_head(self, name: str, value: torch.Tensor, frame: Frame) -> fx.Node:
        """A stored number for each head, ``[Hq]``, or one for all, ``[1]``, as ``[Hq]``.

        Raises:
            Left: there are several numbers, and how many heads is not known.
        """
        heads = product(frame.heads)
        if isinstance(heads, int):
            return self.constant(name, value.expand(heads).contiguous())
        if len(value) > 1:
            message = "a number for each head is added, where the number of heads may change"
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, message, self.anchor)
        one = self.constant(name, value)
        return self.call(aten.repeat.default, one, [self.size(heads)])

    def undo(self) -> None:
        """Takes everything back."""
        for node in reversed(self.made):
            self.gm.graph.erase_node(node)
        self.made.clear()

    def size(self, size: Size) -> int | fx.Node:
        """A number, or a node that computes it.

        Raises:
            Left: no value of the attention has a dimension of this size.
        """
        if isinstance(size, int) or size.is_Integer:
            return int(size)
        if size not in self._sizes:
            self._sizes[size] = self._find_size(size)
        return self._sizes[size]

    def _find_size(self, size: sympy.Expr) -> fx.Node:
        for value in self._values:
            shape = shape_of(value)
            if size in shape:
                return self.call(aten.sym_size.int, value, shape.index(size))
        if size.is_Mul or size.is_Add:
            operation = operator.mul if size.is_Mul else operator.add
            parts = [self.size(part) for part in size.args]
            result = parts[0]
            for part in parts[1:]:
                result = self.call(operation, result, part)
            assert isinstance(result, fx.Node)
            return result
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, f"the size {size} is not to be found")

    def sizes(self, sizes: Sequence[Size]) -> list[int | fx.Node]:
        return [self.size(s) for s in sizes]

    # -- layout ----------------------------------------------------------------------------------

    def operand(self, trace: tuple[Step, ...], wanted: Sequence[Axes], dtype: torch.dtype) -> Any:
        """The operand with dimensions `wanted`, and the number that it still must be scaled by.

        Starts from the value on the way to the operand that needs the fewest layout operations.
        """
        needed = [axis for group in wanted for axis in group]
        choices = []
        for index, step in enumerate(trace):
            dims = resolve_all(step.dims)
            if any(f.repeated and f.axis not in needed for d in dims for f in d):
                continue
            cast = step.node.meta["val"].dtype != dtype
            choices.append((cast, self._cost(dims, wanted), index))
        step = trace[min(choices)[2] if choices else 0]
        node, have = step.node, _axes(step.dims)
        if not choices:
            node, have = self._once(step, needed)
        if node.meta["val"].dtype != dtype:
            node = self.call(aten.to.dtype, node, dtype)
        return self.relayout(node, have, wanted), step.factor

    def _once(self, step: Step, needed: Sequence[Axis]) -> tuple[fx.Node, list[Axes]]:
        """A value that was computed from repeated ones, without the copies."""
        flat = [f for dim in resolve_all(step.dims) for f in dim]
        node = self.call(aten.reshape.default, step.node, self.sizes([f.axis.size for f in flat]))
        gone = [i for i, f in enumerate(flat) if f.repeated and f.axis not in needed]
        for index in reversed(gone):
            node = self.call(aten.select.int, node, index, 0)
        return node, [(f.axis,) for i, f in enumerate(flat) if i not in gone]

    @staticmethod
    def _cost(dims: Dims, wanted: Sequence[Axes]) -> int:
        have = _axes(dims)
        if have == list(wanted):
            return 0
        return 1 if sorted(map(_key, have)) == sorted(map(_key, wanted)) else 3

    def relayout(self, node: fx.Node, have: Sequence[Axes], wanted: Sequence[Axes]) -> fx.Node:
        """Brings dimensions `have` to `wanted`; axes that are missing are expanded along."""
        have, wanted = list(have), list(wanted)
        if have == wanted:
            return node
        if sorted(map(_key, have)) == sorted(map(_key, wanted)) and have.count(()) <= 1:
            return self._permute(node, [have.index(group) for group in wanted])
        flat = [axis for group in have for axis in group]
        if any(len(group) != 1 for group in have):
            node = self.call(aten.view.default, node, self.sizes([a.size for a in flat]))
        target = [axis for group in wanted for axis in group]
        order = [flat.index(axis) for axis in target if axis in flat]
        if sorted(order) != list(range(len(flat))):
            raise Left(
                ReasonCode.UNSUPPORTED_FEATURE,
                "an axis of this operand is several axes of the attention (windows that overlap)",
                node,
            )
        node = self._permute(node, order)
        missing = [axis for axis in target if axis not in flat]
        if missing:
            ones: list[Size] = [1 if a in missing else a.size for a in target]
            node = self.call(aten.view.default, node, self.sizes(ones))
            node = self.call(aten.expand.default, node, self.sizes([a.size for a in target]))
        if any(len(group) != 1 for group in wanted):
            shape = self.sizes([product(group) for group in wanted])
            node = self.call(aten.reshape.default, node, shape)
        return node

    def _permute(self, node: fx.Node, order: Sequence[int]) -> fx.Node:
        moved = [i for i, j in enumerate(order) if i != j]
        if not moved:
            return node
        if len(moved) == 2:
            return self.call(aten.transpose.int, node, *moved)
        return self.call(aten.permute.default, node, list(order))

    def follow(self, node: fx.Node, how: Recipe) -> fx.Node:
        """Applies a recipe for a mask."""
        if how.split is None:
            return node
        if shape_of(node) != how.split:
            node = self.call(aten.reshape.default, node, self.sizes(how.split))
        node = self._permute(node, how.order)
        if shape_of(node) != how.expand:
            node = self.call(aten.expand.default, node, self.sizes(how.expand))
        if shape_of(node) != how.merged:
            node = self.call(aten.reshape.default, node, self.sizes(how.merged))
        return node


def _axes(dims: Dims) -> list[Axes]:
    return [tuple(f.axis for f in resolve(dim)) for dim in dims]


def _key(group: Axes) -> tuple[int, ...]:
    return tuple(id(axis) for axis in group)
