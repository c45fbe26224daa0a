"""The head is found whatever follows the projection, and a choice of the last position undone."""

import pytest
import torch
from torch import nn

import fxport
from fxport.capture.arguments import shape_of
from fxport.capture.export import capture
from fxport.errors import PortError, ReasonCode
from fxport.passes.head import find_head

V, C = 45, 18


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(V, C)
        self.norm = nn.LayerNorm(C)
        self.out = nn.Linear(C, V)

    def logits(self, h):
        raise NotImplementedError

    def forward(self, ids):
        return self.logits(self.norm(self.emb(ids)))


def index_last(self, h):
    return self.out(h[:, [-1], :])


def slice_last(self, h):
    return self.out(h[:, -1:, :])


def select_last(self, h):
    return self.out(h[:, -1])


def after_projection(self, h):
    return self.out(h)[:, -1, :]


def by_length(self, h):
    return self.out(h[:, h.shape[1] - 1])


def capped(self, h):
    return 30.0 * torch.tanh(self.out(h[:, -1:]) / 30.0)


def log_probabilities(self, h):
    return self.out(h).float().log_softmax(-1)


def tied(self, h):
    return h @ self.emb.weight.t()


def einsum(self, h):
    return torch.einsum("btc,vc->btv", h, self.emb.weight) * 0.5


def two_projections(self, h):
    return self.out(h) + h @ self.emb.weight.t()


def mixture(self, h):
    """Of two softmaxes, weighted by the state."""
    weights = h[..., :2].softmax(-1)
    parts = torch.stack((self.out(h), self.out(h.tanh())), -2).softmax(-1)
    return (weights[..., None] * parts).sum(-2).log()


def last_before_a_norm(self, h):
    return self.out(self.norm(h[:, [-1]] * 2.0))


def last_before_a_norm_by_hand(self, h):
    last = h[:, -1]
    return self.out(last * torch.rsqrt(last.square().mean(-1, keepdim=True) + 1e-5))


def last_twice(self, h):
    return self.out(h[:, -1:])[:, -1]


def of_each_row(self, h):
    return self.out(h[torch.arange(h.shape[0]), -1])


def narrowed_and_squeezed(self, h):
    return self.out(h.narrow(1, h.shape[1] - 1, 1)).squeeze(1)


def squeezed_before(self, h):
    return self.out(h[:, -1:].squeeze(1) * 2.0)


def time_first(self, h):
    return self.out(h.transpose(0, 1).tanh()[-1])


def time_first_after_projection(self, h):
    return self.out(h.transpose(0, 1))[-1]


LAST = [
    of_each_row,
    narrowed_and_squeezed,
    squeezed_before,
    time_first,
    time_first_after_projection,
    last_twice,
    last_before_a_norm,
    last_before_a_norm_by_hand,
    index_last,
    slice_last,
    select_last,
    after_projection,
    by_length,
    capped,
]
ALL = [*LAST, two_projections, mixture, log_probabilities, tied, einsum]


@pytest.mark.parametrize("logits", ALL, ids=lambda f: f.__name__)
def test_logits_of_every_position(logits):
    model = type("M", (Model,), {"logits": logits})().eval()
    captured = capture(model)
    head = find_head(captured.graph, captured.length)
    assert shape_of(head.logits) == (captured.batch, captured.length, V)
    turned = logits is time_first_after_projection
    sizes = (captured.length, captured.batch) if turned else (captured.batch, captured.length)
    assert shape_of(head.hidden) == (*sizes, C)
    removed = [d for d in head.decisions if "last position" in d.subject]
    assert len(removed) == (2 if logits is last_twice else 1 if logits in LAST else 0)
    ids = torch.randint(0, V, (2, 5))
    state = {**captured.parameters}
    inputs = [
        ids if n.name == captured.tokens else state.get(n.meta["input"].name, n.meta["input"].value)
        for n in captured.graph.graph.find_nodes(op="placeholder")
    ]
    captured.graph.recompile()
    found = captured.graph(*inputs)
    for t in range(1, 6):  # the original at every prefix, its last position
        expected = model(ids[:, :t])
        expected = expected[:, -1] if expected.dim() == 3 else expected
        torch.testing.assert_close(found[:, t - 1], expected)


def first(self, h):
    return self.out(h[:, :1])


def last_row(self, h):
    return self.out(h[-1])


@pytest.mark.parametrize("logits", [first, last_row], ids=lambda f: f.__name__)
def test_another_position_is_not_the_last(logits):
    model = type("M", (Model,), {"logits": logits})()
    captured = capture(model)
    head = find_head(captured.graph, captured.length)
    assert not [d for d in head.decisions if "last position" in d.subject]


def test_two_states_are_refused():
    def both(self, h):
        return self.out(h) + self.emb(self.ids)[..., :1]

    class Keeps(Model):
        def forward(self, ids):
            self.ids = ids
            return super().forward(ids)

    captured = capture(type("M", (Keeps,), {"logits": both})())
    with pytest.raises(PortError) as caught:
        find_head(captured.graph, captured.length)
    reason = caught.value.reasons[0]
    assert reason.code is ReasonCode.NO_VOCABULARY
    assert reason.location is not None and reason.location.file == __file__


class Attending(nn.Module):
    """One attention of one head, and its result is the last hidden state."""

    def __init__(self, last):
        super().__init__()
        self.emb, self.places = nn.Embedding(V, 32), nn.Embedding(64, 32)
        self.qkv, self.out, self.last = nn.Linear(32, 96), nn.Linear(32, V), last

    def forward(self, ids):
        t = ids.shape[1]
        x = self.emb(ids) + self.places(torch.arange(t, device=ids.device))
        q, k, v = self.qkv(x).chunk(3, -1)
        future = torch.ones(t, t, dtype=torch.bool, device=ids.device).triu(1)
        found = (q @ k.mT / 32**0.5).masked_fill(future, float("-inf")).softmax(-1) @ v
        return self.out(self.last(found))


def test_rows_that_are_not_every_row_are_refused():
    model = Attending(lambda h: h[torch.arange(h.shape[0]) * 0, -1])
    with pytest.raises(PortError) as caught:
        fxport.port(model)
    assert any(r.location and r.location.file == __file__ for r in caught.value.reasons)


ENDS = {
    "all": lambda h: h,
    "slice": lambda h: h[:, -1:],
    "each row": lambda h: h[torch.arange(h.shape[0]), -1],
    "squeezed": lambda h: h.narrow(1, h.shape[1] - 1, 1).squeeze(1),
    "time first": lambda h: h.transpose(0, 1)[-1],
}


@pytest.mark.parametrize("last", ENDS.values(), ids=ENDS)
def test_an_attention_may_be_the_last_hidden_state(last):
    model = Attending(last)
    port = fxport.port(model)
    assert len(port.serving.attention) == 1
    assert port.serving.head.graph.find_nodes(
        op="call_function", target=torch.ops.aten.linear.default
    )
    ids = torch.randint(0, V, (2, 9))
    torch.testing.assert_close(port.module(ids), model(ids))
