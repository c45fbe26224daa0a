"""Grouped heads that are repeated beside a mask, and left to the kernel where there is none."""

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
from tests.zoo.awkward import VOCAB, WIDTH

WINDOW, HEADS, GROUPS, HEAD = 19, 6, 2, 16


class Grouped(nn.Module):
    """transformers' way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.q, self.out = nn.Linear(WIDTH, HEADS * HEAD), nn.Linear(HEADS * HEAD, WIDTH)
        self.kv, self.head = nn.Linear(WIDTH, 2 * GROUPS * HEAD), nn.Linear(WIDTH, VOCAB)

    def repeated(self, x: Tensor) -> Tensor:
        batch, groups, length, size = x.shape
        x = x[:, :, None, :, :].expand(batch, groups, HEADS // GROUPS, length, size)
        return x.reshape(batch, HEADS, length, size)

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.embed(ids) + self.positions(torch.arange(length, device=ids.device))
        q = self.q(x).view(batch, length, HEADS, HEAD).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, GROUPS, HEAD).permute(2, 0, 3, 1, 4)
        if length <= WINDOW:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            row = torch.arange(length, device=ids.device)
            behind = row[:, None] - row
            mask = (behind >= 0) & (behind < WINDOW)
            mask = mask.expand(batch, 1, length, length)
            k, v = self.repeated(k), self.repeated(v)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.head(x + self.out(mixed.transpose(1, 2).flatten(2)))


class ByInterleaving(Grouped):
    def repeated(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(HEADS // GROUPS, dim=1)


class TheOtherWay(Grouped):
    """Head h sees group h % 2 when the sequence is long, and group h // 3 when it is short."""

    def repeated(self, x: Tensor) -> Tensor:
        batch, groups, length, size = x.shape
        x = x[:, None, :, :, :].expand(batch, HEADS // GROUPS, groups, length, size)
        return x.reshape(batch, HEADS, length, size)


class Written(ByInterleaving):
    def repeated(self, x: Tensor) -> Tensor:
        repeated = super().repeated(x)
        repeated[:, 1].mul_(1.5)
        return repeated


@pytest.mark.parametrize("kind", [Grouped, ByInterleaving])
def test_the_kernel_repeats_at_every_length(kind: type[Grouped]):
    torch.manual_seed(3)
    model = kind().eval()
    captured = capture(model)
    assert max(differences(model, captured, [2, 3, WINDOW, WINDOW + 1, 37, 64])) < 2e-5
    (layer,) = lower_for_serving(captured, None).serving.attention
    assert (layer.num_heads, layer.num_kv_heads) == (HEADS, GROUPS)
    assert layer.params.window_left == WINDOW - 1


@pytest.mark.parametrize("kind", [TheOtherWay, Written])
def test_another_repetition_is_refused(kind: type[Grouped]):
    with pytest.raises(PortError) as caught:
        trace_at_lengths(clone_for_capture(kind()))
    assert caught.value.reasons[0].code is ReasonCode.DEPENDS_ON_LENGTH
