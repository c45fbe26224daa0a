"""One token and one row are computed as all others are, or not taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxport
from fxport.errors import FxportError
from fxport.parallel.api import parallelize_all
from fxport.parallel.context import ParallelContext
from fxport.parallel.sizes import KnownSizes, Smallest
from tests.parallel.simulation import randomised

Change = Callable[[nn.Module, Tensor], Tensor]
_VOCAB, _WIDTH = 29, 12


class Changed(nn.Module):
    """Four layers; something is done to what the last one gives."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCAB, _WIDTH)
        self.layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.step, self.head = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _VOCAB)
        self.change = change

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(self.change(self.step, x))


def _other_layer(step: nn.Module, x: Tensor) -> Tensor:
    return step(x) if x.shape[1] == 1 else x


def _as_a_number(step: nn.Module, x: Tensor) -> Tensor:
    return x * 2 if int(x.shape[1]) < 2 else x


def _without_gradient(step: nn.Module, x: Tensor) -> Tensor:
    return x.detach() if x.shape[1] == 1 else x


def _one_axis_fewer(step: nn.Module, x: Tensor) -> Tensor:
    return x * x.squeeze(1).dim()


def _one_row_fewer(step: nn.Module, x: Tensor) -> Tensor:
    return x * x.squeeze(0).dim()


TOKENS, ROWS = [_other_layer, _as_a_number, _without_gradient, _one_axis_fewer], [_one_row_fewer]


def _smallest(model: nn.Module) -> Smallest:
    found = fxport.parallelize(model, ParallelContext(0, 2)).get_submodule("fxport_sizes")
    assert isinstance(found, KnownSizes)
    return found.smallest


@pytest.mark.parametrize("change", TOKENS + ROWS)
def test_what_differs_for_one_is_not_taken(change: Change) -> None:
    model = randomised(Changed(change))
    ranks = parallelize_all(model, contexts := ParallelContext.simulated(2))
    one = (1, 5) if change in ROWS else (2, 1)
    with pytest.raises(FxportError, match=r"at least \d x \d: .*numbers or gradients for one"):
        ranks[0](torch.zeros(*one, dtype=torch.long))
    for rows, tokens in ((3, 5), (2, 5), (5, 2)):
        ids = torch.randint(0, _VOCAB, (rows, tokens))
        for found in contexts[0].group.run(lambda rank, ids=ids: ranks[rank](ids)):
            torch.testing.assert_close(found, model(ids))


@pytest.mark.parametrize("change", TOKENS + ROWS)
def test_the_line_that_asks_is_named(change: Change) -> None:
    reason = _smallest(Changed(change)).reason
    assert reason is not None and reason.location is not None
    # Nobody asks by a squeeze; then forward as a whole is named.
    assert reason.location.function in (change.__name__, "forward")
    assert change in (_one_axis_fewer, _one_row_fewer) or reason.location.function != "forward"


def test_zeros_do_not_hide_it() -> None:
    model = Changed(_other_layer)
    nn.init.zeros_(model.head.weight)
    assert _smallest(model).tokens == 2


def test_without_numbers_nobody_may_ask() -> None:
    with torch.device("meta"):
        asks, same = Changed(_other_layer), Changed(lambda step, x: x)
    found = _smallest(asks)
    assert found.tokens == found.rows == 2 and found.reason is not None
    assert "meta device" in found.reason.message
    assert found.reason.location is not None
    assert found.reason.location.function == "_other_layer"
    assert not hasattr(fxport.parallelize(same, ParallelContext(0, 2)), "fxport_sizes")


def _nothing_to_add(step: nn.Module, x: Tensor) -> Tensor:
    return x + step(x) if x.shape[1] == 1 else x + step(x) * (1 + 0 * x.shape[1])


def _no_mask(step: nn.Module, x: Tensor) -> Tensor:
    scores = step(x) @ x.transpose(1, 2)
    if x.shape[1] > 1:
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), float("-inf"))
    return x + scores.softmax(-1) @ x


def _alone(step: nn.Module, x: Tensor) -> Tensor:
    """The gradient of `step` is zero there; without it there is none."""
    return x + x if x.shape[1] == 1 else _no_mask(step, x)


@pytest.mark.parametrize("change", [_nothing_to_add, _no_mask, _alone])
def test_a_shortcut_for_one_token_that_computes_the_same(change: Change) -> None:
    model = randomised(Changed(change))
    ranks = parallelize_all(model, contexts := ParallelContext.simulated(2))
    for rows, tokens in ((2, 1), (1, 1), (1, 5)):
        ids = torch.randint(0, _VOCAB, (rows, tokens))
        for found in contexts[0].group.run(lambda rank, ids=ids: ranks[rank](ids)):
            torch.testing.assert_close(found, model(ids))


def _in_training_mode(step: nn.Module, x: Tensor) -> Tensor:
    return x + step(x) if step.training and x.shape[1] == 1 else x


def _rows_in_training_mode(step: nn.Module, x: Tensor) -> Tensor:
    return x.detach() if step.training and int(x.shape[0]) == 1 else x


class Dropped(Changed):
    """The same with dropout, of values and of weights."""

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.dropout(self.embed(ids), 0.3, self.training)
        p = 0.2 if self.training else 0.0
        sdpa = nn.functional.scaled_dot_product_attention
        x = x + sdpa(*(layer(x)[:, None] for layer in self.layers[:3]), dropout_p=p)[:, 0]
        return self.head(self.change(self.step, x))


@pytest.mark.parametrize("kind", [Changed, Dropped])
def test_one_token_that_differs_in_training_mode_alone(kind: type[Changed]) -> None:
    found = _smallest(randomised(kind(_in_training_mode)).train())
    assert (found.rows, found.tokens) == (1, 2)
    assert found.reason is not None and "one token in training mode" in found.reason.message
    assert found.reason.location is not None
    assert found.reason.location.function == "_in_training_mode"
    evaluating = fxport.parallelize(randomised(kind(_in_training_mode)), ParallelContext(0, 1))
    if kind is Dropped:  # cannot be put into training mode
        assert not hasattr(evaluating, "fxport_sizes")
    else:
        assert evaluating.get_submodule("fxport_sizes").smallest == found
    with torch.device("meta"):
        unknown = kind(_in_training_mode).train()
    assert _smallest(unknown).tokens == 2


def test_one_row_that_differs_in_training_mode_alone() -> None:
    model = randomised(Changed(_rows_in_training_mode))
    evaluating = fxport.parallelize(model, ParallelContext(0, 1))
    with pytest.raises(FxportError, match="in training mode"):
        evaluating.train()
    with pytest.raises(FxportError, match="batch of 1"):
        fxport.parallelize(model.train(), ParallelContext(0, 1))


def test_dropout_alone_is_no_difference() -> None:
    for training in (True, False):
        model = randomised(Dropped(lambda step, x: x)).train(training)
        rank = fxport.parallelize(model, ParallelContext(0, 1))
        assert not hasattr(rank, "fxport_sizes")
