"""Values that enter local work piece by piece enter it whole, and once.

Before (an all-reduce of gradients each)    After (one)
    a = copy_to(index(x, i));  ..               c = copy_to(x)
    b = copy_to(index(x, j));  ..               a = index(c, i);  b = index(c, j)

The tokens of each expert and their gates are taken from what entered, so that their gradients are
summed over the ranks together. Copies for every expert are made after entering.
"""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.parallel.modules import CopyTo
from fxport.passes.tensor_parallel.emission import Emission
from fxport.passes.tensor_parallel.factors import unit_shape

__all__ = ["enter_once"]

aten = torch.ops.aten
_PICKS = {aten.index.Tensor, aten.select.int, aten.slice.Tensor, operator.getitem}
_VIEWS = {
    aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.transpose.int, aten.permute.default, aten.flatten.using_ints,
}  # fmt: skip
_MASKED = {  # the gate of one expert
    aten.where.ScalarOther, aten.mul.Tensor, aten.sum.dim_IntList,
}  # fmt: skip
_COPIES = {aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int}
_PARTS = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.chunk.default}

_MOVABLE = _PICKS | _VIEWS | _COPIES | _PARTS | _MASKED


def enter_once(emission: Emission) -> None:
    """Rewrites the emitted graph in place."""
    learned = _learned(emission.graph)
    chains = {
        node: _chain(node.args[0], learned)  # type: ignore[arg-type]
        for node in emission.graph.nodes
        if node.op == "call_module" and isinstance(emission.modules[node.target], CopyTo)
    }
    uses = Counter(n for chain in chains.values() for n in chain)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node, chain in chains.items():
        groups.setdefault(_source(chain, uses), []).append(node)
    for source, entering in groups.items():
        if source.op == "call_function" and _gains(
            source, [_upto(chains[n], source) for n in entering]
        ):
            _move(emission, source, {n: _upto(chains[n], source) for n in entering})


def _source(chain: list[fx.Node], uses: Counter[fx.Node]) -> fx.Node:
    """The nearest value that others are taken from, too; else the one that is copied."""
    copied = [i for i, n in enumerate(chain[:-1]) if n.target in _COPIES]
    shared = [i for i, n in enumerate(chain) if uses[n] > 1 and _is_tensor(n)]
    return chain[shared[0] if shared else copied[-1] + 1 if copied else 0]


def _is_tensor(value: fx.Node) -> bool:
    return isinstance(value.meta.get("val"), torch.Tensor)


def _upto(chain: list[fx.Node], source: fx.Node) -> list[fx.Node]:
    return chain[: chain.index(source) + 1]


def _learned(graph: fx.Graph) -> set[fx.Node]:
    """What may have a gradient: a mask of token numbers has none, in whatever dtype."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        made = node.op != "call_function" or not found.isdisjoint(node.all_input_nodes)
        if made and _has_gradient(node):
            found.add(node)
    return found


def _chain(value: fx.Node, learned: set[fx.Node]) -> list[fx.Node]:
    """From what enters back to what it is taken from."""
    chain = [value]
    while True:
        node = chain[-1]
        if node.op != "call_function" or node.target not in _MOVABLE:
            return chain
        given = [i for i in node.all_input_nodes if i in learned]
        if len(given) != 1 or (node.target is aten.slice.Tensor and not _is_run(node)):
            return chain
        if node.target is operator.getitem and given[0].target not in _PARTS:
            return chain
        chain.append(given[0])


def _is_run(node: fx.Node) -> bool:
    """Whether a slice takes positions next to each other, whatever the tokens are."""
    found, size = arguments(node), shape_of(node.args[0])  # type: ignore[arg-type]
    start, end, of = found["start"], found["end"], size[found["dim"]]
    known = all(isinstance(n, int) for n in (start, end, of))
    return known and found["step"] == 1 and 0 <= start <= end <= of


def _has_gradient(value: fx.Node) -> bool:
    found = value.meta.get("val")
    if isinstance(found, (int, torch.SymInt)):  # a size
        return False
    if isinstance(found, (tuple, list)):
        found = found[0]
    return not isinstance(found, torch.Tensor) or found.is_floating_point() or found.is_complex()


def _gains(source: fx.Node, chains: list[list[fx.Node]]) -> bool:
    if not _is_tensor(source):
        return False
    repeated = any(n.target in _COPIES for chain in chains for n in chain[:-1])
    picked = [c for c in chains if any(n.target in _PICKS | _MASKED for n in c[:-1])]
    if len(chains) < 2:
        return repeated
    known = all(_is_tensor(c[0]) for c in chains)
    by_data = any(n.target is aten.index.Tensor for c in picked for n in c)
    pieces = sum(_elements(c[0]) for c in chains) if known and not by_data else 0
    return by_data or pieces >= _elements(source)


def _elements(value: fx.Node) -> int:
    return int(torch.Size(unit_shape(value)).numel())


def _move(emission: Emission, source: fx.Node, chains: dict[fx.Node, list[fx.Node]]) -> None:
    graph, first = emission.graph, next(iter(chains))
    with graph.inserting_after(source):
        entered = graph.call_module(str(first.target), (source,))
    entered.meta = {k: v for k, v in first.meta.items() if k != "val"}
    made: dict[fx.Node, fx.Node] = {source: entered}
    for node, chain in chains.items():
        for step in reversed(chain[:-1]):
            if step not in made:
                with graph.inserting_after(step):
                    made[step] = graph.node_copy(step, lambda n: made.get(n, n))
                    _same_on_all(made[step])
                made[step].meta = {k: v for k, v in step.meta.items() if k != "val"}
        node.replace_all_uses_with(made[chain[0]])
        graph.erase_node(node)
        if node is not first:
            del emission.modules[str(node.target)]
    kept = set(emission.modules)
    emission.calls[:] = [(key, origin) for key, origin in emission.calls if key in kept]
    for step in reversed(list(graph.nodes)):
        if step in made and not step.users and step is not source:
            graph.erase_node(step)


def _same_on_all(node: fx.Node) -> None:
    """A slice of local work is this rank's part; one that all ranks take is a `narrow`."""
    if node.target is aten.slice.Tensor:
        found = arguments(node)
        start, end = found["start"], found["end"]
        node.args = (found["self"], found["dim"], start, end - start)
        node.target, node.kwargs = aten.narrow.default, {}
