"""A serving graph over sequences that lie end to end, against the model on each of them."""

from __future__ import annotations

import torch
from torch import nn

from fxport.backends.torch import PackedModel
from tests.zoo.awkward import LIMIT, VOCAB


def assert_exact(packed: PackedModel, model: nn.Module) -> None:
    """In float64, two sequences at a time; one token leaves an expert empty."""
    for length in (1, 2, 37, LIMIT):
        sequences = [torch.randint(0, VOCAB, (n,)) for n in (length, 11)]
        for sequence, found in zip(sequences, packed(sequences), strict=True):
            with torch.no_grad():
                expected = model(sequence[None])[0]
            assert (found - expected).abs().max() < 1e-12
