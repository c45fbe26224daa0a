"""What is padded at its end, and cut back, of the tokens alone.

Before, at T = 37                                     After
    p = pad(ids [B, 37], (0, 27))
    y = model(p) [B, 64, V]
    slice(y, 1, 0, 37)                                    model(ids)

Goes up from the cut: each step on the way is done for the first T entries, where it keeps the
entries apart (see `along`). Attention to later keys is left out where they are masked: by the
values of the mask, at this very length. If any of the padding is still needed then, all stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.whole.along import KEEPING, along, rank_of
from fxport.capture.whole.emit import again, call
from fxport.capture.whole.hidden import Values, is_made_of

__all__ = ["padded_lengths", "without_padding"]

aten = torch.ops.aten


def without_padding(gm: fx.GraphModule, length: int) -> int:
    """Rewrites a graph of plain sizes in place; returns how many cuts went."""
    if not padded_lengths(gm, length):
        return 0
    gone = 0
    for cut in gm.graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        given = arguments(cut)
        dim = given["dim"] % rank_of(cut)
        cuts = given["start"] in (0, None) and given["step"] == 1
        if cuts and shape_of(cut)[dim] == length < shape_of(given["self"])[dim]:
            gone += _without(gm, cut, given["self"], dim, length)
    if gone:
        gm.graph.eliminate_dead_code()
    return gone


def padded_lengths(gm: fx.GraphModule, length: int) -> set[int]:
    """How long what is `length` long is made by padding."""
    return {
        shape_of(node)[dim]
        for node in gm.graph.nodes
        for dim in _axes(node)
        if _padded(node, dim, length) is not None
    }


def _without(gm: fx.GraphModule, cut: fx.Node, padded: fx.Node, dim: int, length: int) -> bool:
    narrow = _Narrow(gm, length)
    try:
        found = narrow.first(padded, dim)
    except _Stop:
        found = None
    if found is None or not narrow.met or not narrow.is_clean(found):
        for node in reversed(narrow.made):
            gm.graph.erase_node(node)
        return False
    cut.replace_all_uses_with(found)
    return True


def _axes(node: fx.Node) -> range:
    value = node.meta.get("val")
    return range(value.dim()) if isinstance(value, Tensor) else range(0)


def _padded(node: fx.Node, dim: int, length: int) -> fx.Node | None:
    """What has `length` entries along the axis and was padded at their end, there alone."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet in (aten.pad, aten.constant_pad_nd):
        given = arguments(node)
        source, pad = given["self"], list(given["pad"])
        at = 2 * (rank_of(node) - 1 - dim) + 1
        alone = at < len(pad) and pad[at] > 0 and not any(p for i, p in enumerate(pad) if i != at)
        constant = packet is aten.constant_pad_nd or given["mode"] == "constant"
        return source if alone and constant and shape_of(source)[dim] == length else None
    if packet is aten.cat and arguments(node)["dim"] % rank_of(node) == dim:
        first = arguments(node)["tensors"][0]
        same = rank_of(first) == rank_of(node) and shape_of(first)[dim] == length
        longer = shape_of(node)[dim] > length
        alike = first.meta["val"].dtype == node.meta["val"].dtype
        return first if same and longer and alike else None
    return None


class _Stop(Exception):
    """A step mixes the entries, or nothing is known of it."""


