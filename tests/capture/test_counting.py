"""Numbers taken out of counted positions: the length, wherever they are what torch says."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxport
from fxport.backends.torch import PackedModel
from fxport.capture.counting import LargestCounted

LONGEST = 48


def shifted(n: int) -> Tensor:
    positions = torch.arange(2, n + 2).unsqueeze(0).expand(3, -1)[None, :]
    return (1 + positions.reshape(-1).long() - 4).max() + 5


KNOWN: list[Callable[[int], Tensor]] = [
    lambda n: torch.arange(n).max(),
    lambda n: torch.max(torch.arange(0, n, dtype=torch.long)[None].repeat(2, 1)) + 1,
    lambda n: torch.arange(end=n, start=3).amax(),
    shifted,
    lambda n: torch.arange(n).max() + 1 > 8,
    lambda n: torch.arange(n).max() >= 12,
    *(
        lambda n, compare=compare, number=number: compare(torch.arange(n).max(), number)
        for compare in (
            operator.gt, operator.ge, operator.lt, operator.le,
            Tensor.gt, Tensor.ge, Tensor.lt, Tensor.le,
        )
        for number in (6, 7, 8)  # below, at and above the largest of eight
    ),
]  # fmt: skip


def added_later(n: int) -> Tensor:
    positions = torch.arange(n)
    positions += 5
    return positions.max()


def written_through_a_view(n: int) -> Tensor:
    positions = torch.arange(n)[None]
    positions[0, 1:2].fill_(100)
    return positions.max()


UNKNOWN: list[Callable[[int], Tensor]] = [
    lambda n: torch.arange(0, n, 2).max(),
    lambda n: torch.arange(n)[1:4].max(),
    lambda n: torch.arange(n).view(2, -1).max(0).values[0],
    lambda n: torch.max(torch.arange(n), torch.tensor(50)).max(),
    lambda n: (torch.arange(n) * 2).max(),
    lambda n: (torch.arange(n) > 3).max(),
    lambda n: (torch.arange(n) < 3).max(),
    lambda n: torch.arange(1).to(torch.bool).max(),
    lambda n: (torch.arange(n).max() > 9) + 3,
    lambda n: torch.arange(n).sub(torch.ones(n, dtype=torch.long)).max(),
    lambda n: torch.add(torch.arange(n), 3, alpha=2).max(),
    added_later,
    written_through_a_view,
]


@pytest.mark.parametrize("make", KNOWN + UNKNOWN)
def test_it_is_the_number_that_torch_says(make: Callable[[int], Tensor]) -> None:
    for n in (8, 12):
        with LargestCounted():
            found = make(n).item(), int(make(n))
        assert found == (make(n).item(), int(make(n)))


@pytest.mark.parametrize("make", KNOWN)
def test_shapes_alone_are_enough(make: Callable[[int], Tensor]) -> None:
    with LargestCounted(), FakeTensorMode():
        found = make(9).item()
    assert found == make(9).item()


class Grows(nn.Module):
    """Rotary tables that are extended to the largest position."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.qkv, self.head = nn.Embedding(23, 16), nn.Linear(16, 48), nn.Linear(16, 23)
        self.known = 0
        self.extend(4)

    def extend(self, n: int) -> None:
        if n > self.known:
            angles = torch.outer(torch.arange(n).double(), 100.0 ** -torch.arange(8))
            self.cos, self.sin, self.known = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2), n

    def forward(self, ids: Tensor) -> Tensor:
        assert ids.shape[1] <= LONGEST
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        self.extend(max(int(positions.max().item()) + 1, positions.shape[-1]))
        if torch.max(positions) + 1 > LONGEST:
            positions = positions + ids.shape[1]
        cos, sin = self.cos[positions], self.sin[positions]
        x = self.emb(ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = (y * cos + torch.cat([-y[..., 8:], y[..., :8]], -1) * sin for y in (q, k))
        q, k, v = (y[:, None] for y in (q, k, v))
        return self.head(x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


def test_a_table_that_grows_to_the_largest_position_is_exact() -> None:
    torch.manual_seed(0)
    model = Grows().double().eval()
    port = fxport.port(model)
    sequences = [torch.randint(0, 23, (n,)) for n in (1, 7, LONGEST)]
    packed = PackedModel(port.serving, port.parameters)(sequences)
    for sequence, logits in zip(sequences, packed, strict=True):
        with torch.no_grad():
            expected = model(sequence[None])[0]
        torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-12)
