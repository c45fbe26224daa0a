"""Writes the graph of one rank; `Emission` shows it before and after."""

from __future__ import annotations

from torch import fx

from fxport.parallel.context import ParallelContext
from fxport.passes.tensor_parallel.emission import Emission
from fxport.passes.tensor_parallel.emit_rules import RULES
from fxport.passes.tensor_parallel.labels import Labels
from fxport.passes.tensor_parallel.solver import Solution

__all__ = ["emit"]


def emit(
    source: fx.GraphModule,
    labels: Labels,
    solution: Solution,
    context: ParallelContext,
    vocabulary: tuple[fx.Node, ...],
    whole: frozenset[str],
    *,
    postponing: bool,
) -> Emission:
    """The graph of one rank.

    Args:
        postponing: reduce sums of projections as late as possible; an engine's layers reduce
            their own.

    Raises:
        Undividable: a value that the solver divided reaches an op that needs all of it.
        WholeParameter: two uses of a parameter want different parts of it.
    """
    emission = Emission(source, labels, solution, context, vocabulary, whole, RULES, postponing)
    emission.run()
    return emission
