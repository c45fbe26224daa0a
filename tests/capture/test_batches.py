"""A graph must hold for every number of rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxport.capture.batches import asked_about_rows
from fxport.capture.export import capture
from fxport.errors import PortError, ReasonCode
from fxport.parallel.api import parallelize_all
from fxport.parallel.context import ParallelContext

_VOCAB, _WIDTH = 29, 12


class _Asks(nn.Module):
    """Four layers that compute something else for some numbers of rows."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCAB, _WIDTH)
        self.layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.head = nn.Linear(_WIDTH, _VOCAB)
        self.combine = combine

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = self.combine(x, layer(x).relu())
        return self.head(x)


def _one_row(x: Tensor, y: Tensor) -> Tensor:
    return x + y if x.shape[0] == 1 else x - y


def _more_than_two(x: Tensor, y: Tensor) -> Tensor:
    return x + y if x.shape[0] > 2 else x - y


def _every_third(x: Tensor, y: Tensor) -> Tensor:
    return x - y if x.shape[0] % 3 else x + y


def _far(x: Tensor, y: Tensor) -> Tensor:
    return x + y if x.shape[0] < 200 else x - y


def _as_a_number(x: Tensor, y: Tensor) -> Tensor:
    return x + y if int(x.shape[0]) == 1 else x - y


def _causal_rows(x: Tensor, y: Tensor) -> Tensor:
    return y + F.scaled_dot_product_attention(x, x, x, is_causal=x.shape[0] > 1)


def _in_arithmetic(x: Tensor, y: Tensor) -> Tensor:
    return x + y * (1 + 0.5 * (x.shape[0] > 1))


def _as_whole_number(x: Tensor, y: Tensor) -> Tensor:
    return x + y * (1 + int(x.shape[0] > 1))  # 2 for two rows and 1 for one, as the rows are


def _negated(x: Tensor, y: Tensor) -> Tensor:
    return x + y * (1 + torch.sym_not(x.shape[0] == 1))


def _as_key(x: Tensor, y: Tensor) -> Tensor:
    return x + y * {True: 2.0, False: 1.0}[x.shape[0] > 1]


def _half_cut_off(x: Tensor, y: Tensor) -> Tensor:
    return x + y * (1 + int(x.shape[0] / 2))


def _fraction(x: Tensor, y: Tensor) -> Tensor:
    return x + y if x.shape[0] / 1.0 - 1 else x - y


def _of_all_tokens(x: Tensor, y: Tensor) -> Tensor:
    return x + y if x.shape[0] * x.shape[1] > x.shape[1] else x - y


_IN_NUMBERS = [_in_arithmetic, _as_whole_number, _negated, _as_key, _half_cut_off, _fraction]
_DEPENDING = [_one_row, _more_than_two, _every_third, _far, _as_a_number, _causal_rows]
_DEPENDING += [*_IN_NUMBERS, _of_all_tokens]


@pytest.mark.parametrize("combine", _DEPENDING)
def test_what_depends_on_the_number_of_rows_is_refused(combine: Callable[..., Tensor]) -> None:
    with pytest.raises(PortError) as refused:
        capture(_Asks(combine))
    (reason,) = refused.value.reasons
    assert reason.location is not None and reason.location.file == __file__
    assert reason.location.line == combine.__code__.co_firstlineno + 1
    others = (_more_than_two, _every_third, _causal_rows)  # at the lengths that are captured
    if combine not in others:
        assert reason.code is ReasonCode.DEPENDS_ON_BATCH


def _same_for_one(x: Tensor, y: Tensor) -> Tensor:
    if x.shape[0] == 1:
        return torch.add(x, y)
    return x + y


def _checked(x: Tensor, y: Tensor) -> Tensor:
    if x.shape[0] == 0:
        raise ValueError("no rows")
    return x + y * x.shape[0]


def _at_most_eight(x: Tensor, y: Tensor) -> Tensor:
    assert x.shape[0] <= 8, "the caches have no more rows"
    return x + y


@pytest.mark.parametrize("combine", [_same_for_one, _checked, _at_most_eight])
def test_what_asks_and_computes_the_same_is_divided(combine: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = _Asks(combine).double().eval()
    contexts = ParallelContext.simulated(2)
    modules = parallelize_all(model, contexts)
    for rows in (1, 2, 3):
        ids = torch.randint(_VOCAB, (rows, 7))
        for found in contexts[0].group.run(lambda rank, ids=ids: modules[rank](ids)):
            torch.testing.assert_close(found, model(ids))


def _beyond_a_gap(x: Tensor, y: Tensor) -> Tensor:
    if x.shape[0] > 8:
        assert x.shape[0] > 9
        return x - y
    return x + y


def _fails_on_shapes(x: Tensor, y: Tensor) -> Tensor:
    if x.shape[0] > 8:
        return x - y * float(y.max())
    return x + y


@pytest.mark.parametrize("combine", [_beyond_a_gap, _fails_on_shapes])
def test_a_number_of_rows_that_forward_does_not_take_hides_no_other(
    combine: Callable[..., Tensor],
) -> None:
    with pytest.raises(PortError) as refused:
        capture(_Asks(combine))
    assert refused.value.reasons[0].code is ReasonCode.DEPENDS_ON_BATCH


class _Rows(_Asks):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.stack([layer(row).relu() for row in x])
        return self.head(x)


def test_a_loop_over_the_rows_is_not_captured_for_one_number_of_them() -> None:
    with pytest.raises(PortError) as refused:
        capture(_Rows(_one_row))
    (reason,) = refused.value.reasons
    assert reason.location is not None and reason.location.file == __file__


class _TakesNumbers(_Asks):
    """Asks how many rows there are after it took a number that shapes do not tell."""

    def forward(self, ids: Tensor) -> Tensor:
        self.most = float(self.embed(ids).max())
        return super().forward(ids)


def test_what_is_asked_once_shapes_are_not_enough_counts_as_asked() -> None:
    """One row, and the numbers that the code names."""
    questions, rows = asked_about_rows(_TakesNumbers(_one_row), 5)
    for number in (1, 4):
        assert any(question.otherwise(rows, number, 2) for question in questions)
    questions, rows = asked_about_rows(_Asks(torch.add), 5)
    assert not any(question.otherwise(rows, 1, 2) for question in questions)
