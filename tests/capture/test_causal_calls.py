"""Attention that is causal by a flag for short sequences and by a band for longer ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxport.capture.clone import clone_for_capture
from fxport.capture.export import capture
from fxport.capture.lengths import trace_at_lengths
from fxport.errors import PortError, ReasonCode
from fxport.passes.serving import lower_for_serving
from tests.capture.test_lengths import differences
from tests.zoo.awkward import HEAD, HEADS, VOCAB, WIDTH

WINDOW = 19


class Windowed(nn.Module):
    """nanochat's way, over a fixed table of positions."""

    flag = True

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.embed(ids) + self.positions(torch.arange(length, device=ids.device))
        parts = self.qkv(x).view(batch, length, 3, HEADS, HEAD)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        if length <= WINDOW:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.flag)
        else:
            row = torch.arange(length, device=ids.device)
            behind = row[:, None] - row
            mask = (behind >= 0) & (behind < WINDOW)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.head(x + mixed.transpose(1, 2).reshape(batch, length, WIDTH))


class SeesAllWhenShort(Windowed):
    flag = False


def test_a_flag_and_a_mask_are_one_window():
    torch.manual_seed(3)
    model = Windowed().eval()
    captured = capture(model)
    assert max(differences(model, captured, [2, 3, WINDOW, WINDOW + 1, 37, 64])) < 2e-5
    (layer,) = lower_for_serving(captured, None).serving.attention
    assert layer.params.causal
    assert layer.params.window_left == WINDOW - 1


def test_no_mask_at_all_is_not_taken_for_one():
    with pytest.raises(PortError) as caught:
        trace_at_lengths(clone_for_capture(SeesAllWhenShort()))
    assert caught.value.reasons[0].code is ReasonCode.DEPENDS_ON_LENGTH
