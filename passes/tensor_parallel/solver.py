"""Decides which classes are divided over the ranks, and who owns what.

Components are sets of classes that stand or fall together: the hidden units of one MLP, the
heads of one attention, the channels of the residual stream. Two components on the two sides of
one projection cannot both be divided without a reduce-scatter, so the residual stream (many wide
projections read it) loses against the narrow results of heads and hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.location import module_of
from fxport.passes.tensor_parallel.factors import Labels

__all__ = ["Component", "Solution", "solve"]


@dataclass
class Component:
    """Classes that are divided together, or not at all.

    Attributes:
        classes: representatives.
        leaves: the ops that make its values.
        weight: elements of the projections that would be divided.
        cost: elements reduced per token if it is divided.
        kept: why it is replicated; empty when it is divided.
    """

    classes: set[int]
    leaves: list[fx.Node]
    weight: int = 0
    cost: int = 1
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

    def home(atoms: Tensor) -> set[int]:
        return {by_class[c] for c in labels.classes.of(atoms) if c in by_class}

    for linear in labels.linears:
        size = shape_of(arguments(linear.node)["weight"])
        before, after = home(linear.inputs), home(linear.outputs)
        for i in before | after:
            components[i].weight += int(size[0] * size[1])
        for i in before:
            components[i].cost += int(size[0])
            components[i].neighbours |= after
        for i in after:
            components[i].neighbours |= before
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
    groups: dict[frozenset[str], list[int]] = {}
    names: dict[int, set[str]] = {}
    for node in component.leaves:
        for one in labels.classes.of(labels.leaves[node]):
            names.setdefault(one, set()).add(node.name)
    for one in sorted(component.classes - set(derived)):
        groups.setdefault(frozenset(names.get(one, ())), []).append(one)
    owners: dict[int, frozenset[int]] = {}
    for classes in groups.values():
        if len(classes) < world_size:
            return None
        part, extra = divmod(len(classes), world_size)
        start = 0
        for rank in range(world_size):
            stop = start + part + (rank < extra)
            owners.update(dict.fromkeys(classes[start:stop], frozenset([rank])))
            start = stop
    for kv, queries in derived.items():
        wanted = frozenset().union(*(owners.get(q, frozenset(range(world_size))) for q in queries))
        if len(wanted) < world_size:
            owners[kv] = wanted
    return owners
