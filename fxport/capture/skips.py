"""Proves that a path which forward takes for empty selections is the general one.

    for e in range(E):                        general: y = y + where(mask_e, f_e(x), 0) for every e
        if not mask_e.any(): continue         mask_e empty: y stays y; the traced path must be that

Forward is traced again with every question answered "empty" (of all the experts that there are,
all but one: each token has some), and with enough other patterns that any two questions get all
four combinations of answers. Each graph must be, operation by
operation, what the general graph becomes when those selections are empty.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator

import torch
from torch import fx

from fxport.capture.arguments import shape_of
from fxport.capture.frames import ADDS
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.location import user_location
from fxport.capture.mask_facts import Emptiness, emptiness, index_bound, question
from fxport.capture.memory import Memory, is_mutation
from fxport.capture.repeated import merge_repeated, selects_rows
from fxport.capture.rows import dense_rows, without_empty_rows
from fxport.capture.selections import Empties, is_marker, marked
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["general_path", "without_selections"]


def without_selections(
    gm: fx.GraphModule, again: Callable[[Empties], fx.GraphModule], *, every_pair: bool
) -> None:
    """Replaces selections of tokens by work on all tokens, and proves the paths not traced.

    Args:
        gm: traced with every question answered "not empty"; changed.
        again: traces the same forward with other answers.
        every_pair: try every two questions with all answers; else only "empty" to all of them,
            enough for code that has been proven in another precision.

    Raises:
        PortError: selected tokens are mixed, or a path for empty selections does more.
    """
    selects = selects_rows(gm)
    if selects:
        merge_repeated(gm)
    asked = _questions(gm)
    dense_rows(gm)
    whole = _never_all_empty({number: about for number, (about, _) in asked.items()})

    def require_same(pattern: frozenset[int]) -> None:
        other = again(pattern.__contains__)
        if selects:  # its empty selections may be gone
            merge_repeated(other)
        asked_there = _questions(other)
        without_empty_rows(other)
        dense_rows(other)
        _require_same(gm, asked, other, asked_there, pattern & set(asked_there))

    everything, *others = _patterns(len(asked)) if asked else [frozenset[int]()]
    for pattern in _possible(everything, whole)[: None if every_pair else 1] if asked else ():
        require_same(pattern)
    for pattern in others if every_pair else ():
        try:
            require_same(pattern)
        except PortError:
            possible = _possible(pattern, whole)
            if pattern in possible:
                raise
            for instead in possible:
                require_same(instead)
    _without_markers(gm)


def general_path(gm: fx.GraphModule) -> bool:
    """Replaces selections as `without_selections` does; True where other paths need a proof.

    Raises:
        PortError: selected tokens are mixed.
    """
    if selects_rows(gm):
        merge_repeated(gm)
    asked = _questions(gm)
    dense_rows(gm)
    _without_markers(gm)
    return bool(asked)


def _without_markers(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if is_marker(node):
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _questions(gm: fx.GraphModule) -> dict[int, tuple[Emptiness, fx.Node]]:
    """Number -> what was asked, and the first marker."""
    found: dict[int, tuple[Emptiness, fx.Node]] = {}
    for node in gm.graph.nodes:
        if is_marker(node):
            number, about = marked(node)
            one = all(size == 1 for size in shape_of(about))  # the data may decide a size
            answer = question(about) if one else None
            asked = answer[0] if answer is not None else emptiness(about)
            if asked is None:
                raise PortError([_another_path(node)])
            found.setdefault(number, (asked, node))
    return found


def _patterns(count: int) -> Iterator[frozenset[int]]:
    """All empty; then patterns in which, of any two questions, each is once the only empty one.

    Every question gets its own choice of half of the m patterns (Sperner: no choice contains
    another), so m grows with the logarithm of the number of questions.
    """
    everything = frozenset(range(count))
    yield everything
    if count < 2:
        return
    width = next(m for m in itertools.count(1) if math.comb(m, m // 2) >= count)
    choices = list(itertools.islice(itertools.combinations(range(width), width // 2), count))
    for pattern in range(width):
        yield frozenset(number for number in everything if pattern in choices[number])


def _never_all_empty(asked: dict[int, Emptiness]) -> list[list[int]]:
    """The questions about every expert that there is: each slot chose one of them."""
    about: dict[fx.Node, dict[int, int]] = {}
    for number, one in asked.items():
        if one.constant is not None:
            about.setdefault(one.node, {})[one.constant] = number
    return [
        [number for _, number in sorted(found.items())]
        for node, found in about.items()
        if (experts := index_bound(node)) is not None and set(range(experts)) <= set(found)
    ]


def _possible(pattern: frozenset[int], whole: list[list[int]]) -> list[frozenset[int]]:
    """What a pattern stands for, once of all experts one has tokens: the first, second or last.

    Any two of more than two experts are both empty in one of the three.
    """
    full = [group for group in whole if pattern.issuperset(group)]
    kept = ({group[min(which, len(group) - 1)] for group in full} for which in (-1, 0, 1))
    return list(dict.fromkeys(pattern - some for some in kept))


# --- two graphs --------------------------------------------------------------------------------

Asked = dict[int, tuple[Emptiness, fx.Node]]


def _require_same(
    general: fx.GraphModule,
    asked: Asked,
    other: fx.GraphModule,
    asked_there: Asked,
    empty: frozenset[int],
) -> None:
    for number, (_, marker) in asked_there.items():
        if number not in asked:
            raise PortError([_another_path(marker)])
    keys = {asked[number][0] for number in empty}
    common = sorted(asked_there)
    one = _Program(general, [asked[n][0] for n in common], keys)
    two = _Program(other, [asked_there[n][0] for n in common], set())
    _Comparison(general, other).run(one, two)


class _Program:
    """What a graph computes in the end, in order, with some selections taken to be empty."""

    def __init__(self, gm: fx.GraphModule, asked: list[Emptiness], empty: set[Emptiness]) -> None:
        from fxport.passes.view_writes import drop_ways_back  # core loads no pass at import

        copied: dict[fx.Node, fx.Node] = {}
        graph = fx.Graph()
        result = graph.graph_copy(gm.graph, copied)
        graph.output((result, [copied[a.node] for a in asked]))
        for node in gm.graph.nodes:
            if ADDS in node.meta:
                into, mask = node.meta[ADDS]
                if emptiness(mask) in empty:
                    copied[node].replace_all_uses_with(copied[into])
                    copied[node] = copied[into]
        for node in list(graph.nodes):
            if is_marker(node):
                graph.erase_node(node)
        drop_ways_back(graph)  # where nothing was put back in between
        needed = Memory(graph).needed(graph)
        self.graph = graph
        nodes = [n for n in graph.nodes if n in needed]
        if not any(map(is_mutation, nodes)):
            nodes = _as_read(graph)
        self.nodes = [n for n in nodes if n.op not in _INPUTS]
        self.asked = asked


_INPUTS = ("placeholder", "get_attr")


def _as_read(graph: fx.Graph) -> list[fx.Node]:
    """What the output is made of, in the order in which that names it.

    So that a view that is made sooner in one program, of the same values, makes no difference.
    """
    order: dict[fx.Node, None] = {}
    waiting = [next(n for n in graph.nodes if n.op == "output")]
    while waiting:
        node = waiting[-1]
        missing = [] if node in order else [n for n in node.all_input_nodes if n not in order]
        waiting += reversed(missing)
        if not missing:
            order.setdefault(waiting.pop())
    return list(order)


class _Comparison:
    """Two programs are equal when they make the same calls on the same values in one order.

    That of the graph where one writes; else that in which the output names them.
    """

    def __init__(self, one: fx.GraphModule, two: fx.GraphModule) -> None:
        self.one, self.two = one, two
        self.same: dict[fx.Node, fx.Node] = {}

    def run(self, one: _Program, two: _Program) -> None:
        for a, b in zip(one.nodes, two.nodes, strict=False):
            if (
                a.op != b.op
                or a.target != b.target
                or not self._alike((a.args, a.kwargs), (b.args, b.kwargs))
            ):
                raise PortError([_another_path(b if b.op == "call_function" else a)])
            self.same[a] = b
        if len(one.nodes) != len(two.nodes):
            longest = max(one.nodes, two.nodes, key=len)
            raise PortError([_another_path(longest[min(len(one.nodes), len(two.nodes)) - 1])])
        for a, b in zip(one.asked, two.asked, strict=True):
            if (a.constant, a.class_axis) != (b.constant, b.class_axis):
                raise PortError([_another_path(b.node)])

    def _alike(self, one: object, two: object) -> bool:
        if isinstance(one, fx.Node) and isinstance(two, fx.Node):
            if one.op in _INPUTS and two.op in _INPUTS:
                return self._same_input(one, two)
            return self.same.get(one) is two
        if isinstance(one, tuple | list) and isinstance(two, tuple | list):
            return len(one) == len(two) and all(map(self._alike, one, two))
        if isinstance(one, dict) and isinstance(two, dict):
            return one.keys() == two.keys() and all(self._alike(one[k], two[k]) for k in one)
        return type(one) is type(two) and repr(one) == repr(two)

    def _same_input(self, one: fx.Node, two: fx.Node) -> bool:
        """The same parameter or argument; or constants of one value, whatever their names."""
        if one.op == two.op == "placeholder":
            a, b = graph_input(one), graph_input(two)
            if a.kind is not b.kind or a.kind is not InputKind.BUFFER:
                return a.kind is b.kind and a.name == b.name
        left, right = _constant(self.one, one), _constant(self.two, two)
        return (
            isinstance(left, torch.Tensor)
            and isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and torch.equal(left, right)
        )


def _constant(gm: fx.GraphModule, node: fx.Node) -> object:
    if node.op == "placeholder":
        return graph_input(node).value
    return operator.attrgetter(str(node.target))(gm)


def _another_path(node: fx.Node) -> Reason:
    return Reason(
        ReasonCode.CAPTURE_FAILED,
        "forward does something else when no token is selected: "
        "its control flow depends on the values of the tokens",
        user_location(node),
        "let an empty selection add nothing, or compute for all tokens and use torch.where",
    )
