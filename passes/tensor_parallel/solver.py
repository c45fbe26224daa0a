"""Decides which classes are divided over the ranks, and who owns what.

Components are sets of classes that stand or fall together: the hidden units of one MLP, the
heads of one attention, the channels of the residual stream. Two components on the two sides of
one projection cannot both be divided without a reduce-scatter, so the residual stream (many wide
projections read it) loses against the narrow results of heads and hidden units. What is so narrow
that a rank would send more than it saves stays whole: the few features of a low-rank gate, say.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from fxport.capture.location import module_of
from fxport.passes.tensor_parallel.labels import Labels

__all__ = ["Component", "Solution", "solve"]


@dataclass
class Component:
    """Classes that are divided together, or not at all.

    Attributes:
        classes: representatives.
        leaves: the ops that make its values.
        weight: elements of the projections that would be divided.
        cost: elements reduced per token if it is divided.
        attends: it has the heads of an attention.
        kept: why it is replicated; empty when it is divided.
    """

    classes: set[int]
    leaves: list[fx.Node]
    weight: int = 0
    cost: int = 1
    attends: bool = False
    neighbours: set[int] = field(default_factory=set)
    kept: str = ""


@dataclass(frozen=True)
class Solution:
    """Owners of every divided class; a class that is absent lives on every rank."""

    world_size: int
    owners: dict[int, frozenset[int]]
    components: tuple[Component, ...]


def solve(labels: Labels, world_size: int) -> Solution:
    """Chooses the components to divide and hands their classes out."""
    labels.classes.roots()  # no class changes from here on: look-ups are fast
    components = _components(labels)
    _weigh(labels, components)
    by_class = {c: i for i, comp in enumerate(components) for c in comp.classes}
    for atoms, node, why in labels.full:
        for one in labels.classes.of(atoms):
            if one in by_class and not components[by_class[one]].kept:
                where = module_of(node)
                components[by_class[one]].kept = f"{why}{f' in {where}' if where else ''}"
    order = sorted(range(len(components)), key=lambda i: -components[i].weight / components[i].cost)
    owners: dict[int, frozenset[int]] = {}
    taken: set[int] = set()
    for index in order:
        component = components[index]
        if component.kept:
            continue
        if index in component.neighbours:
            component.kept = "a projection maps it to itself"
        elif not component.weight:
            component.kept = "nothing to gain"
        elif not component.attends and 2 * component.weight <= component.cost**2:
            component.kept = "less to gain than to send"
        elif component.neighbours & taken:
            component.kept = "the values on the other side of its projections are divided"
        else:
            given = _hand_out(labels, component, world_size)
            if given is None:
                component.kept = f"fewer units than {world_size} ranks"
                continue
            owners.update(given)
            taken.add(index)
    return Solution(world_size, owners, tuple(components))


def _components(labels: Labels) -> list[Component]:
    """Merges classes that occur in the result of one op, or in one attention."""
    sets: list[tuple[set[int], list[fx.Node]]] = [
        (labels.classes.of(atoms), [node]) for node, atoms in labels.leaves.items()
    ]
    sets += [
        (set().union(*(labels.classes.of(x) for x in (a.q, a.k, a.v))), [])
        for a in labels.attentions
    ]
    home: dict[int, int] = {}
    parent = list(range(len(sets)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, (classes, _) in enumerate(sets):
        for one in classes:
            parent[root(home.setdefault(one, i))] = root(i)
    merged: dict[int, Component] = {}
    for i, (classes, leaves) in enumerate(sets):
        found = merged.setdefault(root(i), Component(set(), []))
        found.classes |= classes
        found.leaves += leaves
    return list(merged.values())


def _weigh(labels: Labels, components: list[Component]) -> None:
    by_class = {c: i for i, comp in enumerate(components) for c in comp.classes}
    for attention in labels.attentions:
        for i in {by_class[c] for c in labels.classes.of(attention.q)}:
            components[i].attends = True

    def home(atoms: Tensor) -> set[int]:
        return {by_class[c] for c in labels.classes.of(atoms) if c in by_class}

    # what experts of one product add to each other is sent once: `postpone`
    sent: list[dict[fx.Node, set[int]]] = [{} for _ in components]
    for linear in labels.linears:
        width = linear.outputs.numel()
        before, after = home(linear.inputs), home(linear.outputs)
        for i in before | after:
            components[i].weight += linear.inputs.numel() * width
        for i in before:
            sent[i].setdefault(linear.node, set()).update(labels.classes.of(linear.outputs))
            components[i].neighbours |= after
        for i in after:
            components[i].neighbours |= before
    for component, results in zip(components, sent, strict=True):
        component.cost += sum(map(len, results.values()))
    for _, groups, _ in labels.reductions:
        for i in home(groups):
            components[i].cost += 1


def _hand_out(
    labels: Labels, component: Component, world_size: int
) -> dict[int, frozenset[int]] | None:
    """Contiguous, balanced runs of the classes that occur in the same ops; None: too few."""
    derived: dict[int, set[int]] = {}
    for attention in labels.attentions:
        if not attention.shared:
            continue
        heads, kv_heads = attention.q.shape[1], attention.k.shape[1]
        for head in range(heads):
            kv = labels.classes.find(int(attention.k[0, head // (heads // kv_heads), 0, 0]))
            query = labels.classes.find(int(attention.q[0, head, 0, 0]))
            if query in component.classes:
                derived.setdefault(kv, set()).add(query)
    owners: dict[int, frozenset[int]] = {}
    for leaves, classes in _by_leaves(labels, component, derived.keys()).items():
        units = _units(labels, [labels.leaves[leaf] for leaf in leaves], classes, world_size)
        if len(units) < world_size:
            return None
        part, extra = divmod(len(units), world_size)
        start = 0
        for rank in range(world_size):
            stop = start + part + (rank < extra)
            given = itertools.chain.from_iterable(units[start:stop])
            owners.update(dict.fromkeys(given, frozenset([rank])))
            start = stop
    for kv, queries in derived.items():
        wanted = frozenset().union(*(owners.get(q, frozenset(range(world_size))) for q in queries))
        if len(wanted) < world_size:
            owners[kv] = wanted
    return owners


def _by_leaves(
    labels: Labels, component: Component, left_out: Collection[int]
) -> dict[tuple[fx.Node, ...], list[int]]:
    """The classes in order, by the ops in whose results they occur."""
    occurs: dict[int, tuple[fx.Node, ...]] = dict.fromkeys(component.classes, ())
    for node in component.leaves:
        for one in labels.classes.of(labels.leaves[node]):
            occurs[one] += (node,)
    groups: dict[tuple[fx.Node, ...], list[int]] = {}
    for one in sorted(component.classes.difference(left_out)):
        groups.setdefault(occurs[one], []).append(one)
    return groups


def _units(
    labels: Labels, leaves: Sequence[Tensor], classes: Sequence[int], world_size: int
) -> Sequence[Sequence[int]]:
    """The classes that one rank must have together, so that its part of a result is a rectangle.

    Results of one dimension take any run of classes. Of ``[experts, hidden]`` every rank takes
    whole columns (the same part of every expert) where there are enough, else whole rows.
    """
    roots = labels.classes.roots()
    for leaf in leaves:
        shape = [n for n in leaf.shape if n > 1]
        if len(shape) < 2:
            continue
        own = roots[leaf.reshape(shape)]
        for dim in reversed(range(len(shape))):
            lines = (own.select(dim, i).unique().tolist() for i in range(shape[dim]))
            columns = dict.fromkeys(map(tuple, lines))  # interleaved gate and up: once
            if sum(map(len, columns)) == len(classes) and len(columns) >= world_size:
                return list(columns)
    return [(one,) for one in classes]
