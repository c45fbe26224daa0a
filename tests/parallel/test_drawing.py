"""A plan as a graph diff: what the first rank runs in place of the model's graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import fxport
from fxport.diff import Change
from fxport.errors import FxportError
from fxport.parallel.plan import Plan
from tests.parallel.models import LAYERS, MODELS


def test_a_plan_is_drawn_as_a_graph_diff(tmp_path: Path) -> None:
    plan = fxport.plan(MODELS["separate"](), 2)
    diff = plan.diff()
    made = Counter(
        row.after.target.rsplit("_", 1)[0]
        for row in diff.changes
        if row.after is not None and row.after.op == "call_module"
    )
    # two of each for a block; embedding reduced, head entered and gathered
    assert made == {"copy_to": 2 * LAYERS + 1, "reduce_from": 2 * LAYERS + 1, "gather": 1}
    inputs = [row for row in diff.rows if row.before and row.before.op == "placeholder"]
    assert len(inputs) >= len(plan.parameters)
    assert all(row.change is Change.KEPT for row in inputs)
    words = {d.subject: d.detail for d in diff.decisions}
    for shard in plan.parameters:
        assert words[shard.name].startswith(shard.kind.replace("replicated", "whole"))
    table = diff.table()
    assert "copy_to" in table and "reduce_from" in table
    page = tmp_path / "plan.html"
    diff.to_html(page)
    up = plan.shard("blocks.0.mlp.up.weight")
    sizes = [" x ".join(map(str, s)) for s in (up.local_shape(0), up.shape)]
    assert f"column, {sizes[0]} of {sizes[1]}" in page.read_text()


def test_a_plan_made_by_hand_cannot_be_drawn() -> None:
    with pytest.raises(FxportError, match=r"fxport\.plan"):
        Plan(2, (), (), ()).diff()
