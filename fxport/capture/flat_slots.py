"""Tokens and their slots in one vector, selected by one number: the token and its slot, apart.

Before (K slots of each of N tokens)                   After
    number, = where(flat [N * K] == e)      [u]        token, slot = where(chosen [N, K] == e)
    index(numbered [N * K], [number])                  token
    number // K                                        token
    number % K                                         slot
    any other use of it                                token * K + slot

K is how many slots of each token `numbered` counts (0, 0, 1, 1, .. for two), or what the number
is divided by where that divides the size of the mask. Masks are read row by row in either form,
so the selected ones come in the same order. What is left is for `fxport.capture.slot_numbers`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import sympy
import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.experts.tokens import slots_of_each_token
from fxport.capture.frames import Builder

__all__ = ["flat_slots_apart"]

aten = torch.ops.aten

_VIEWS = (aten.view, aten.reshape, aten._unsafe_view, aten.flatten)
# Leave numbers as they are.
_SAME = (*_VIEWS, aten.unsqueeze, aten.squeeze, aten.to, aten.clone, aten.contiguous, aten.alias)
_FLOORS = (aten.floor_divide, aten.div)


def flat_slots_apart(gm: fx.GraphModule) -> None:
    """Rewrites the graph in place."""
    build = Builder(gm.graph)
    changed = False
    for mask, selections in _by_mask(gm.graph).items():
        numbers = [number for where in selections for number in _numbers(where)]
        found = {k for number in numbers for user in number.users if (k := _slots(user, number))}
        slots = found.pop() if len(found) == 1 else 0
        if slots and _divides(slots, shape_of(mask)[0]):
            _apart(build, selections[0], numbers, slots)
            changed = True
    if changed:
        gm.graph.eliminate_dead_code()


def _by_mask(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Every vector that something is selected by, and where; the first is above all others."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for where in graph.nodes:
        if where.target is aten.where.default:
            mask = arguments(where)["condition"]
            if len(shape_of(mask)) == 1:
                found.setdefault(mask, []).append(where)
    return found


def _packet(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", None)


def _numbers(where: fx.Node) -> Iterator[fx.Node]:
    """The vector of numbers that a mask gives, under every name."""
    pending = [user for user in where.users if user.target is operator.getitem]
    while pending:
        node = pending.pop()
        if node.meta["val"].dtype is not torch.int64:
            continue
        if len(shape_of(node)) == 1:
            yield node
        pending += [user for user in node.users if _packet(user) in _SAME]


def _divides(slots: int, size: object) -> bool:
    return bool(sympy.Mod(size, slots) == 0)


def _slots(user: fx.Node, number: fx.Node) -> int | None:
    """K, where a use of a number asks for its token."""
    if (numbered := _looked_up(user, number)) is not None:
        return slots_of_each_token(numbered)
    if _packet(user) not in _FLOORS:
        return None
    given = arguments(user)
    by, floors = given["other"], given.get("rounding_mode", "floor") in ("floor", "trunc")
    return by if given["self"] is number and type(by) is int and by > 1 and floors else None


def _looked_up(user: fx.Node, number: fx.Node) -> fx.Node | None:
    """The vector, one entry for each element of the mask, that `user` takes entries of."""
    if user.target is aten.index.Tensor:
        given = arguments(user)
        taken = given["self"] if list(given["indices"]) == [number] else None
    elif user.target is aten.index_select.default:
        taken = arguments(user)["self"] if arguments(user)["index"] is number else None
    else:
        return None
    return taken if isinstance(taken, fx.Node) and len(shape_of(taken)) == 1 else None


def _apart(build: Builder, where: fx.Node, numbers: list[fx.Node], slots: int) -> None:
    build.at = where
    mask = arguments(where)["condition"]
    value = where.meta["val"][0]

    def made(target: object, *args: object) -> fx.Node:
        with build.graph.inserting_before(where):
            node = build.graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta = {**where.meta, "val": value}
        return node

    chosen = made(aten.where.default, _by_slot(build, mask, slots))
    chosen.meta["val"] = [value, value]
    token, slot = made(operator.getitem, chosen, 0), made(operator.getitem, chosen, 1)
    number = made(aten.add.Tensor, made(aten.mul.Tensor, token, slots), slot)
    size = shape_of(mask)[0]
    for old in numbers:
        for user in list(old.users):
            if _packet(user) in _SAME:
                continue
            taken = _looked_up(user, old)
            counts = taken is not None and shape_of(taken)[0] == size
            if _slots(user, old) == slots and (taken is None or counts):
                user.replace_all_uses_with(token)
            elif _packet(user) is aten.remainder and user.args == (old, slots):
                user.replace_all_uses_with(slot)
            elif user.target is aten.sym_size.int:
                user.replace_input_with(old, token)
            else:
                user.replace_input_with(old, number)


def _by_slot(build: Builder, value: fx.Node, slots: int) -> fx.Node:
    """A vector as ``[N, K]``: what it was before it was made flat, where that is known."""
    source = value
    while _packet(source) in _VIEWS:
        source = source.all_input_nodes[0]
        if shape_of(source)[-1:] == (slots,):
            if len(shape_of(source)) == 2:
                return source
            return build.call(aten.reshape.default, source, [-1, slots])
    if value.target is aten.eq.Scalar:
        given = arguments(value)
        return build.call(aten.eq.Scalar, _by_slot(build, given["self"], slots), given["other"])
    return build.call(aten.reshape.default, value, [-1, slots])
