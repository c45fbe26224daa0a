"""What is rounded more coarsely than the result shows stays as it is; wider scores are found."""

from __future__ import annotations

import pytest
import torch
from attention_graphs import rewrite, run_like, trace_training
from torch import Tensor, nn

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


class Attention(nn.Module):
    """q and k in one dtype, the softmax in another, v in the model's own."""

    def __init__(self, scored: torch.dtype, weighed: torch.dtype) -> None:
        super().__init__()
        self.scored, self.weighed = scored, weighed
        self.qkv = nn.Linear(48, 144)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = (
            part.view(rows, length, 3, 16).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        scores = q.to(self.scored) @ k.to(self.scored).transpose(-1, -2) / 4.0
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        scores = scores.to(self.weighed).masked_fill(~mask, float("-inf"))
        out = scores.softmax(-1).to(v.dtype) @ v
        return out.transpose(1, 2).reshape(rows, length, width)


@pytest.mark.parametrize(
    ("own", "scored", "weighed", "found"),
    [
        (F32, F32, F32, True),
        (F64, F64, F64, True),
        (BF16, BF16, BF16, True),
        (BF16, BF16, F32, True),
        (BF16, F32, F32, True),
        (F32, F64, F64, True),
        (F64, F32, F32, False),
        (F64, F32, F64, False),
        (F32, BF16, F32, False),
        (F32, BF16, BF16, False),
    ],
)
def test_rounding_that_shows_stays(
    own: torch.dtype, scored: torch.dtype, weighed: torch.dtype, found: bool
) -> None:
    torch.manual_seed(0)
    model = Attention(scored, weighed).to(own)
    x = torch.randn(2, 11, 48, dtype=own, requires_grad=True)
    compiled = rewrite(trace_training(model, [x]))
    assert (compiled.count, len(compiled.left())) == ((1, 0) if found else (0, 1))
    other = x.detach().clone().requires_grad_()
    expected, (outcome, *_) = model(x), run_like(compiled.graph, model, [other])
    expected.sum().backward()
    outcome.sum().backward()
    bound = {F64: 1e-12, F32: 1e-5, BF16: 5e-2}[own]
    assert (outcome - expected).abs().max() < bound
    assert x.grad is not None and other.grad is not None
    assert (other.grad - x.grad).abs().max() < 10 * bound
