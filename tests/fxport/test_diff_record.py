"""The diff names what changed and nothing else."""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxport.diff import Change, GraphDiff

aten = torch.ops.aten


def chain(scales: list[float], swap: int = -1) -> fx.GraphModule:
    """One multiplication and one gelu per layer."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for i, scale in enumerate(scales):
        value = graph.call_function(aten.mul.Tensor, (value, scale))
        value.meta["nn_module_stack"] = {"": (f"h.{i}", "")}
        op = aten.silu.default if i == swap else aten.gelu.default
        value = graph.call_function(op, (value,))
        value.meta["nn_module_stack"] = {"": (f"h.{i}", "")}
    graph.output(value)
    return fx.GraphModule({}, graph)


def found(diff: GraphDiff) -> list[tuple[Change, str]]:
    return [(r.change, (r.before or r.after).key) for r in diff.changes]  # type: ignore[union-attr]


def test_between_names_only_what_changed() -> None:
    base = chain([2.0] * 5)
    assert not GraphDiff.between(base, chain([2.0] * 5))
    constant = GraphDiff.between(base, chain([2.0, 2.0, 3.0, 2.0, 2.0]))
    assert found(constant) == [(Change.CHANGED, "h.2/mul")]
    swapped = GraphDiff.between(base, chain([2.0] * 5, swap=2))
    assert found(swapped) == [(Change.REPLACED, "h.2/gelu")]


def test_recorded_events_and_arguments_no_hook_sees() -> None:
    gm = chain([2.0] * 4)
    nodes = list(gm.graph.nodes)
    with GraphDiff(gm) as diff, diff.pass_("swap"):
        with gm.graph.inserting_after(nodes[4]):
            new = gm.graph.call_function(aten.silu.default, nodes[4].args)
            lost = gm.graph.call_function(operator.add, (new, 1))
        nodes[4].replace_all_uses_with(new)
        gm.graph.erase_node(lost)
        gm.graph.erase_node(nodes[4])
        nodes[7].args = (nodes[7].args[0], 9.0)
    assert found(diff) == [(Change.REPLACED, "h.1/gelu"), (Change.CHANGED, "h.3/mul")]
    assert {row.made_by for row in diff.changes} == {"swap"}
    assert torch.equal(diff.before(torch.ones(3)), chain([2.0] * 4)(torch.ones(3)))