class _Narrow:
    """
    Attributes:
        made: every node that was added.
        met: the padding that was left out.
    """

    def __init__(self, gm: fx.GraphModule, length: int) -> None:
        self._length = length
        self._values = Values(gm.graph)
        self._constant = _constants(gm)
        self._known: dict[tuple[fx.Node, int], fx.Node] = {}
        self.made: list[fx.Node] = []
        self.met: set[fx.Node] = set()

    def first(self, node: fx.Node, dim: int) -> fx.Node:
        """The first T entries along an axis of more."""
        if (node, dim) not in self._known:
            if self._values.is_written(node):
                raise _Stop
            self._known[node, dim] = self._found(node, dim)
        return self._known[node, dim]

    def is_clean(self, result: fx.Node) -> bool:
        """Whether nothing padded is left in what the result is made of."""
        return not is_made_of(result, self.met)

    def _found(self, node: fx.Node, dim: int) -> fx.Node:
        source = _padded(node, dim, self._length)
        if source is not None:
            self.met.add(node)
            return source
        if node in self._constant or node.op == "placeholder":
            return self._cut(node, dim)
        if node.target is aten.slice.Tensor:
            given = arguments(node)
            if given["dim"] % rank_of(node) == dim:
                if given["start"] not in (0, None) or given["step"] != 1:
                    raise _Stop
                return self._shorter(given["self"], dim)
        packet = getattr(node.target, "overloadpacket", None)
        if packet is aten.softmax and arguments(node)["dim"] % rank_of(node) == dim:
            return self._softmax(node, dim)
        if packet in (aten.matmul, aten.bmm) and rank_of(node) > 2:
            found = self._weighted(node, dim)
            if found is not None:
                return found
        if packet is aten.scaled_dot_product_attention and dim == rank_of(node) - 2:
            return self._attention(node, dim)
        return self._step(node, dim)

    def _step(self, node: fx.Node, dim: int) -> fx.Node:
        sources = along(node, dim)
        if sources is None:
            raise _Stop
        given = arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
        values = given or {"0": node.args[0]}
        other = {k: self._operand(values[k], axis) for k, axis in sources.items()}
        return self._add(again(node, other, {dim: self._length}))

    def _operand(self, value: Any, axis: Any) -> Any:
        if isinstance(value, list | tuple):
            axes = axis if isinstance(axis, list) else [axis] * len(value)
            return [self._operand(v, a) for v, a in zip(value, axes, strict=True)]
        return value if axis is None else self.first(value, axis)

    def _shorter(self, source: fx.Node, dim: int) -> fx.Node:
        if shape_of(source)[dim] == self._length:
            return source
        return self.first(source, dim)

    def _cut(self, node: fx.Node, dim: int) -> fx.Node:
        """Before whoever comes first of those that take it."""
        at = min(node.users)
        return self._add(call(at, aten.slice.Tensor, (node, dim, 0, self._length), {}))

    # --- attention --------------------------------------------------------------------------------

    def _softmax(self, node: fx.Node, dim: int) -> fx.Node:
        """Over keys: what is left out had the weight 0."""
        scores = arguments(node)["self"]
        rows, keys = shape_of(node)[-2:]
        if dim != rank_of(node) - 1 or rows != self._length:
            raise _Stop
        later = (torch.arange(keys) >= self._length).expand(rows, keys)
        if not self._values.hide(scores, later):
            raise _Stop
        return self._add(again(node, {"self": self.first(scores, dim)}, {dim: self._length}))

    def _weighted(self, node: fx.Node, dim: int) -> fx.Node | None:
        """``weights @ values``, both of the first T keys; None where this is another product."""
        names = [k for k, v in arguments(node).items() if isinstance(v, fx.Node)]
        left, right = (arguments(node)[name] for name in names)
        last = rank_of(left) - 1
        if dim != rank_of(node) - 2 or shape_of(left)[-1] != shape_of(node)[dim]:
            return None
        weights = self.first(left, last - 1)
        if not _is_softmax(weights):
            return None
        given = {
            names[0]: self.first(weights, last),
            names[1]: self.first(right, rank_of(right) - 2),
        }
        return self._add(again(node, given, {dim: self._length}))

    def _attention(self, node: fx.Node, dim: int) -> fx.Node:
        given = arguments(node)
        rows, keys = shape_of(given["query"])[-2], shape_of(given["key"])[-2]
        mask = given["attn_mask"]
        other = {}
        if mask is not None:
            value = self._values.of(mask)
            if value is None or tuple(value.shape[-2:]) != (rows, keys):
                raise _Stop
            hidden = ~value if value.dtype == torch.bool else value == float("-inf")
            if not bool(hidden[..., : self._length, self._length :].all()):
                raise _Stop
            last = rank_of(mask) - 1
            other["attn_mask"] = self.first(self.first(mask, last - 1), last)
        elif not given["is_causal"] or rows != keys:
            raise _Stop
        for name in ("query", "key", "value"):
            other[name] = self.first(given[name], rank_of(given[name]) - 2)
        return self._add(again(node, other, {dim: self._length}))

    def _add(self, node: fx.Node | None) -> fx.Node:
        if node is None:
            raise _Stop
        self.made.append(node)
        return node


def _is_softmax(weights: fx.Node) -> bool:
    """Whether these are the weights of a softmax over the last axis, and nothing else."""
    while getattr(weights.target, "overloadpacket", None) in KEEPING:
        weights = weights.all_input_nodes[0]
    if getattr(weights.target, "overloadpacket", None) is not aten.softmax:
        return False
    return bool(arguments(weights)["dim"] % rank_of(weights) == rank_of(weights) - 1)


def _constants(gm: fx.GraphModule) -> set[fx.Node]:
    """What depends on neither tokens nor parameters."""
    from fxport.capture.inputs import InputKind, graph_input

    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            known = graph_input(node).kind is InputKind.BUFFER
        else:
            known = all(n in found for n in node.all_input_nodes)
        if known and node.op != "output":
            found.add(node)
    return found
