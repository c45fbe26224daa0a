"""What two lengths do not have in common is said: what differs, between which inputs, and where."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxport.capture.clone import clone_for_capture
from fxport.capture.sample import take_sample
from fxport.capture.unify import unify
from fxport.errors import PortError, ReasonCode

SIZES = ((2, 37), (3, 53), (4, 41))
BETWEEN = "differs between inputs of 2 x 37, 3 x 53, 4 x 41 tokens (rows x length)"


class Model(nn.Module):
    """Logits, and something that is done to them at this length; a short one is below 40."""

    def __init__(self, then: Callable[[Model, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.one, self.two = (nn.Parameter(torch.ones(11)) for _ in range(2))
        self.then = then

    def forward(self, ids: Tensor) -> Tensor:
        return self.then(self, self.head(self.embedding(ids)), ids.shape[1])


def by_rows(x: Tensor) -> Tensor:
    return torch.tensor([[[float(row)]] * x.shape[1] for row in range(x.shape[0])])


DIFFERENT: dict[str, Callable[[Model, Tensor, int], Tensor]] = {
    "the number of operations": lambda m, x, n: x if n < 40 else x * 2,
    "the operation (aten.sin.default, aten.tanh.default for 3 x 53)": lambda m, x, n: (
        x.sin() if n < 40 else x.tanh()
    ),
    "a number (1.0, 2.0, ...)": lambda m, x, n: x * (1.0 if n < 40 else 2.0),
    "a size (5, 9, ...)": lambda m, x, n: x + x[:, : 5 if n < 40 else 9].sum(1, keepdim=True),
    "the number of values": lambda m, x, n: torch.cat([x] * (2 if n < 40 else 3), -1)[..., :11],
    "which value is used": lambda m, x, n: (y := x.sin()) * (z := x.cos()) + (y if n < 40 else z),
    "which parameter is used": lambda m, x, n: x * (m.one if n < 40 else m.two),
    "the type of a constant": lambda m, x, n: (
        x * torch.tensor([2], dtype=torch.int64 if n < 40 else torch.int32)
    ),
    "the size of a constant": lambda m, x, n: x + torch.tensor([[1.0]] * (1 if n < 40 else n)),
    "a constant": lambda m, x, n: x * torch.tensor([1.0 if n < 40 else 2.0]),
    "a constant along the batch": lambda m, x, n: x + by_rows(x),
}


def refused(model: Model) -> str:
    clone = clone_for_capture(model.eval())
    samples = [take_sample(clone, *size) for size in SIZES]
    with pytest.raises(PortError) as caught:
        unify(samples, take_sample(clone, 2, 61))
    (reason,) = caught.value.reasons
    assert reason.code is ReasonCode.DEPENDS_ON_LENGTH
    assert reason.location is not None and reason.location.file == __file__
    return reason.message


@pytest.mark.parametrize("what", DIFFERENT)
def test_it_says_what_differs(what: str) -> None:
    message = refused(Model(DIFFERENT[what]))
    between = BETWEEN.replace(" tokens", ", 2 x 61 tokens")
    assert message == f"{what} {between}"


def test_a_table_that_longer_sequences_do_not_begin_with() -> None:
    model = Model(lambda m, x, n: x + torch.tensor([[i / n] for i in range(n)]))
    start = "a constant is not the beginning of what longer sequences use between inputs of"
    assert refused(model).startswith(start)


def test_where_shorter_sequences_have_one_table_that_length_is_named() -> None:
    def scaled(model: Model, x: Tensor, length: int) -> Tensor:
        angles = torch.arange(length) / (1.0 if length <= 53 else length / 53)
        return x + angles[:, None].cos()

    clone = clone_for_capture(Model(scaled).eval())
    sizes = ((2, 37), (3, 53), (4, 41), (1, 29), (2, 54))
    samples = [take_sample(clone, *size) for size in sizes]
    with pytest.raises(PortError) as caught:
        unify(samples, take_sample(clone, 2, 61))
    (reason,) = caught.value.reasons
    assert "max_seq_len=53" in reason.hint
    unify([s for s in samples if s.length <= 53], samples[1])


def test_where_every_length_has_a_table_of_its_own_none_is_named() -> None:
    def shared(model: Model, x: Tensor, length: int) -> Tensor:
        return x + torch.tensor([[i / length] for i in range(length)])

    clone = clone_for_capture(Model(shared).eval())
    with pytest.raises(PortError) as caught:
        unify([take_sample(clone, *size) for size in SIZES], take_sample(clone, 2, 61))
    assert "max_seq_len" not in caught.value.reasons[0].hint
