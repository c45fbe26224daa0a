"""Exponentials of ``q.k`` that go into a product with values, and are no softmax that is known.

e = exp(q @ k.T);  (e @ v) / unknown(e)       reported, so that nothing is slow in silence
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

import torch
from torch import fx

from fxport.errors import ReasonCode
from fxport.passes.attention.made import power_of
from fxport.passes.attention.paths import paths
from fxport.passes.attention.products import as_product, factors_of
from fxport.passes.attention.quotient import division_of
from fxport.passes.attention.site import Left
from fxport.passes.attention.softmax import Softmax
from fxport.passes.attention.views import moved_input, overload_packet
from fxport.passes.graph_facts import GraphFacts, Source

__all__ = ["unread_exponentials"]

aten = torch.ops.aten

_MAX_PATHS = 8
_MAX_STEPS = 8
_KEEPS_WEIGHTS = {aten.mul, aten.masked_fill, aten.where, aten.dropout, aten.clamp, aten.clamp_min}


def unread_exponentials(
    facts: GraphFacts, known: Collection[Softmax]
) -> Iterator[tuple[fx.Node, Left]]:
    """Each with its reason."""
    read = {node for softmax in known for node in softmax.nodes}
    for node in facts.gm.graph.nodes:
        power = power_of(node)
        if power is None or node in read or not _meets_values(node):
            continue
        if any(_of_data(facts, p[0]) for p in itertools.islice(paths(power[0]), _MAX_PATHS)):
            yield (
                node,
                Left(
                    ReasonCode.UNSUPPORTED_FEATURE,
                    "exponentials of q.k meet the values, and are not known to be divided by "
                    "their sum over the keys and nothing more",
                    node,
                    "softmax(x), or e = exp(x - amax(x)) and e / e.sum(); a learned sink in the sum"
                    " is a column of the scores: softmax(cat([x, sink], -1))[..., :-1]",
                ),
            )


def _of_data(facts: GraphFacts, node: fx.Node) -> bool:
    product = as_product(node)
    assert product is not None
    return all(Source.DATA in facts.source(n) for n in (product.left, product.right))


def _meets_values(node: fx.Node) -> bool:
    """Whether a product follows, after steps that keep the weights' meaning."""
    pending = [(node, 0)]
    while pending:
        current, steps = pending.pop()
        for user in current.users:
            if factors_of(user) is not None:
                return True
            product = None if overload_packet(user) is aten.sum else as_product(user)
            if product is not None:
                return True
            follows = overload_packet(user) in _KEEPS_WEIGHTS or moved_input(user) is current
            if steps < _MAX_STEPS and (follows or division_of(user) is not None):
                pending.append((user, steps + 1))
    return False
