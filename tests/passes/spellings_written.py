"""What is written into by indexing or in place; scores of several factors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spellings_base import DIRECT, causal_bool, finish, heads_first, legal, parameter
from torch import Tensor

INF = float("-inf")


@legal("causal")
def scores_written_where_a_mask_says(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.mT
    s[:, :, ~causal_bool(q.size(2))] = INF
    return finish(s.softmax(-1), v)


@legal("causal", among=DIRECT)
def scores_written_under_a_whole_mask(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.mT
    s[~causal_bool(q.size(2)).expand(s.shape)] = INF
    return finish(s.softmax(-1), v)


@legal("causal", among=DIRECT)
def mask_written_by_a_mask(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    mask = torch.zeros(q.size(2), q.size(2), dtype=q.dtype)
    mask[~causal_bool(q.size(2))] = INF
    return finish((q @ k.mT + mask).softmax(-1), v)


@legal("window 3", among=DIRECT)
def whole_rows_of_a_mask_written(qkv: Tensor) -> Tensor:
    """The mask of rows stands before dimensions that are taken whole: entry (i, j) is row i."""
    q, k, v = heads_first(qkv)
    t = q.size(2)
    distance = torch.arange(t)[:, None] - torch.arange(t)
    hidden = torch.zeros(t, t, 1, dtype=q.dtype)
    hidden[(distance < 0) | (distance >= 3)] = INF
    return finish((q @ k.mT + hidden[..., 0]).softmax(-1), v)


# -- scores of several factors ---------------------------------------------------------------------


@legal("causal", parameters=(parameter(4, 6, 6),))
def bilinear_scores_in_one_einsum(qkv: Tensor, between: Tensor) -> Tensor:
    q, k, v = qkv.unbind(0)
    s = torch.einsum("bihd,hde,bjhe->bhij", q, between, k)
    return finish(s.masked_fill(~causal_bool(q.size(1)), INF).softmax(-1), v.transpose(1, 2))


@legal("full", among=DIRECT)
def scores_times_a_number_of_each_head(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    scale = torch.linspace(0.5, 1.0, 4, dtype=q.dtype)
    return finish(torch.einsum("bhid,bhjd,h->bhij", q, k, scale).softmax(-1), v)


@legal("causal", parameters=(parameter(4, 6), parameter(6)), among=DIRECT)
def scores_with_gates_of_features_last(qkv: Tensor, gate: Tensor, shared: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = torch.einsum("bhid,bhjd,hd,d->bhij", q, k, gate, shared)
    return finish(s.masked_fill(~causal_bool(q.size(2)), INF).softmax(-1), v)


@legal("causal", parameters=(parameter(4, 6, 6),), among=DIRECT)
def scores_with_a_gate_for_each_query_last(qkv: Tensor, between: Tensor) -> Tensor:
    q, k, v = qkv.unbind(0)
    s = torch.einsum("bihd,bjhd,bih->bhij", q, k, torch.einsum("bihd,hde->bih", q, between).tanh())
    return finish(s.masked_fill(~causal_bool(q.size(1)), INF).softmax(-1), v.transpose(1, 2))


@legal("causal", parameters=(parameter(4, 6, 24),), among=DIRECT)
def values_and_projection_in_one_einsum(qkv: Tensor, out: Tensor) -> Tensor:
    q, k, v = qkv.unbind(0)
    s = torch.einsum("bihd,bjhd->bhij", q, k) / 6**0.5
    p = s.masked_fill(~causal_bool(q.size(1)), INF).softmax(-1)
    return torch.einsum("bjhd,hde,bhij->bie", v, out, p)


@legal("causal")
def queries_of_a_group_summed_up_by_an_einsum(qkv: Tensor) -> Tensor:
    """A usual slip of grouped attention: nobody else has a "g"."""
    q, k, v = heads_first(qkv)
    s = torch.einsum("bghnd,bhsd->bhns", q.unflatten(1, (2, 2)), k[:, :2]) / 6**0.5
    return finish(s.masked_fill(~causal_bool(q.size(2)), INF).softmax(-1), v[:, :2])


# -- written in place ------------------------------------------------------------------------------


@legal("causal", among=DIRECT)
def keys_and_values_written_into_one_tensor(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    both = torch.zeros(2, *k.shape, dtype=k.dtype)
    both[0], both[1] = k, v
    k, v = both
    return finish((q @ k.mT).masked_fill(~causal_bool(q.size(2)), INF).softmax(-1), v)


@legal("causal", among=DIRECT)
def weights_dropped_in_place(qkv: Tensor) -> Tensor:
    """While nothing is dropped; torch has no gradient of a softmax that was written into."""
    q, k, v = heads_first(qkv)
    s = (q @ k.mT).masked_fill(~causal_bool(q.size(2)), INF)
    return finish(F.dropout(s.softmax(-1), 0.5, training=False, inplace=True), v)
