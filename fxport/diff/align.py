"""Which nodes of two graphs correspond, when nobody watched one become the other.

1. Every node is reduced to its operation, its plain arguments and its module
   (``blocks.3.attn/softmax(-1)``); a shortest edit script aligns the two lists. Once as it is,
   once with layer numbers masked (a layer was inserted): the one that keeps more nodes counts.
2. Within a gap: nodes of the same operation and module pair up (an argument changed); then nodes
   that feed the same argument of corresponding users (one operation for another).

Shortest edit script: E. W. Myers, "An O(ND) Difference Algorithm and Its Variations", 1986.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from typing import Any

from torch import fx

from fxport.diff.names import argument_text, stable_names, target_text

__all__ = ["align", "edit_path"]

_LAYER = re.compile(r"(?<=[./])\d+(?=[./]|$)")
_ORDINAL = re.compile(r"#\d+$")


def align(before: fx.Graph, after: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Node of `before` -> the node of `after` that stands in its place."""
    exact, masked = (_aligned(before, after, mask) for mask in (False, True))
    return masked if _agreeing(masked) > _agreeing(exact) else exact


def _agreeing(pairs: dict[fx.Node, fx.Node]) -> int:
    """Pairs that compute the same from corresponding nodes."""
    return sum(
        _plain(one) == _plain(other)
        and [pairs.get(n) for n in _flat(one)] == _flat(other)
        and _operation(one) == _operation(other)
        for one, other in pairs.items()
    )


def _aligned(before: fx.Graph, after: fx.Graph, mask: bool) -> dict[fx.Node, fx.Node]:
    old, new = list(before.nodes), list(after.nodes)
    old_kinds, new_kinds = _kinds(before, mask), _kinds(after, mask)
    matched = edit_path(
        [(old_kinds[n], _plain(n)) for n in old], [(new_kinds[n], _plain(n)) for n in new]
    )
    pairs = {old[i]: new[j] for i, j in matched}
    last = (-1, -1)
    for i, j in [*matched, (len(old), len(new))]:
        _pair_same_kind(old[last[0] + 1 : i], new[last[1] + 1 : j], old_kinds, new_kinds, pairs)
        last = (i, j)
    _pair_by_users(old, pairs)
    return pairs


def _kinds(graph: fx.Graph, mask: bool) -> dict[fx.Node, str]:
    """Module and operation; layer numbers masked if asked for."""
    names = {n: _ORDINAL.sub("", name) for n, name in stable_names(graph).items()}
    return {
        n: f"{_LAYER.sub('*', name) if mask else name}:{_operation(n)}" for n, name in names.items()
    }


def _operation(node: fx.Node) -> str:
    return node.op if node.op in ("placeholder", "output", "get_attr") else target_text(node)


def _plain(node: fx.Node) -> str:
    """The arguments with every node as ``_``."""
    blank = dict.fromkeys(node.all_input_nodes, "_")
    return argument_text(node.args, blank) + argument_text(node.kwargs, blank)


def _pair_same_kind(
    old: Sequence[fx.Node],
    new: Sequence[fx.Node],
    old_kinds: dict[fx.Node, str],
    new_kinds: dict[fx.Node, str],
    pairs: dict[fx.Node, fx.Node],
) -> None:
    waiting: dict[str, deque[fx.Node]] = defaultdict(deque)
    for node in new:
        waiting[new_kinds[node]].append(node)
    for node in old:
        if waiting[old_kinds[node]]:
            pairs[node] = waiting[old_kinds[node]].popleft()


def _pair_by_users(old: Sequence[fx.Node], pairs: dict[fx.Node, fx.Node]) -> None:
    """A node without partner stands where its user's partner takes the same argument from."""
    taken = set(pairs.values())
    for node in reversed(old):
        if node in pairs or node.op in ("placeholder", "output"):
            continue
        for user in node.users:
            if user not in pairs:
                continue
            found = _at_same_place(node, user, pairs[user])
            if found is not None and found not in taken and found.op != "placeholder":
                pairs[node] = found
                taken.add(found)
                break


def _at_same_place(node: fx.Node, user: fx.Node, partner: fx.Node) -> fx.Node | None:
    theirs, ours = _flat(partner), _flat(user)
    if len(theirs) != len(ours):
        return None
    place = next(i for i, n in enumerate(ours) if n is node)
    return theirs[place] if isinstance(theirs[place], fx.Node) else None


def _flat(node: fx.Node) -> list[Any]:
    found: list[Any] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def edit_path(old: Sequence[Hashable], new: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Index pairs of a longest common subsequence. Time O((N + M) D), D the number of edits."""
    start = 0
    while start < min(len(old), len(new)) and old[start] == new[start]:
        start += 1
    n, m = len(old), len(new)
    while n > start and m > start and old[n - 1] == new[m - 1]:
        n, m = n - 1, m - 1
    head = [(i, i) for i in range(start)]
    tail = [(n + k, m + k) for k in range(len(old) - n)]
    middle = [(i + start, j + start) for i, j in _myers(old[start:n], new[start:m])]
    return head + middle + tail


def _myers(old: Sequence[Hashable], new: Sequence[Hashable]) -> list[tuple[int, int]]:
    furthest = {1: 0}
    history: list[dict[int, int]] = []
    for edits in range(len(old) + len(new) + 1):
        history.append(dict(furthest))
        for k in range(-edits, edits + 1, 2):
            down = k == -edits or (k != edits and furthest[k - 1] < furthest[k + 1])
            x = furthest[k + 1] if down else furthest[k - 1] + 1
            while x < len(old) and x - k < len(new) and old[x] == new[x - k]:
                x += 1
            furthest[k] = x
            if x >= len(old) and x - k >= len(new):
                return _backtrack(history, len(old), len(new))
    return []


def _backtrack(history: list[dict[int, int]], x: int, y: int) -> list[tuple[int, int]]:
    matched: list[tuple[int, int]] = []
    for edits in range(len(history) - 1, -1, -1):
        furthest, k = history[edits], x - y
        down = k == -edits or (k != edits and furthest[k - 1] < furthest[k + 1])
        previous = k + 1 if down else k - 1
        px = furthest[previous] if edits else 0
        py = px - previous if edits else 0
        while x > px and y > py:
            x, y = x - 1, y - 1
            matched.append((x, y))
        x, y = px, py
    return matched[::-1]
