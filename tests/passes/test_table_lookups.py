"""Token ids in other ways than through `embedding`: the same numbers, one `embedding` each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxport.capture.export import capture
from fxport.passes.table_lookups import look_up_in_tables

V, C = 41, 24


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, C))
        self.columns = nn.Linear(V, C)
        self.other = nn.Parameter(torch.randn(7, C))
        self.three = nn.Parameter(torch.randn(V, 2, C))


def indexed(model: Model, ids: Tensor) -> Tensor:
    return model.table[ids]


def indexed_with_colon(model: Model, ids: Tensor) -> Tensor:
    return model.table[ids, :]


def selected(model: Model, ids: Tensor) -> Tensor:
    return model.table.index_select(0, ids.reshape(-1)).view(*ids.shape, C)


def hot(model: Model, ids: Tensor) -> Tensor:
    return F.one_hot(ids, V).float() @ model.table


def hot_linear(model: Model, ids: Tensor) -> Tensor:
    return model.columns(F.one_hot(ids, num_classes=V).to(torch.float32))


def hashed(model: Model, ids: Tensor) -> Tensor:
    return model.other[ids % 7]


def columns(model: Model, ids: Tensor) -> Tensor:
    return model.table[:, ids % C].permute(1, 2, 0)


def three_axes(model: Model, ids: Tensor) -> Tensor:
    return model.three[ids].flatten(2)


def pairs(model: Model, ids: Tensor) -> Tensor:
    return model.table[ids, ids % C][..., None]


def soft(model: Model, ids: Tensor) -> Tensor:
    return (F.one_hot(ids, V) + 0.5).float() @ model.table


def previous(model: Model, ids: Tensor) -> Tensor:
    return model.table[ids - 1]  # of id 0: the last row


TAKEN = [indexed, indexed_with_colon, selected, hot, hot_linear, hashed]
LEFT = [previous, columns, three_axes, pairs, soft]


@pytest.mark.parametrize("way", [*TAKEN, *LEFT], ids=lambda way: way.__name__)
def test_look_ups(way) -> None:
    torch.manual_seed(3)
    model = type("Made", (Model,), {"forward": way})()
    captured = capture(model)
    graph = captured.graph
    tokens = next(n for n in graph.graph.nodes if n.name == captured.tokens)
    expected = 1 if way in TAKEN else 0
    assert look_up_in_tables(graph, tokens) == expected
    graph.graph.eliminate_dead_code()
    graph.recompile()
    embeddings = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    assert len(embeddings) == expected
    ids = torch.randint(0, V, (3, 11))
    values = [
        ids if n.name == captured.tokens else n.meta["input"].value
        for n in graph.graph.find_nodes(op="placeholder")
    ]
    with torch.no_grad():
        found = graph(*values)
        found = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(found, model(ids), rtol=1e-6, atol=1e-6)
