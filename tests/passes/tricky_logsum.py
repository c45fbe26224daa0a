"""Look-alikes of sums of exponentials: of other scores, shifted by something else, of no ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spellings_base import finish
from spellings_logsum import causal_scores, merged
from torch import Tensor
from tricky_spellings import DIRECT, tricky


@tricky("unsupported-feature", among=DIRECT)
def logarithm_of_another_sum(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    m = s.amax(-1, keepdim=True)
    lse = m + torch.log(torch.exp(s * 0.9 - m).sum(-1, keepdim=True))
    return finish(torch.exp(s - lse), v)


@tricky("unsupported-feature", among=DIRECT)
def another_maximum_is_added(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    m = s.amax(-1, keepdim=True)
    lse = m * 0.9 + torch.log(torch.exp(s - m).sum(-1, keepdim=True))
    return finish(torch.exp(s - lse), v)


@tricky("unsupported-feature", among=DIRECT)
def maximum_of_another_row_is_added(qkv: Tensor) -> Tensor:
    """B == H or H == T would hide it."""
    s, v = causal_scores(qkv[:, :, :4])
    m = s.amax(-1)
    lse = m.transpose(1, 2) + torch.log(torch.exp(s - m[..., None]).sum(-1))
    return finish(torch.exp(s - lse[..., None]), v)


@tricky("unsupported-feature", among=DIRECT)
def logarithm_in_another_layout(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv[:, :, :4])
    lse = torch.exp(s).sum(-1).log().transpose(1, 2).unsqueeze(-1)
    return finish(torch.exp(s - lse), v)


@tricky("unsupported-feature", among=DIRECT)
def sink_less_another_maximum(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    sink = torch.linspace(-1, 1, 4, dtype=s.dtype).view(1, -1, 1, 1)
    m = torch.maximum(s.amax(-1, keepdim=True), sink)
    e = torch.exp(s - m)
    return finish(e / (e.sum(-1, keepdim=True) + torch.exp(sink - m * 0.5)), v)


@tricky("unsupported-feature", among=DIRECT)
def sink_for_every_query(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    sink = torch.linspace(-1, 1, s.size(2), dtype=s.dtype).view(1, 1, -1, 1)
    e = torch.exp(s)
    return finish(e / (e.sum(-1, keepdim=True) + torch.exp(sink)), v)


@tricky("unsupported-feature", among=DIRECT)
def sink_laid_out_for_every_query(qkv: Tensor) -> Tensor:
    """As many queries as heads in some runs: the place decides, not the size."""
    s, v = causal_scores(qkv[:, :, :4])
    e = torch.exp(s)
    sink = torch.linspace(-1, 1, 4, dtype=s.dtype).exp()[:, None]
    return finish(e / (e.sum(-1, keepdim=True) + sink), v)


@tricky("", among=DIRECT)
def sink_laid_out_for_every_key(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv[:, :, :4])
    e = torch.exp(s)
    sink = torch.linspace(-1, 1, 4, dtype=s.dtype).exp().view(1, 1, 1, 4)
    return finish(e / (e.sum(-1, keepdim=True) + sink), v)


@tricky("order-of-operations", among=DIRECT)
def sink_laid_out_beside_shifted_exponentials(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    sink = torch.linspace(-1, 1, 4, dtype=s.dtype)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return finish(e / (e.sum(-1, keepdim=True) + sink.exp().view(1, -1, 1, 1)), v)


@tricky("order-of-operations", among=DIRECT)
def sink_not_shifted_with_the_scores(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    sink = torch.linspace(-1, 1, 4, dtype=s.dtype).view(1, -1, 1, 1)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return finish(e / (e.sum(-1, keepdim=True) + torch.exp(sink)), v)


@tricky("unsupported-feature", among=DIRECT)
def twos_beside_the_values(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    o = torch.exp(s) @ F.pad(v, (0, 1), value=2.0)
    return merged(o[..., :-1] / o[..., -1:])


@tricky("unsupported-feature", among=DIRECT)
def divided_by_the_last_value(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    o = torch.exp(s) @ torch.cat([torch.ones_like(v[..., :1]), v], -1)
    return merged(o[..., :-1] / o[..., -1:])


@tricky("unsupported-feature", among=DIRECT)
def ones_for_some_keys(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    ones = torch.ones_like(v[..., :1])
    ones[:, :, 1] = 0
    return merged((torch.exp(s) @ v) / (torch.exp(s) @ ones))


@tricky("unsupported-feature", among=DIRECT)
def summed_with_a_factor_for_each_key(qkv: Tensor) -> Tensor:
    s, v = causal_scores(qkv)
    e = torch.exp(s)
    return merged((e @ v) / (e @ v[..., :1].exp()))


@tricky("order-of-operations", among=DIRECT)
def divided_by_the_data_after_the_mask(qkv: Tensor) -> Tensor:
    """It might be negative."""
    s, v = causal_scores(qkv)
    return finish((s / qkv[0, 0, 0, 0, 0]).softmax(-1), v)
