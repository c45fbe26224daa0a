"""Puts dropout that every rank computes alike into the graph of one rank.

Before                                  After
    y = dropout(x, 0.1, True)               s = step_seed(tokens)
                                            y = keyed_dropout(x, s + 1)
    r = randint(0, 2**62, [1])              r = s + 2
    o = attention(q, k, v, seed=r, 0.2)     o = attention(q, k, v, seed=r, attention_rate())

Random numbers in any other place would differ between the ranks, and are refused.
"""

from __future__ import annotations

import torch
from torch import fx

from fxport.capture.arguments import arguments
from fxport.capture.location import user_location
from fxport.errors import FxportError
from fxport.parallel.dropout import AttentionRate, KeyedDropout, StepSeed
from fxport.passes.tensor_parallel.emission import Emission
from fxport.passes.tensor_parallel.emit_rules import PART

__all__ = ["key_dropout"]

aten = torch.ops.aten
_ATTENTION = torch.ops.fxport.attention.default


def key_dropout(emission: Emission) -> None:
    """Rewrites the emitted graph in place.

    Raises:
        FxportError: an operation other than dropout draws random numbers.
    """
    keyed = _Keyed(emission)
    for node in list(emission.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.dropout.default:
            keyed.dropout(node)
        elif node.target is _ATTENTION:
            keyed.attention(node)
    for node in emission.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded not in tags:
            continue
        if "dropout_p" in (found := arguments(node)) and found["dropout_p"] == 0:
            continue
        where = user_location(node)
        raise FxportError(
            f"{where or node.name}: {node.target} draws random numbers, which would differ "
            "between the ranks; only dropout is the same on all of them"
        )


class _Keyed:
    def __init__(self, emission: Emission) -> None:
        self.emission, self.graph = emission, emission.graph
        self.seed: fx.Node | None = None
        self.places = 0

    def dropout(self, node: fx.Node) -> None:
        found = arguments(node)
        value, p = found["input"], found["p"]
        if not found["train"] or p == 0:
            node.replace_all_uses_with(value)
        else:
            rank = node.meta["val"].dim()
            sizes, index = node.meta.get(PART, ((None,) * rank, (None,) * rank))
            seed = self._place(node)
            key = self._module("keyed_dropout", KeyedDropout(p, sizes, index))
            with self.graph.inserting_before(node):
                new = self.graph.call_module(key, (value, seed))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def attention(self, node: fx.Node) -> None:
        found = arguments(node)
        p = found["dropout_p"]
        if p == 0:
            return
        seed, drawn = self._place(node), found["seed"]
        key = self._module("attention_rate", AttentionRate(p))
        with self.graph.inserting_before(node):
            rate = self.graph.call_module(key)
        node.args, node.kwargs = (), {**found, "seed": seed, "dropout_p": rate}
        if not drawn.users:
            self.graph.erase_node(drawn)

    def _place(self, node: fx.Node) -> fx.Node:
        """The seed of one place in the graph."""
        if self.seed is None:
            tokens = next(iter(self.graph.find_nodes(op="placeholder")))
            key = self._module("step_seed", StepSeed(self.emission.context))
            with self.graph.inserting_after(tokens):
                self.seed = self.graph.call_module(key, (tokens,))
        self.places += 1
        with self.graph.inserting_before(node):
            return self.graph.call_function(aten.add.Tensor, (self.seed, self.places))

    def _module(self, name: str, module: torch.nn.Module) -> str:
        key = f"{name}_{len(self.emission.modules)}"
        self.emission.modules[key] = module
        return key
