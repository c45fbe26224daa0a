"""Weights that are not combined linearly, or whose use for several values cannot be joined."""

from __future__ import annotations

import torch
from spellings_base import finish, heads_first
from spellings_spread import causal, two_weights
from torch import Tensor
from tricky_spellings import DIRECT, tricky


@tricky("attention-weights-used-elsewhere")
def difference_rectified(qkv: Tensor) -> Tensor:
    w1, w2, v = two_weights(qkv)
    return finish(torch.relu(w1 - w2), v)


@tricky("unsupported-feature", among=DIRECT)
def weights_multiplied_together(qkv: Tensor) -> Tensor:
    w1, w2, v = two_weights(qkv)
    return finish(w1 * w2, v)


@tricky("attention-weights-used-elsewhere", among=DIRECT)
def difference_used_twice(qkv: Tensor) -> tuple[Tensor, Tensor]:
    w1, w2, v = two_weights(qkv)
    w = w1 - 0.3 * w2
    return finish(w, v), w.square()


@tricky("attention-weights-used-elsewhere", among=DIRECT)
def difference_normalised(qkv: Tensor) -> Tensor:
    w1, w2, v = two_weights(qkv)
    w = w1 - 0.3 * w2
    return finish(w / w.sum(-1, keepdim=True), v)


@tricky("attention-weights-used-elsewhere", among=DIRECT)
def products_one_after_the_other(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = causal(q @ k.mT * 0.4).softmax(-1)
    return finish(w, w @ v)


@tricky("attention-weights-used-elsewhere", among=DIRECT)
def weights_and_their_transpose(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = causal(q @ k.mT * 0.4).softmax(-1)
    return finish(w, v) + finish(w.mT, v)


@tricky("attention-weights-used-elsewhere", among=DIRECT)
def values_too_wide_together(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = causal(q @ k.mT * 0.4).softmax(-1)
    return finish(w, v.repeat(1, 1, 1, 40)) + finish(w, k.repeat(1, 1, 1, 40))


@tricky("softmax-over-another-axis", among=DIRECT)
def difference_of_softmaxes_over_queries(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = causal(q @ k.mT).softmax(-2) - causal(k @ q.mT).softmax(-2)
    return finish(w, v)
