"""A loop over experts runs each expert on the rows that chose it.

Before, for each of E experts                       After, once
    hit = eq(chosen, e)               [R, K]            own = permute(chosen, [1, 0])      [K, R]
    gate = sum(where(hit, gates, 0))  [R, 1]            gate = ...  of eq(chosen, own)     [K, R, 1]
    z = mul(linear(x, W_e), gate)     [R, C]            y = expert_linear(x, stack(W), own)
    y = where(any(hit), add(y, z), y) [R, C]            y = add(y, sum(mul(y, gate), 0))   [R, C]

A row adds what the experts that it chose give, and a row that chose an expert is the only one to
add what this one gives: both hold the same terms, if a row chooses no expert twice (the indices
of a `topk`), none that the loop leaves out, and if the experts differ in nothing but their
weights and their number. Else the loop stays, and the report says that every expert runs on every
token.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.location import module_of, user_location
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.views import overload_packet
from fxport.passes.experts.lift import First, Lift, Unlike, of_classes
from fxport.passes.graph_facts import erase_dead
from fxport.report import Decision, Outcome

__all__ = ["run_chosen_experts"]

aten = torch.ops.aten

_RESHAPES = {
    aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.unsqueeze, aten.squeeze,
    aten.contiguous, aten.clone, aten.alias, aten.detach,
}  # fmt: skip


def run_chosen_experts(gm: fx.GraphModule) -> tuple[Decision, ...]:
    """Rewrites every loop over experts that are alike; one decision for each."""
    terms = {node: t for node in gm.graph.nodes if (t := _term(node)) is not None}
    followed = {b for t in terms.values() if (b := _unviewed(t.before, terms)) is not None}
    decisions = []
    for last in [n for n in terms if n not in followed]:
        loop = _loop(last, terms)
        made = None if loop is None else _rewrite(gm, loop)
        decisions += [] if made is None else [made]
    gm.recompile()
    return tuple(decisions)


@dataclass(frozen=True)
class _Term:
    """``node = before + (added where mask holds)``; or `added` in the place of `before`."""

    node: fx.Node
    before: fx.Node
    mask: fx.Node
    added: fx.Node
    replaces: bool


def _term(node: fx.Node) -> _Term | None:
    if node.target is aten.where.self:
        bound = arguments(node)
        mask, value, before = bound["condition"], bound["self"], bound["other"]
        added = _other_summand(value, before)
        if added is not None:
            return _Term(node, before, mask, added, False)
        return _Term(node, before, mask, value, True)
    if node.target is aten.add.Tensor:
        bound = arguments(node)
        before, kept = bound["self"], bound["other"]
        if bound["alpha"] != 1 or getattr(kept, "target", None) is not aten.where.ScalarOther:
            return None
        chosen = arguments(kept)
        if chosen["other"] == 0 and isinstance(before, fx.Node):
            return _Term(node, before, chosen["condition"], chosen["self"], False)
    return None


def _other_summand(value: Any, before: fx.Node) -> fx.Node | None:
    if getattr(value, "target", None) is not aten.add.Tensor:
        return None
    bound = arguments(value)
    one, other = bound["self"], bound["other"]
    if bound["alpha"] != 1 or not isinstance(other, fx.Node):
        return None
    if _same(one, before):
        return other
    return one if _same(other, before) else None


def _source(node: Any) -> fx.Node:
    """Through ops that keep the order of the elements."""
    while overload_packet(node) in _RESHAPES:
        node = arguments(node)["self"]
    found: fx.Node = node
    return found


def _same(one: fx.Node, other: fx.Node) -> bool:
    return _source(one) is _source(other) and shape_of(one) == shape_of(other)


def _unviewed(node: fx.Node, terms: Iterable[fx.Node]) -> fx.Node | None:
    """The term that `node` is, maybe in another shape and back."""
    source = _source(node)
    return source if source in terms and shape_of(source) == shape_of(node) else None


@dataclass(frozen=True)
class _Loop:
    """All terms of a loop, by the number of the expert.

    Attributes:
        chosen: ``[*rows, K]``, no expert twice in a row.
    """

    terms: tuple[_Term, ...]
    first: _Term
    last: _Term
    chosen: fx.Node


def _loop(last: fx.Node, terms: dict[fx.Node, _Term]) -> _Loop | None:
    chain = [terms[last]]
    while (before := _unviewed(chain[-1].before, terms)) is not None:
        if not _read_by(before, chain[-1]):
            return None
        chain.append(terms[before])
    found = [_membership(t.mask) for t in chain]
    members = [m for m in found if m is not None]
    if len(members) < len(chain) or len({m.chosen for m in members}) > 1:
        return None
    experts = _distinct(members[0].chosen)
    if experts is None or sorted(m.expert for m in members) != list(range(experts)):
        return None
    ordered = sorted(zip(members, chain, strict=True), key=lambda pair: pair[0].expert)
    by_number = tuple(term for _, term in ordered)
    return _Loop(by_number, chain[-1], chain[0], members[0].chosen)


def _read_by(value: fx.Node, term: _Term) -> bool:
    """Whether nothing else than the next term reads what a term made."""
    for user in value.users:
        shape_only = user.target is aten.sym_size.int
        mine = user is term.node or (
            user.target is aten.add.Tensor and set(user.users) == {term.node}
        )
        viewed = overload_packet(user) in _RESHAPES and _read_by(user, term)
        if not (shape_only or mine or viewed):
            return False
    return True


# --- which expert a mask is of ------------------------------------------------------------------


@dataclass(frozen=True)
class _Membership:
    """A mask that holds exactly for the rows that chose the expert."""

    chosen: fx.Node
    expert: int


def _membership(mask: fx.Node) -> _Membership | None:
    node = _source(mask)
    if node.target is not aten.any.dim:
        found = _equality(node)
        return found if found is not None and _is_number(found.chosen) else None
    bound = arguments(node)
    found = _equality(_turned(bound["self"]))
    if found is None or _is_number(found.chosen):
        return None
    slots = shape_of(bound["self"])[bound["dim"]]
    others = [s for s in shape_of(node) if isinstance(s, int)]
    of_slots = isinstance(slots, int) and slots == shape_of(found.chosen)[-1]
    return found if of_slots and set(others) <= {1} else None


def _turned(node: fx.Node) -> fx.Node:
    while overload_packet(node) in (aten.permute, aten.transpose, aten.t):
        node = arguments(node)["self"]
    return node


def _equality(node: fx.Node) -> _Membership | None:
    """``chosen == e``, also as a class of a one-hot; axes in any order."""
    if node.target is aten.eq.Scalar:
        bound = arguments(node)
        return _member(bound["self"], bound["other"])
    if node.target is aten.ne.Scalar and arguments(node)["other"] == 0:
        return _of_one_hot(arguments(node)["self"])
    return _of_one_hot(node)


def _member(chosen: fx.Node, expert: Any) -> _Membership | None:
    return _Membership(chosen, expert) if type(expert) is int else None


def _of_one_hot(node: fx.Node) -> _Membership | None:
    if node.target is aten.squeeze.dim:
        part = arguments(node)["self"]
        if part.target is not aten.slice.Tensor:
            return None
        bound = arguments(part)
        squeezed = arguments(node)["dim"] % len(shape_of(part))
        dim, expert = bound["dim"] % len(shape_of(part)), bound["start"]
        if squeezed != dim or type(expert) is not int or bound["end"] != expert + 1:
            return None
    elif node.target is aten.select.int:
        bound = arguments(node)
        dim, expert = bound["dim"] % len(shape_of(bound["self"])), bound["index"]
    elif node.target is operator.getitem and node.args[0].target is aten.unbind.int:  # type: ignore[union-attr]
        bound = arguments(node.args[0])  # type: ignore[arg-type]
        dim, expert = bound["dim"] % len(shape_of(bound["self"])), node.args[1]
    else:
        return None
    classes = bound["self"]
    if classes.target is aten.permute.default:
        turn = arguments(classes)
        classes, dim = turn["self"], turn["dims"][dim] % len(turn["dims"])
    chosen = of_classes(classes, dim)
    return None if chosen is None else _member(chosen, expert)


# --- what was chosen ----------------------------------------------------------------------------


def _is_number(chosen: fx.Node) -> bool:
    """One expert for each row: ``[*rows]``."""
    return all(not isinstance(s, int) for s in shape_of(chosen))


def _distinct(chosen: fx.Node) -> int | None:
    """Of how many experts these are, if no row has one twice: a row may be one slot of a token."""
    if chosen.meta["val"].dtype not in (torch.int32, torch.int64):
        return None
    node = chosen
    while overload_packet(node) in {*_RESHAPES, aten.to}:
        node = arguments(node)["self"]
    if node.target is aten.argmax.default:
        bound = arguments(node)
        return _classes(bound["self"], bound["dim"]) if _is_number(chosen) else None
    if node.target is not operator.getitem or node.args[1] != 1:
        return None
    of, slots = node.args[0], shape_of(node)[-1]
    assert isinstance(of, fx.Node)
    if of.target is aten.max.dim:
        fits = _is_number(chosen)
    else:
        slots_stay = _is_number(chosen) or slots == shape_of(chosen)[-1]
        fits = of.target is aten.topk.default and slots_stay
    bound = arguments(of)
    return _classes(bound["self"], bound["dim"]) if fits else None


def _classes(scores: fx.Node, dim: Any) -> int | None:
    """The size of the axis, if it is the last one and a number."""
    rank = len(shape_of(scores))
    if type(dim) is not int or dim % rank != rank - 1:
        return None
    size = shape_of(scores)[-1]
    return size if isinstance(size, int) else None


# --- and once for all ---------------------------------------------------------------------------


def _rewrite(gm: fx.GraphModule, loop: _Loop) -> Decision | None:
    experts, last = len(loop.terms), loop.last
    if experts < 2 or len({t.replaces for t in loop.terms}) > 1:
        return None
    emitter = Emitter(gm, last.node, [last.node])
    chosen = loop.chosen
    try:
        if _is_number(chosen):
            chosen = emitter.call(aten.unsqueeze.default, chosen, -1)
        elif last.replaces:
            raise Unlike
        found = Lift(emitter, chosen, experts).value([t.added for t in loop.terms])
        if found.first is not First.SLOT:
            raise Unlike
        value = emitter.call(aten.sum.dim_IntList, found.node, [0])
        if not last.replaces:
            value = emitter.call(aten.add.Tensor, loop.first.before, value)
        _check_alike(value, last.node)
    except Unlike:
        emitter.undo()
        return None
    last.node.replace_all_uses_with(value)
    for term in loop.terms:
        _measure(term.node, loop.first.before)
    erase_dead(gm)
    return Decision(
        "experts",
        Outcome.REWRITTEN,
        f"loop over {experts} experts",
        f"fxport::expert_linear: each row with the {shape_of(chosen)[-1]} that it chose",
        module=module_of(last.node),
        location=user_location(last.node),
    )


def _measure(value: fx.Node, first: fx.Node) -> None:
    """Reads the sizes of what a term made off what was there before the loop."""
    for user in list(value.users):
        if overload_packet(user) in _RESHAPES:
            _measure(user, first)
        elif user.target is aten.sym_size.int:
            like: Any = first
            while shape_of(like) != shape_of(value) and overload_packet(like) in _RESHAPES:
                like = arguments(like)["self"]
            if shape_of(like) == shape_of(value):
                user.replace_input_with(value, like)


def _check_alike(value: fx.Node, before: fx.Node) -> None:
    if shape_of(value) != shape_of(before):
        raise Unlike
    if value.meta["val"].dtype != before.meta["val"].dtype:
        raise Unlike
