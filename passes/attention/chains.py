"""Scores that one einsum makes of three tensors or more, as a chain of products of two.

    einsum("bhid,hde,bhje->bhij", q, w, k)  ->  einsum("bhie,bhje->bhij",
                                                       einsum("bhid,hde->bhie", q, w), k)

What is multiplied first has the fewest dimensions, and sums over none of them if it can: so never
all queries with all keys before the gates of either.
"""

from __future__ import annotations

import itertools

import torch
from torch import fx

from fxport.capture.arguments import arguments
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.paths import obstacles
from fxport.passes.attention.softmax import softmaxes
from fxport.passes.attention.views import overload_packet
from fxport.passes.graph_facts import erase_if_unused

__all__ = ["spell_out_chains"]

aten = torch.ops.aten


def spell_out_chains(gm: fx.GraphModule) -> None:
    """Replaces those that lead to a softmax."""
    found = [n for s in softmaxes(gm.graph) for n in obstacles(s.scores)]
    for node in dict.fromkeys(n for n in found if overload_packet(n) is aten.einsum):
        given = arguments(node)
        equation = given["equation"].replace(" ", "")
        inputs, _, result = equation.partition("->")
        terms = inputs.split(",")
        plain = "->" in equation and "." not in equation
        if len(terms) > 2 and plain and all(len(set(t)) == len(t) for t in terms):
            whole = _chained(Emitter(gm, node, []), list(given["tensors"]), terms, result)
            node.replace_all_uses_with(whole)
            erase_if_unused(gm, [node])


def _chained(emitter: Emitter, operands: list[fx.Node], terms: list[str], result: str) -> fx.Node:
    while len(terms) > 2:
        pairs = itertools.combinations(range(len(terms)), 2)
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
