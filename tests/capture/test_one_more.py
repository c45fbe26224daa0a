"""A mask cut to length, ``mask[:T, :T]``: torch's graph leaves out the longest sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxport.backends.torch import PackedModel
from fxport.capture.export import capture
from fxport.errors import PortError
from fxport.passes.serving import lower_for_serving

LONGEST, _VOCAB, _WIDTH, _HEADS = 96, 29, 24, 3


class Masked(nn.Module):
    """Four layers of attention with a stored mask; `change` may do something to the last."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(_VOCAB, _WIDTH), nn.Linear(_WIDTH, _VOCAB)
        self.qkv = nn.ModuleList(nn.Linear(_WIDTH, 3 * _WIDTH) for _ in range(4))
        self.register_buffer("mask", torch.ones(LONGEST, LONGEST).tril() == 0)
        self.change = change

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        x = self.enter(ids)
        for qkv in self.qkv:
            q, k, v = qkv(x).view(b, t, 3, _HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
            scores = q @ k.mT / (_WIDTH // _HEADS) ** 0.5
            scores = scores.masked_fill(self.mask[:t, :t], -torch.inf)
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head(self.change(x))

    def enter(self, ids: Tensor) -> Tensor:
        return self.embed(ids)


def test_the_longest_is_captured_from_four_lengths():
    torch.manual_seed(0)
    model = Masked(lambda x: x).double().eval()
    captured = capture(model)
    assert captured.limit == LONGEST
    assert captured.way == "torch.export at the lengths 37, 53, 95, 96, unified"
    serving = lower_for_serving(captured, None).serving
    packed = PackedModel(serving, captured.parameters)
    for length in (2, 5, 60, 95, 96):
        ids = torch.randint(_VOCAB, (1, length))
        torch.testing.assert_close(packed([ids[0]])[0], model(ids)[0])


class _Cropped(Masked):
    """Of more tokens than it can take it answers the last; a table is named as vLLM's input is."""

    def __init__(self) -> None:
        super().__init__(lambda x: x)
        self.register_buffer("positions", torch.arange(LONGEST))
        self.places = nn.Embedding(LONGEST, _WIDTH)
        self.register_buffer("places_weight", torch.tensor(0.5))

    def enter(self, ids: Tensor) -> Tensor:
        places = self.places(self.positions[: ids.shape[1]])
        return self.embed(ids) + places * self.places_weight

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids[:, -LONGEST:])


def test_what_is_cut_off_is_beyond_the_limit():
    """At the limit the cut takes all."""
    torch.manual_seed(0)
    model = _Cropped().double().eval()
    captured = capture(model)
    assert captured.limit == LONGEST
    packed = PackedModel(lower_for_serving(captured, None).serving, captured.parameters)
    for length in (2, 60, 95, 96):
        ids = torch.randint(_VOCAB, (1, length))
        torch.testing.assert_close(packed([ids[0]])[0], model(ids)[0])


def _at_the_longest(x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] == LONGEST else x


def _below_the_longest(x: Tensor) -> Tensor:
    return x if x.shape[1] < LONGEST - 1 else x * 2


def _in_one_row(x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] > (LONGEST - 1) * x.shape[0] else x


@pytest.mark.parametrize("change", [_at_the_longest, _below_the_longest, _in_one_row])
def test_another_path_next_to_the_longest_is_refused(change: Callable[[Tensor], Tensor]):
    with pytest.raises(PortError) as refused:
        capture(Masked(change))
    assert any(
        r.location is not None and r.location.file == __file__ for r in refused.value.reasons
    )
