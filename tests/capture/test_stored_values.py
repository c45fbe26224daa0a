"""Forward may ask about its own buffers; not about anything else, nor about what it writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxport.capture.export import capture
from fxport.capture.inputs import graph_input
from fxport.errors import PortError

Forward = Callable[["Asking", Tensor], Tensor]


class Asking(nn.Module):
    """Four layers; `ask` is called before each."""

    def __init__(self, ask: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(29, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 29)
        self.register_buffer("table", torch.randn(24, 8), persistent=False)
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("ready", torch.tensor(False))
        self.register_buffer("even", torch.arange(8) % 2 == 0)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.ask = ask

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.table[: ids.shape[1]]
        for layer in self.layers:
            x = layer(self.ask(self, x)).tanh()
        return self.head(x)


def rebuilt_if_lost(model: Asking, x: Tensor) -> Tensor:
    if model.table[0, 0] == 0:
        model.table = torch.ones(24, 8)
    return x


def number(model: Asking, x: Tensor) -> Tensor:
    return x * model.scale.item() + float(model.scale)


def loop(model: Asking, x: Tensor) -> Tensor:
    for _ in range(int(model.steps)):
        x = x.tanh()
    return x if model.ready else 2 * x


def whole_table(model: Asking, x: Tensor) -> Tensor:
    return x.exp() if (model.table.abs() < 1).all() else x.cos()


def beside_a_plain_length(model: Asking, x: Tensor) -> Tensor:
    return x * (2.0 if int(x.shape[1]) > 0 and model.table[0, 0] != 0 else 1.0)


def at_features(model: Asking, x: Tensor) -> Tensor:
    """In loralib they are kept in no buffer."""
    y = x.new_zeros(*x.shape[:-1], 8).view(-1, 8)
    y[:, model.even] = x.reshape(-1, 8)[:, :4]
    y[:, ~model.even] += x[..., model.even].view(-1, 4)
    return y.view_as(x)


ASKED = [rebuilt_if_lost, number, loop, whole_table, beside_a_plain_length, at_features]


@pytest.mark.parametrize("ask", ASKED)
def test_the_buffer_answers(ask: Forward) -> None:
    model = Asking(ask).eval()
    graph = capture(model).graph
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    ids = torch.randint(0, 29, (3, 19))
    inputs = [graph_input(n) for n in graph.graph.find_nodes(op="placeholder")]
    made = {i.name: i.value for i in inputs if i.value is not None}
    given = [values.get(i.name, made.get(i.name, ids)) for i in inputs]
    with torch.no_grad():
        torch.testing.assert_close(graph(*given), model(ids), rtol=0, atol=0)


def parameter(model: Asking, x: Tensor) -> Tensor:
    return 2 * x if model.gain > 0 else x


def written_after(model: Asking, x: Tensor) -> Tensor:
    y = x if model.ready else 2 * x
    model.ready.fill_(True)
    return y


def written_through_a_view(model: Asking, x: Tensor) -> Tensor:
    y = x if model.table[0, 0] == 0 else 2 * x
    model.table[1].zero_()
    return y


def written_before(model: Asking, x: Tensor) -> Tensor:
    model.steps.add_(1)
    return x if model.steps == 4 else 2 * x


def features_written_after(model: Asking, x: Tensor) -> Tensor:
    y = x.clone()
    y[..., model.even] = 0.5
    z = y + x.new_zeros(8).index_put((model.even,), x.new_ones(()))
    model.even.logical_not_()
    return z


def another_each_time(model: Asking, x: Tensor) -> Tensor:
    return x if torch.rand_like(model.scale) > 2 else 2 * x


def of_the_length(model: Asking, x: Tensor) -> Tensor:
    return x if model.table[x.shape[1] - 1, 0] > 9 else 2 * x


def of_the_rows_as_a_number(model: Asking, x: Tensor) -> Tensor:
    return x if model.table[int(x.shape[1]) * 0 + int(x.shape[0]), 0] > 9 else 2 * x


@pytest.mark.parametrize(
    "ask",
    [
        parameter, written_after, features_written_after, written_through_a_view, written_before,
        another_each_time, of_the_length, of_the_rows_as_a_number,
    ],
)  # fmt: skip
def test_nothing_else_is_known(ask: Forward) -> None:
    with pytest.raises(PortError) as refused:
        capture(Asking(ask).eval())
    where = refused.value.reasons[0].location
    assert where is not None and where.function in (ask.__name__, "forward")
