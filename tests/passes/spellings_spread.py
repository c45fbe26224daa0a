"""Weights that are combined before the values, used for several values, or read by other layers."""

from __future__ import annotations

import torch
from spellings_base import DIRECT, causal_bool, finish, heads_first, legal, parameter
from torch import Tensor

INF = float("-inf")


def causal(s: Tensor) -> Tensor:
    return s.masked_fill(~causal_bool(s.size(-1)), INF)


def two_weights(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = heads_first(qkv)
    return causal(q @ k.mT * 0.4).softmax(-1), causal(k @ q.mT * 0.3).softmax(-1), v


# -- differential attention ------------------------------------------------------------------------


@legal("causal", parameters=(parameter(1),), among=DIRECT)
def differential(qkv: Tensor, lam: Tensor) -> Tensor:
    w1, w2, v = two_weights(qkv)
    return finish(w1 - lam * w2, v)


@legal("causal", parameters=(parameter(4, 1, 1),), among=DIRECT)
def differential_by_head_and_factor(qkv: Tensor, lam: Tensor) -> Tensor:
    w1, w2, v = two_weights(qkv)
    return finish(torch.sub(-w1 * 0.5, w2 * lam.tanh(), alpha=0.7) / 3, v)


@legal("causal", parameters=(parameter(1, 1),), among=DIRECT)
def differential_by_einsum(qkv: Tensor, lam: Tensor) -> Tensor:
    w1, w2, v = two_weights(qkv)
    out = torch.einsum("bhqk,bhkd->bqhd", w1 + w2 * lam[0], v)
    return out.flatten(2)


@legal("causal", parameters=(parameter(1),), among=DIRECT)
def differential_of_stacked_heads(qkv: Tensor, lam: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = causal(torch.stack([q, k], 2) @ torch.stack([k, q], 2).mT).softmax(-1)
    return finish(w[:, :, 0] - lam * w[:, :, 1], v)


@legal("causal", parameters=(parameter(1),))
def differential_of_heads_in_pairs(qkv: Tensor, lam: Tensor) -> Tensor:
    """As published: 2 H heads for queries and keys, H twice as wide ones for values."""
    q, k, v = heads_first(qkv)
    w = causal(q @ k.mT * 0.4).softmax(-1)
    b, h, t, _ = w.shape
    w = w.view(b, h // 2, 2, t, t)
    w = w[:, :, 0] - lam * w[:, :, 1]
    return finish(w, v.reshape(b, h // 2, 2, t, -1).transpose(2, 3).flatten(3))


@legal("causal", parameters=(parameter(1),), among=DIRECT)
def differential_of_halves(qkv: Tensor, lam: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w1, w2 = causal(q @ k.mT * 0.4).softmax(-1).chunk(2, dim=1)
    return finish(w1 - lam * w2, v[:, 1:3])


@legal("causal", parameters=(parameter(1),), among=DIRECT)
def differential_of_every_second_head(qkv: Tensor, lam: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = causal(q @ k.mT * 0.4).softmax(-1)
    return finish(w[:, ::2], v[:, 1:3]) - lam * finish(w[:, 1::2], v[:, 1:3])


# -- several values --------------------------------------------------------------------------------


@legal("causal")
def two_values(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = causal(q @ k.mT * 0.4).softmax(-1)
    return torch.cat([finish(w, v), finish(w, k[..., :5])], -1)


@legal("causal", among=DIRECT)
def three_values_by_einsum(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = torch.dropout(causal(q @ k.mT * 0.4).softmax(-1), 0.1, False) * 0.5
    one, two, three = (torch.einsum("bhkd,bhqk->bqhd", x, w) for x in (v, k, q[..., 1:]))
    return torch.cat([one * two, three], -1).flatten(2)


@legal("causal", among=DIRECT)
def second_value_made_after_the_first_product(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = causal(q @ k.mT * 0.4).softmax(-1)
    first = w @ v
    second = w @ torch.tanh(k)
    return (first + second).transpose(1, 2).flatten(2)


# -- scores that go on to the next layer -----------------------------------------------------------


@legal("causal")
def residual_scores(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.mT * 0.4
    x = causal(s).softmax(-1) @ v
    s = (q + x) @ v.mT * 0.4 + s
    x = x + causal(s).softmax(-1) @ k
    s = (k + x) @ k.mT * 0.4 + s
    return finish(causal(s).softmax(-1), x)


@legal("causal", parameters=(parameter(1),), among=DIRECT)
def differential_of_halves_with_values_of_their_own(qkv: Tensor, lam: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w1, w2 = causal(q @ k.mT * 0.4).softmax(-1).chunk(2, dim=1)
    return finish(w1, v[:, :2]) - lam * finish(w2, v[:, 2:])


@legal("causal", parameters=(parameter(1),), among=DIRECT)
def differential_of_folded_heads(qkv: Tensor, lam: Tensor) -> Tensor:
    w1, w2, v = two_weights(qkv)
    b, h, t, _ = w1.shape
    w = ((w1 - lam * w2) * 0.5).reshape(b * h, t, t)
    return finish(torch.bmm(w, v.reshape(b * h, t, -1)).view(b, h, t, -1), v.mT @ v)


@legal("causal", among=DIRECT)
def two_values_of_folded_heads(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    b, h, t, d = q.shape
    w = causal(q @ k.mT * 0.4).softmax(-1)
    one, two = (torch.bmm(w.reshape(b * h, t, t), x.reshape(b * h, t, d)) for x in (v, k.tanh()))
    return (one * two).view(b, h, t, d)
