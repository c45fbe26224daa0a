"""What a captured graph says about a mask: when it is empty, where it holds one True at most.

    (chosen == 3).any()                         true unless the mask `chosen == 3` is empty
    one_hot(chosen, 8).permute(2, 1, 0)[3]      the same mask, in another arrangement
    (chosen[..., None] == arange(8))[..., 3]    again
    bincount(chosen.flatten())[3] > 0           the same question

Two expressions with the same `Emptiness` are all False together.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments

__all__ = [
    "ZEROS",
    "Emptiness",
    "class_count",
    "distinct_along",
    "emptiness",
    "index_bound",
    "one_true_along",
    "question",
    "rows_source",
    "values_of",
]

aten = torch.ops.aten


@dataclass(frozen=True)
class Emptiness:
    """All elements of a node are zero exactly when ``node == constant`` holds nowhere.

    Attributes:
        node: what is compared; with no constant, the mask itself.
        constant: the value looked for.
        class_axis: the node's axis that counts constants (one_hot, bincount): one answer each.
    """

    node: fx.Node
    constant: int | None = None
    class_axis: int | None = None

    def of_class(self, constant: int) -> Emptiness:
        """The answer for one constant of the class axis."""
        return Emptiness(self.node, constant)


# Keep the values and their row-major order.
_SAME_ORDER = (
    aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.unsqueeze, aten.squeeze,
    aten.contiguous, aten.clone, aten.alias, aten.detach, aten._unsafe_view,
)  # fmt: skip
_CASTS = (aten.to, aten._to_copy, aten.type_as)
_SCATTERS = (aten.scatter.value, aten.scatter_.value)
ZEROS = (aten.zeros, aten.zeros_like, aten.new_zeros)
_ANDS = (aten.logical_and, aten.bitwise_and, aten.mul)
_COMPARES = (aten.gt, aten.greater, aten.ne, aten.not_equal, aten.ge, aten.greater_equal)


def _packet(node: fx.Node) -> Any:
    target = node.target
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def _source(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _whole(node: fx.Node) -> bool:
    """Whether casting the node to bool keeps what is zero: counts and masks, no fractions."""
    return not (node.meta["val"].is_floating_point() or node.meta["val"].is_complex())


def rows_source(mask: fx.Node) -> fx.Node:
    """A mask with as many True values in the same order; equal nodes select equal rows."""
    node = mask
    while node.op == "call_function":
        if _packet(node) in _SAME_ORDER:
            node = _source(node)
        elif _packet(node) is aten.any and "dim" in arguments(node):
            source = _source(node)
            last = _rank(source) - 1
            dims = arguments(node)["dim"]
            if dims not in (last, -1, [last], [-1]) or one_true_along(source) != last:
                return node
            node = source
        else:
            return node
    return node


def values_of(node: fx.Node) -> fx.Node:
    """Through views, orders and copies: the same integers."""
    moves = (aten.permute, aten.transpose, aten.t, aten.movedim, aten.to, aten._to_copy)
    while node.op == "call_function" and _packet(node) in (*_SAME_ORDER, *moves):
        if not (_whole(node) and _whole(_source(node))) or node.meta["val"].dtype == torch.bool:
            return node
        node = _source(node)
    return node


# --- emptiness -----------------------------------------------------------------------------------


def emptiness(node: fx.Node) -> Emptiness | None:
    """When every element of a mask, or of a count made of one, is zero; None if not known."""
    found = _emptiness(node)
    # A single truth value is no mask: what it asks is plain control flow.
    is_mask = node.meta["val"].dtype == torch.bool and _rank(node) > 0
    return Emptiness(node) if found is None and is_mask else found


def _emptiness(node: fx.Node) -> Emptiness | None:
    if (picked := _picked(node)) is not None:
        source, axis, index = picked
        found = emptiness(source)
        return found.of_class(index) if found is not None and axis == found.class_axis else None
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    bound, packet = arguments(node), _packet(node)
    if packet is aten.one_hot:
        return Emptiness(values_of(bound["self"]), None, _rank(node) - 1)
    if packet is aten.bincount:
        return Emptiness(values_of(bound["self"]), None, 0) if not bound["weights"] else None
    if node.target in _SCATTERS:
        return _scattered(node)
    if packet is aten.eq and isinstance(bound["other"], int) and _whole(bound["self"]):
        return Emptiness(values_of(bound["self"]), bound["other"])
    if packet is aten.eq and _counts_classes(bound["self"], bound["other"]):
        return Emptiness(values_of(bound["self"]), None, _rank(node) - 1)
    if not node.all_input_nodes:
        return None
    found = emptiness(_source(node))
    if found is None:
        return None
    if _is_every(node):
        return found
    if packet in _SAME_ORDER or packet in (aten.permute, aten.transpose, aten.t, aten.movedim):
        return found if found.class_axis is None else _moved(node, found)
    if packet in _CASTS:
        return found if _counts(_source(node)) else None
    if packet in _COMPARES:
        least = 1 if packet in (aten.ge, aten.greater_equal) else 0
        return found if bound["other"] == least and _whole(_source(node)) else None
    if packet in (aten.any, aten.sum):
        return _reduced(node, found)
    if packet is aten.slice and found.class_axis == bound["dim"] % _rank(node):
        start, end = bound["start"] or 0, bound["end"]
        one = isinstance(start, int) and end == start + 1 and start >= 0
        return found.of_class(start) if one else None
    return None


def _scattered(node: fx.Node) -> Emptiness | None:
    """``zeros(N, E).scatter(1, chosen, 1)``: not zero where any row chose."""
    bound, last = arguments(node), _rank(node) - 1
    zeros, index, value = bound["self"], bound["index"], bound["value"]
    fits = _packet(zeros) in ZEROS and len(zeros.users) == 1 and bound["dim"] % (last + 1) == last
    ones = type(value) is int and value == 1
    return Emptiness(values_of(index), None, last) if fits and ones else None


def _counts(node: fx.Node) -> bool:
    """Whether these are whole numbers from zero on, by their type or as sums of scattered ones."""
    while not _whole(node) and _packet(node) in (*_CASTS, *_SAME_ORDER, aten.sum):
        node = _source(node)
    return _whole(node) or node.target in _SCATTERS


def _is_every(node: fx.Node) -> bool:
    """``(chosen == 3) & ones``: what it was, as nothing is taken out."""
    if _packet(node) not in _ANDS or _dtype(node) != torch.bool:
        return False
    mask, kept = arguments(node)["self"], arguments(node)["other"]
    both = isinstance(kept, fx.Node) and _dtype(mask) == _dtype(kept) == torch.bool
    return both and mask.meta["val"].shape == node.meta["val"].shape and _all_true(kept)


def _all_true(node: fx.Node) -> bool:
    while node.op == "call_function" and _packet(node) in (*_SAME_ORDER, aten.expand):
        node = _source(node)
    if _packet(node) in (aten.ones, aten.ones_like, aten.new_ones):
        return True
    fills = _packet(node) in (aten.full, aten.full_like, aten.new_full)
    return fills and arguments(node)["fill_value"] is True


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _counts_classes(value: fx.Node, other: Any) -> bool:
    """``chosen.unsqueeze(-1) == arange(E)``: a one-hot by hand."""
    is_range = isinstance(other, fx.Node) and other.target is aten.arange.default
    return is_range and _whole(value) and bool(value.meta["val"].shape[-1:] == (1,))


def _picked(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """One entry of an axis, by `select` or out of `unbind`: source, axis, index."""
    made = node
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        made = node.args[0]
        if _packet(made) is not aten.unbind:
            return None
    elif node.target is not aten.select.int:
        return None
    source = _source(made)
    index = arguments(made)["index"] if made is node else node.args[1]
    if not isinstance(index, int) or index < 0:
        return None
    return source, arguments(made)["dim"] % _rank(source), index


def _moved(node: fx.Node, found: Emptiness) -> Emptiness | None:
    """Where the class axis is after a permutation or an added axis; None for other views."""
    bound, packet = arguments(node), _packet(node)
    rank, axis = _rank(node), found.class_axis
    assert axis is not None
    if packet is aten.permute:
        order = [d % rank for d in bound["dims"]]
        return replace(found, class_axis=order.index(axis))
    if node.target is aten.transpose.int:
        one, other = bound["dim0"] % rank, bound["dim1"] % rank
        return replace(found, class_axis={one: other, other: one}.get(axis, axis))
    if packet is aten.t:
        return replace(found, class_axis=rank - 1 - axis)
    if packet is aten.unsqueeze:
        return replace(found, class_axis=axis + (bound["dim"] % rank <= axis))
    if node.target is aten.squeeze.dim:
        return replace(found, class_axis=axis - (bound["dim"] % (rank + 1) < axis))
    copies = (aten.contiguous, aten.clone, aten.alias, aten.detach)
    return found if packet in copies else None


def _reduced(node: fx.Node, found: Emptiness) -> Emptiness | None:
    """A sum of counts, or `any`, over all axes but that of the classes."""
    if not _counts(_source(node)):
        return None
    rank = _rank(_source(node))
    given = arguments(node).get("dim")
    dims = [given] if isinstance(given, int) else list(given or range(rank))
    reduced = {d % rank for d in dims}
    if found.class_axis is None:
        return found
    if found.class_axis in reduced:
        return None
    if arguments(node).get("keepdim", False):
        return found
    return replace(found, class_axis=found.class_axis - sum(d < found.class_axis for d in reduced))


def class_count(node: fx.Node) -> int | None:
    """How long a ``bincount(chosen, minlength=E)`` is: E, where `chosen` are indices below E."""
    if _packet(node) is not aten.bincount:
        return None
    least, bound = arguments(node)["minlength"], index_bound(values_of(arguments(node)["self"]))
    return least if bound is not None and bound <= least else None


def index_bound(node: fx.Node) -> int | None:
    """What integers stay below, if they are indices out of topk, sort or max; else None."""
    if node.target is not operator.getitem or node.args[1] != 1:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if _packet(source) not in (aten.topk, aten.sort, aten.max):
        return None
    given = arguments(source)
    size = given["self"].meta["val"].shape[given["dim"]] if "dim" in given else None
    return size if isinstance(size, int) else None


def question(node: fx.Node) -> tuple[Emptiness, bool] | None:
    """What a truth value asks, and its value when that is empty; None if it asks nothing known."""
    packet = _packet(node)
    if packet in (aten.logical_not, aten.bitwise_not) and node.meta["val"].dtype == torch.bool:
        found = question(_source(node))
        return None if found is None else (found[0], not found[1])
    least = {aten.eq: 0, aten.le: 0, aten.lt: 1}.get(packet)
    if least is not None and arguments(node)["other"] == least and _whole(_source(node)):
        counted = emptiness(_source(node))
        if counted is not None and counted.class_axis is None:
            return counted, True
    asked = emptiness(node)
    return None if asked is None or asked.class_axis is not None else (asked, False)


# --- at most one True ----------------------------------------------------------------------------


def one_true_along(mask: fx.Node) -> int | None:
    """An axis of a mask along which at most one element is True, as no token chooses twice."""
    if (picked := _picked(mask)) is not None:
        source, dim, _ = picked
        axis = one_true_along(source)
        return None if axis is None or axis == dim else axis - (dim < axis)
    if mask.op != "call_function" or not isinstance(mask.target, torch._ops.OpOverload):
        return None
    packet, bound = _packet(mask), arguments(mask)
    if packet is aten.eq and isinstance(bound["other"], int):
        return distinct_along(bound["self"])
    if packet is aten.eq:
        return _equal_along(mask, bound["self"], bound["other"])
    if packet is aten.one_hot:
        return distinct_along(bound["self"])
    if packet is aten.slice:  # along another axis, or a part along this one
        return one_true_along(bound["self"])
    if packet in _ANDS and mask.meta["val"].dtype == torch.bool:
        same = bound["self"].meta["val"].shape == mask.meta["val"].shape
        return one_true_along(bound["self"]) if same else None  # fewer are True
    if packet in (*_COMPARES, *_CASTS):
        if packet in _COMPARES and ("equal" in str(packet) or bound["other"] != 0):
            return None
        return one_true_along(_source(mask))
    return _axis_after(mask, one_true_along)


def _equal_along(mask: fx.Node, value: fx.Node, other: fx.Node) -> int | None:
    """Distinct values compared with what does not change along their axis."""
    axis = distinct_along(value)
    if axis is None:
        return None
    back = _rank(value) - axis  # counted from the end, as sizes are broadcast
    size = other.meta["val"].shape[-back] if _rank(other) >= back else 1
    return _rank(mask) - back if isinstance(size, int) and size == 1 else None


def distinct_along(node: fx.Node) -> int | None:
    """An axis of integers along which no value occurs twice: indices of topk, sort, argsort."""
    if node.target is operator.getitem:
        made, which = node.args
        assert isinstance(made, fx.Node)
        if which == 1 and _packet(made) in (aten.topk, aten.sort):
            return int(arguments(made)["dim"]) % _rank(node)
        return None
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if _packet(node) is aten.argsort:
        return int(arguments(node)["dim"]) % _rank(node)
    if _packet(node) in (aten.slice, aten.narrow, aten.to, aten._to_copy):
        return distinct_along(_source(node)) if _whole(node) else None
    return _axis_after(node, distinct_along)


def _axis_after(node: fx.Node, of: Any) -> int | None:
    """Follows an axis through permutations, and through views that keep the last axis."""
    packet = _packet(node)
    moves = (aten.permute, aten.transpose, aten.t, aten.unsqueeze)
    if packet not in (*_SAME_ORDER, *moves):
        return None
    source = _source(node)
    axis: int | None = of(source)
    if axis is None:
        return None
    if (
        packet in moves
        or node.target is aten.squeeze.dim
        or packet in (aten.contiguous, aten.clone, aten.alias, aten.detach)
    ):
        moved = _moved(node, Emptiness(node, None, axis))
        return None if moved is None else moved.class_axis
    is_last = axis == _rank(source) - 1
    before, after = source.meta["val"].shape[-1], node.meta["val"].shape[-1]
    same = isinstance(before, int) and isinstance(after, int) and before == after
    return _rank(node) - 1 if is_last and same else None
