"""Tensors that lowering or a proof makes (indices from lists, slopes) reach Inductor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.backends.test_dynamo import Graphs

VOCAB, WIDTH, HEADS, LAYERS, LENGTH = 23, 40, 5, 4, 21
ATTENTION = torch.ops.fxport.attention.default


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        i = torch.arange(t)
        slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)
        scores = q @ k.mT * (c // HEADS) ** -0.5 + slopes.view(-1, 1, 1) * (i[None] - i[:, None])
        weights = scores.masked_fill(i[None] > i[:, None], float("-inf")).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(b, t, c)
        return x + self.out(y) * torch.tensor([0.5, 2.0]).repeat(c // 2)


class Model(nn.Module):
    """ALiBi from numbers, a vector from a list, the last position by a list (nanoGPT's way)."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.recompute = recompute

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        logits = x @ self.embedding.weight.T
        return logits if self.training else logits[:, [-1], :]


@pytest.mark.parametrize("recompute", [False, True])
def test_training_with_constants_equals_eager(recompute: bool) -> None:
    torch.manual_seed(0)
    model = Model(recompute)
    graphs = Graphs()
    compiled = torch.compile(model, backend="vllm_generic", options=graphs.options())
    tokens = torch.randint(0, VOCAB, (3, LENGTH))
    results = []
    for call in (model, compiled):
        model.zero_grad()
        output = call(tokens)
        (output.double() ** 2).mean().backward()
        results.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert graphs.count(ATTENTION)[0] == LAYERS


def test_inference_with_an_index_from_a_list_equals_eager() -> None:
    torch.manual_seed(1)
    model = Model(False).eval()
    graphs = Graphs()
    compiled = torch.compile(model, backend="vllm_generic", options=graphs.options())
    with torch.no_grad():
        for length in (LENGTH, 34):
            tokens = torch.randint(0, VOCAB, (2, length))
            torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-4, atol=1e-5)
    assert set(graphs.count(ATTENTION)) == {LAYERS}
