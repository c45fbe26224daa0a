"""Masks by rarer means that are proven at every length, and dropout that drops nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spellings_base import DIRECT, causal_bool, finish, heads_first, legal, parameter
from torch import Tensor

INF = float("-inf")


def masked(qkv: Tensor, allowed: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish((q @ k.mT).masked_fill(~allowed, INF).softmax(-1), v)


@legal("causal, 4", among=DIRECT)
def grid_of_rows_and_columns(qkv: Tensor) -> Tensor:
    place = torch.arange(qkv.size(2))
    i, j = torch.meshgrid(place, place, indexing="ij")
    return masked(qkv, i >= j)


@legal("causal, window 3", among=DIRECT)
def grid_of_columns_and_rows(qkv: Tensor) -> Tensor:
    place = torch.arange(qkv.size(2))
    j, i = torch.meshgrid(place, place + 1, indexing="xy")
    return masked(qkv, (i > j) & (i <= j + 3))


@legal("causal, 4", among=DIRECT)
def running_sum_of_the_identity(qkv: Tensor) -> Tensor:
    return masked(qkv, torch.eye(qkv.size(2)).cumsum(0) > 0)


@legal("causal, 4", among=DIRECT)
def distance_rectified(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    place = torch.arange(q.size(2), dtype=q.dtype)
    return finish((q @ k.mT - torch.relu(place - place[:, None]) * 1e30).softmax(-1), v)


@legal("causal, 4", among=DIRECT)
def triangle_beside_as_many_more_keys(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.mT
    rows, columns = s.shape[-2:]
    hidden = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
    return finish(s.masked_fill(hidden, INF).softmax(-1), v)


@legal("causal from the end", parameters=(parameter(2, 4, 5, 6),), among=DIRECT)
def last_rows_of_the_whole_mask(qkv: Tensor, earlier: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = (
        torch.cat([e.expand(q.size(0), -1, -1, -1), x], 2)
        for e, x in zip(earlier, (k, v), strict=True)
    )
    whole = causal_bool(k.size(2))[k.size(2) - q.size(2) :]
    return finish((q @ k.mT).masked_fill(~whole, INF).softmax(-1), v)


@legal("causal from the end", parameters=(parameter(2, 4, 3, 6),), among=DIRECT)
def columns_for_a_prefix_beside_a_triangle(qkv: Tensor, earlier: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = (
        torch.cat([e.expand(q.size(0), -1, -1, -1), x], 2)
        for e, x in zip(earlier, (k, v), strict=True)
    )
    own = causal_bool(q.size(2))
    allowed = torch.cat([torch.ones_like(own[:, :1]).expand(-1, 3), own], 1)
    return finish((q @ k.mT).masked_fill(~allowed, INF).softmax(-1), v)


@legal("causal, 4", among=DIRECT)
def scores_dropped_outside_of_training(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = F.dropout(q @ k.mT, 0.2, training=False)
    return finish(F.dropout(s.masked_fill(~causal_bool(q.size(2)), INF), 0.0).softmax(-1), v)


# -- weights with something added ------------------------------------------------------------------


def weights(qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(qkv)
    return (q @ k.mT).masked_fill(~causal_bool(q.size(2)), INF).softmax(-1), v


@legal("causal", among=DIRECT)
def weights_less_the_identity(qkv: Tensor) -> Tensor:
    w, v = weights(qkv)
    return finish(2 * w - torch.eye(w.size(-1), dtype=w.dtype), v)


@legal("causal", among=DIRECT)
def weights_smoothed(qkv: Tensor) -> Tensor:
    w, v = weights(qkv)
    return finish(0.9 * w + 0.1 / w.size(-1), v)


@legal("causal", among=DIRECT)
def weights_less_a_number_times_rows(qkv: Tensor) -> Tensor:
    w, v = weights(qkv)
    rows = torch.arange(1, w.size(-1) + 1, dtype=w.dtype)[:, None]
    return finish((w - 1e-2) * rows, v)


@legal("causal", parameters=(parameter(4, 16, 16),), among=DIRECT)
def weights_and_learned_ones(qkv: Tensor, learned: Tensor) -> Tensor:
    w, v = weights(qkv)
    return finish(learned[:, : w.size(-1), : w.size(-1)] - w, v)


@legal("full", among=DIRECT)
def weights_less_a_wide_identity(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = torch.cat([k, k.sin()], 2), torch.cat([v, v.sin()], 2)
    w = (q @ k.mT).softmax(-1)
    return finish(w - torch.eye(*w.shape[-2:], dtype=w.dtype), v)
