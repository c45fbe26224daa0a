"""Convolutions and loops over the tokens are refused before anything longer is tried."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxport.capture.lengths
from fxport.capture.clone import clone_for_capture
from fxport.capture.export import capture
from fxport.capture.recurrence import convolutions_over, refuse_recurrence
from fxport.capture.sample import take_sample
from fxport.errors import PortError, ReasonCode

WIDTH, VOCAB = 13, 17


class Model(nn.Module):
    """`mixer` between an embedding and a head."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.embed, self.mixer = nn.Embedding(VOCAB, WIDTH), mixer
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mixer(self.embed(ids)))


class OverTokens(nn.Module):
    """A causal convolution."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, kernel, padding=kernel - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class OverFeatures(nn.Module):
    """Each token's features are convolved, as many as there are tokens in a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(-1, 1, WIDTH)).view_as(x)


class Steps(nn.Module):
    """A state that is carried along in Python."""

    def forward(self, x: Tensor) -> Tensor:
        state, found = torch.zeros_like(x[:, 0]), []
        for step in x.unbind(1):
            state = state * 0.5 + step
            found.append(state)
        return torch.stack(found, 1)


def samples(mixer: nn.Module):
    model = clone_for_capture(Model(mixer))
    return [take_sample(model, batch, length) for batch, length in ((2, WIDTH), (3, 19))]


@pytest.mark.parametrize("kernel", [1, 4])
def test_a_convolution_over_tokens_is_seen_by_its_sizes(kernel: int) -> None:
    captured = capture(Model(OverTokens(kernel)))
    found = convolutions_over(captured.graph, captured.length)
    assert [r.code for r in found] == ([] if kernel == 1 else [ReasonCode.MIXES_TOKENS])


def test_plain_lengths_see_it_by_how_the_sizes_differ() -> None:
    with pytest.raises(PortError, match="a convolution runs along"):
        refuse_recurrence(*samples(OverTokens(4)))
    for other in (OverTokens(1), OverFeatures()):
        refuse_recurrence(*samples(other))
    refuse_recurrence(samples(OverTokens(4))[0], None)  # one length does not say it


def test_a_loop_over_the_tokens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a loop over 4096 tokens")

    monkeypatch.setattr(fxport.capture.lengths, "longest_of", never)
    with pytest.raises(PortError) as caught:
        capture(Model(Steps()))
    (reason,) = caught.value.reasons
    assert reason.code is ReasonCode.DEPENDS_ON_LENGTH and "loop over the tokens" in reason.message
    assert reason.location is not None and reason.location.file.endswith("test_recurrence.py")
