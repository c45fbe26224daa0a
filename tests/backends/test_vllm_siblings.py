"""Linear layers over the same value are joined: which ones.

That joined layers compute the same is tested with every model of the engine tests.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxport
from fxport.serving import Part
from tests.zoo.llama import Llama

pytestmark = pytest.mark.engine

ATTENTION = torch.ops.fxport.attention.default


class ReadsTheEmbeddingAgain(nn.Module):
    """Both layers' values come from the embedding: the same input on two sides of an attention."""

    def __init__(self, biased_key: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(53, 64), nn.Linear(64, 53)
        self.q = nn.ModuleList(nn.Linear(64, 32) for _ in range(2))
        self.k = nn.ModuleList(nn.Linear(64, 32, bias=biased_key) for _ in range(2))
        self.v = nn.ModuleList(nn.Linear(64, 32) for _ in range(2))
        self.o = nn.ModuleList(nn.Linear(32, 64) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        first = x = self.embed(ids)
        for q, k, v, o in zip(self.q, self.k, self.v, self.o, strict=True):
            heads = [y.unsqueeze(1) for y in (q(x), k(x), v(first))]
            y = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + o(y.squeeze(1))
        return self.head(x)


def groups(model: nn.Module) -> list[list[str]]:
    from fxport.backends.vllm.siblings import sibling_groups

    body: Part = fxport.port(model).serving.body
    found = sibling_groups(
        body.graph, lambda n: None if n is None else body.weights.get(n.name), ATTENTION
    )
    return [[sibling.weight for sibling in group] for group in found]


def test_projections_of_one_layer_are_joined() -> None:
    expected = []
    for i in range(4):
        expected.append([f"layers.{i}.attention.{name}.weight" for name in ("wq", "wk", "wv")])
        expected.append([f"layers.{i}.feed_forward.{name}.weight" for name in ("w1", "w3")])
    assert groups(Llama()) == expected


@pytest.mark.parametrize("biased_key", [True, False])
def test_not_across_an_attention_nor_with_and_without_bias(biased_key: bool) -> None:
    keys = ["k.0.weight"] if biased_key else []
    assert groups(ReadsTheEmbeddingAgain(biased_key)) == [
        ["q.0.weight", *keys, "v.0.weight"],
        *([["q.1.weight", "k.1.weight"]] if biased_key else []),
    ]
