"""Graphs as data: an exact round trip, and one clear error for everything else."""

from __future__ import annotations

import contextlib
import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from fxport.errors import SavedPortError
from fxport.graph_json import part_from_dict, part_to_dict
from fxport.passes.tokens.rules import has_rule
from fxport.serving import Part

aten = torch.ops.aten
CPU = torch.device("cpu")


def example() -> Part:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w0")
    size = graph.call_function(aten.sym_size.int, (x, 1))
    y = graph.call_function(aten.linear.default, (x, w))
    y = graph.call_function(aten.view.default, (y, [1, size, 2, 3]))
    parts = graph.call_function(aten.split.Tensor, (y, 1, 2))
    import operator

    first = graph.call_function(operator.getitem, (parts, 0))
    mask = graph.call_function(aten.full.default, ([1], -math.inf), {"dtype": torch.float32})
    z = graph.call_function(aten.add.Tensor, (first, mask), {"alpha": 0.5})
    graph.output(graph.call_function(aten.to.dtype, (z, torch.float64)))
    return Part(graph, ("x",), {"w0": "layers.0.weight"})


def text(part: Part) -> dict:
    return json.loads(json.dumps(part_to_dict(part, has_rule, torch.bfloat16), allow_nan=False))


def run(part: Part, *inputs: torch.Tensor) -> torch.Tensor:
    return fx.GraphModule(torch.nn.Module(), part.graph)(*inputs)


def test_round_trip_is_exact():
    x, w = torch.randn(1, 5, 4), torch.randn(6, 4)
    record = text(example())
    again = part_from_dict(record, has_rule, torch.bfloat16, CPU)
    assert torch.equal(run(again, x, w), run(example(), x, w))
    assert text(again) == record
    assert again.inputs == ("x",)
    assert again.weights == {"w0": "layers.0.weight"}


def node(record: dict, op: str) -> dict:
    return next(n for n in record["nodes"] if n["op"] == op)


DAMAGE = {
    "not an object": lambda r: [],
    "unknown op": lambda r: node(r, "aten.linear.default").update(op="aten.load.default"),
    "op of another library": lambda r: node(r, "aten.linear.default").update(op="os.system"),
    "python attribute as op": lambda r: node(r, "aten.linear.default").update(
        op="aten.__class__.x"
    ),
    "call_module": lambda r: node(r, "aten.linear.default").update(op="call_module"),
    "mutating op": lambda r: node(r, "aten.linear.default").update(op="aten.relu_.default"),
    "file op": lambda r: node(r, "aten.linear.default").update(op="aten.from_file.default"),
    "cycle": lambda r: node(r, "aten.linear.default")["args"].__setitem__(0, {"node": "add"}),
    "missing node": lambda r: node(r, "aten.add.Tensor")["args"].__setitem__(0, {"node": "no"}),
    "bad name": lambda r: node(r, "aten.add.Tensor").update(name="x); import os; ("),
    "keyword as name": lambda r: node(r, "aten.add.Tensor").update(name="import"),
    "name twice": lambda r: node(r, "aten.add.Tensor").update(name="linear"),
    "no output": lambda r: r["nodes"].pop(),
    "extra after output": lambda r: r["nodes"].append({"name": "q", "op": "placeholder"}),
    "weights missing": lambda r: r["weights"].clear(),
    "bad keyword": lambda r: node(r, "aten.add.Tensor")["kwargs"].update({"a b": 1}),
    "unknown object": lambda r: node(r, "aten.add.Tensor")["args"].append({"code": "1"}),
    "two keys": lambda r: node(r, "aten.add.Tensor")["args"].append({"node": "x", "dtype": "b"}),
    "unknown dtype": lambda r: node(r, "aten.to.dtype")["args"].__setitem__(1, {"dtype": "Tensor"}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_gives_one_clear_error(damage):
    record = copy.deepcopy(text(example()))
    changed = damage(record)
    with pytest.raises(SavedPortError):
        part_from_dict(
            changed if isinstance(changed, list) else record, has_rule, torch.bfloat16, CPU
        )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(data):
    """Replace one value somewhere in the record: a graph, or a SavedPortError, nothing else."""
    record = text(example())
    holder, key = record, data.draw(st.sampled_from(sorted(record)))
    while isinstance(holder[key], dict | list) and holder[key] and data.draw(st.booleans()):
        holder = holder[key]
        keys = sorted(holder) if isinstance(holder, dict) else range(len(holder))
        key = data.draw(st.sampled_from(list(keys)))
    holder[key] = data.draw(JSON)
    with contextlib.suppress(SavedPortError):
        part_from_dict(record, has_rule, torch.bfloat16, CPU)
