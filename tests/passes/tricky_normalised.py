"""Look-alikes of normalisations by hand: another shift, another sum, a mask that is none."""

from __future__ import annotations

import torch
from spellings_base import causal_bool, finish, heads_first
from torch import Tensor
from tricky_spellings import tricky

INF = float("-inf")


def causal_scores(qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) * 0.4
    return s.masked_fill(~causal_bool(q.size(2)), INF), v


@tricky("order-of-operations")
def one_beside_shifted_exponentials(qkv: Tensor) -> Tensor:
    """The one is not shifted with the scores."""
    s, v = causal_scores(qkv)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return finish(e / (e.sum(-1, keepdim=True) + 1), v)


@tricky("order-of-operations")
def small_number_beside_shifted_exponentials(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return finish(e / (e.sum(-1, keepdim=True) + 1e-6), v)


@tricky()
def another_maximum_given_back(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    other = (s * 0.5).amax(-1, keepdim=True)
    return finish(e / (torch.exp(-other) + e.sum(-1, keepdim=True)), v)


@tricky()
def maximum_given_back_with_its_sign(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    m = s.amax(-1, keepdim=True)
    e = torch.exp(s - m)
    return finish(e / (torch.exp(m) + e.sum(-1, keepdim=True)), v)


@tricky()
def logsumexp_over_the_queries(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2)
    return finish(torch.exp(s - torch.logsumexp(s, -2, keepdim=True)), v)


@tricky()
def logsumexp_of_other_scores(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    return finish(torch.exp(s - torch.logsumexp(s * 0.5, -1, keepdim=True)), v)


@tricky("mask-not-proven")
def weights_times_a_decay(qkv: Tensor) -> Tensor:
    """Not of zeros and ones: halves count as halves."""
    s, v = causal_scores(qkv)
    e = torch.exp(s) * (causal_bool(s.size(-1)).to(s.dtype) * 0.5).diagonal_scatter(
        torch.ones(s.size(-1), dtype=s.dtype)
    )
    return finish(e / e.sum(-1, keepdim=True), v)


@tricky("fully-masked-row")
def masked_twice_with_a_finite_number(qkv: Tensor) -> Tensor:
    """Where the data leave no causal key the original's weights are no mean."""
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2)
    s = s.masked_fill(qkv[0, :, None, None, :, 0, 0] < -9, -1e9)
    e = torch.exp(s - s.amax(-1, keepdim=True)) * causal_bool(s.size(-1))
    return finish(e / e.sum(-1, keepdim=True), v)


@tricky()
def masked_but_divided_by_the_whole_sum(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    e = torch.exp(q @ k.transpose(-1, -2))
    return finish(e * causal_bool(e.size(-1)) / e.sum(-1, keepdim=True), v)


@tricky()
def renormalised_over_the_queries(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = (q @ k.transpose(-1, -2)).softmax(-1) * causal_bool(q.size(2))
    return finish(w / w.sum(-2, keepdim=True), v)


@tricky()
def column_of_zeros_that_is_written_to(qkv: Tensor) -> Tensor:
    """Through a view: whoever made it says nothing about what it holds."""
    s, v = causal_scores(qkv)
    column = torch.zeros_like(s[..., :1])
    column[..., 0].copy_(s.diagonal(dim1=-2, dim2=-1))
    return finish(torch.cat([s, column], -1).softmax(-1)[..., :-1], v)
