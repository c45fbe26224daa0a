"""What one einsum makes of three tensors or more, as a chain of products of two.

What one tensor alone has, and the result has not, is summed up before.

    einsum("bhid,hde,bhje->bhij", q, w, k)  ->  einsum("bhie,bhje->bhij",
                                                       einsum("bhid,hde->bhie", q, w), k)
    einsum("bhij,bhjd,hde->bie", p, v, o)   ->  einsum("bhid,hde->bie",
                                                       einsum("bhij,bhjd->bhid", p, v), o)
    einsum("bghid,bhjd->bhij", q, k)        ->  einsum("bhid,bhjd->bhij", q.sum(1), k)

What is multiplied first has the fewest dimensions, and sums over none of them if it can: so never
all queries with all keys before the gates of either. A softmax's weights are multiplied first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.paths import obstacles
from fxport.passes.attention.softmax import softmaxes
from fxport.passes.attention.views import overload_packet
from fxport.passes.graph_facts import erase_if_unused

__all__ = ["spell_out_chains"]

aten = torch.ops.aten


def spell_out_chains(gm: fx.GraphModule) -> None:
    """Replaces those that lead to a softmax, or take its weights."""
    found: dict[fx.Node, fx.Node | None] = {}
    for softmax in softmaxes(gm.graph):
        found |= dict.fromkeys(obstacles(softmax.scores))
        found |= dict(_takers(softmax.weights))
    for node, weights in found.items():
        if overload_packet(node) is not aten.einsum:
            continue
        given = arguments(node)
        equation = given["equation"].replace(" ", "")
        inputs, _, result = equation.partition("->")
        terms = inputs.split(",")
        operands = list(given["tensors"])
        plain = "->" in equation and "." not in equation
        if not plain or len(terms) < 2 or any(len(set(t)) < len(t) for t in terms):
            continue
        alone = [_alone(terms, result, n) for n in range(len(terms))]
        alone = [() if o is weights else dims for o, dims in zip(operands, alone, strict=True)]
        if len(terms) > 2 or any(alone):
            emitter = Emitter(gm, node, [])
            _sum_up(emitter, operands, terms, alone)
            node.replace_all_uses_with(_chained(emitter, operands, terms, result, weights))
            erase_if_unused(gm, [node])


def _takers(weights: fx.Node, steps: int = 4) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What takes a softmax's weights, or the same after dropout, masks and casts; and as what."""
    for user in weights.users:
        yield user, weights
        if steps and _is_tensor(user) and shape_of(user) == shape_of(weights):
            yield from _takers(user, steps - 1)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _alone(terms: list[str], result: str, n: int) -> tuple[int, ...]:
    """Dimensions of a term that neither the result nor another term has."""
    others = {*result, *"".join(terms[:n] + terms[n + 1 :])}
    return tuple(dim for dim, c in enumerate(terms[n]) if c not in others)


def _sum_up(
    emitter: Emitter, operands: list[fx.Node], terms: list[str], alone: list[tuple[int, ...]]
) -> None:
    for n, dims in enumerate(alone):
        if dims:
            operands[n] = emitter.call(aten.sum.dim_IntList, operands[n], list(dims))
            terms[n] = "".join(c for dim, c in enumerate(terms[n]) if dim not in dims)


def _chained(
    emitter: Emitter,
    operands: list[fx.Node],
    terms: list[str],
    result: str,
    weights: fx.Node | None,
) -> fx.Node:
    while len(terms) > 2:
        pairs = list(itertools.combinations(range(len(terms)), 2))
        if weights in operands:
            pairs = [pair for pair in pairs if operands.index(weights) in pair]
        costs = {pair: _cost(terms, _kept(terms, result, *pair), *pair) for pair in pairs}
        i, j = min(costs, key=lambda pair: costs[pair])
        kept = _kept(terms, result, i, j)
        equation = f"{terms[i]},{terms[j]}->{kept}"
        operands[i] = emitter.call(aten.einsum.default, equation, [operands[i], operands[j]])
        terms[i] = kept
        del operands[j], terms[j]
    return emitter.call(aten.einsum.default, f"{','.join(terms)}->{result}", operands)


def _cost(terms: list[str], kept: str, i: int, j: int) -> tuple[int, int]:
    return len(kept), len({*terms[i], *terms[j]}) - len(kept)


def _kept(terms: list[str], result: str, i: int, j: int) -> str:
    """The dimensions of a product of two that others have, or the result."""
    needed = {*result, *"".join(t for n, t in enumerate(terms) if n not in (i, j))}
    return "".join(c for c in dict.fromkeys(terms[i] + terms[j]) if c in needed)
