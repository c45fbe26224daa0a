"""One token and one row are computed as all others are, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxport
from fxport.errors import PortError
from fxport.parallel.api import parallelize_all
from fxport.parallel.context import ParallelContext
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


REFUSED = [_other_layer, _as_a_number, _without_gradient, _one_axis_fewer, _one_row_fewer]


@pytest.mark.parametrize("change", REFUSED)
def test_what_differs_for_one_is_refused(change: Change) -> None:
    with pytest.raises(PortError) as refused:
        parallelize_all(Changed(change), ParallelContext.simulated(2))
    (reason,) = refused.value.reasons
    assert reason.location is not None
    # Nobody asks by a squeeze; then forward as a whole is named.
    assert reason.location.function in (change.__name__, "forward")
    assert change in (_one_axis_fewer, _one_row_fewer) or reason.location.function != "forward"


def test_zeros_do_not_hide_it() -> None:
    model = Changed(_other_layer)
    nn.init.zeros_(model.head.weight)
    with pytest.raises(PortError):
        parallelize_all(model, ParallelContext.simulated(2))


def test_without_numbers_nobody_may_ask() -> None:
    with torch.device("meta"):
        asks, same = Changed(_other_layer), Changed(lambda step, x: x)
    with pytest.raises(PortError, match="meta device") as refused:
        fxport.parallelize(asks, ParallelContext(0, 2))
    location = refused.value.reasons[0].location
    assert location is not None and location.function == "_other_layer"
    fxport.parallelize(same, ParallelContext(0, 2))


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
