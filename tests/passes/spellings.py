"""Attention as people write it: scales, masks, softmaxes. `spellings_layouts` has the rest."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spellings_base import (
    LEGAL,
    Spelling,
    bool_buffer,
    causal_bool,
    finish,
    heads_first,
    legal,
    minus_inf_buffer,
    tril_buffer,
)
from torch import Tensor

__all__ = ["LEGAL", "Spelling"]

# -- scale and mask ------------------------------------------------------------------------------


@legal(buffers=(tril_buffer,))
def nano_gpt(qkv: Tensor, bias: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    b, _, t, _ = q.shape
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(bias[:, :, :t, :t] == 0, float("-inf"))
    att = F.dropout(F.softmax(att, dim=-1), 0.1, False)
    return (att @ v).transpose(1, 2).contiguous().view(b, t, -1)


@legal("scale 0.408248", "causal")
def divided_finfo_min(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = torch.matmul(q, k.mT) / math.sqrt(q.size(-1))
    s = s.masked_fill(~causal_bool(q.size(2)), torch.finfo(s.dtype).min)
    return finish(s.softmax(-1), v)


@legal("scale 0.408248", "causal")
def prescaled_q_additive_inf(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    q = q * q.size(-1) ** -0.5
    mask = torch.full((q.size(2), q.size(2)), float("-inf"), dtype=q.dtype).triu(1)
    return finish(F.softmax(q @ k.transpose(2, 3) + mask, dim=-1), v)


@legal("scale 0.166667", "causal")
def both_prescaled_in_place(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    scale = q.size(-1) ** 0.5
    s = (q / scale) @ (k / scale).transpose(-1, -2)
    s.masked_fill_(torch.ones_like(s, dtype=torch.bool).triu_(1), -1e9)
    return finish(torch.softmax(s, dim=-1), v)


@legal("scale 0.408248", "causal", buffers=(bool_buffer,))
def where_self(qkv: Tensor, tril: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    t = q.size(2)
    s = q @ k.transpose(-1, -2) / torch.sqrt(torch.tensor(6.0))
    s = torch.where(tril[:t, :t], s, torch.finfo(s.dtype).min)
    return finish(torch.nn.functional.softmax(s, -1, dtype=torch.float64), v)


@legal("scale 0.408248", "causal", buffers=(minus_inf_buffer,))
def additive_buffer(qkv: Tensor, mask: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    t = q.size(2)
    s = q @ k.transpose(-1, -2) * 6**-0.5
    s += mask[:t, :t]
    return finish(s.softmax(dim=-1), v)


@legal("causal")
def one_minus_mask(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    mask = torch.tril(torch.ones(q.size(2), q.size(2), dtype=q.dtype))
    s = q @ k.transpose(-1, -2) + (1.0 - mask) * -1e9
    return finish(s.softmax(dim=-1), v)


@legal("dense constant bias")
def one_minus_mask_times_little(qkv: Tensor) -> Tensor:
    """Scores may differ by as much: see `test_low_masks`."""
    q, k, v = heads_first(qkv)
    mask = torch.tril(torch.ones(q.size(2), q.size(2), dtype=q.dtype))
    s = q @ k.transpose(-1, -2) + (1.0 - mask) * -10000.0
    return finish(s.softmax(dim=-1), v)


@legal("causal")
def times_mask_minus_big(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    mask = torch.tril(torch.ones(1, 1, q.size(2), q.size(2), dtype=q.dtype))
    s = q @ k.transpose(-1, -2)
    s = s * mask - 1e10 * (1 - mask)
    return finish(s.softmax(dim=-1), v)


@legal("causal")
def arange_comparison(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    i = torch.arange(q.size(2))
    s = (q @ k.transpose(-1, -2)).masked_fill(i[None, :] > i[:, None], float("-inf"))
    return finish(s.softmax(dim=-1), v)


@legal("causal, window 3")
def sliding_window(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    i = torch.arange(q.size(2))
    distance = i[:, None] - i[None, :]
    allowed = (distance >= 0) & (distance < 3)
    s = torch.where(allowed, q @ k.transpose(-1, -2), float("-inf"))
    return finish(s.softmax(dim=-1), v)


@legal("causal, window 4")
def window_by_tril_triu(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    ones = torch.ones(q.size(2), q.size(2), dtype=torch.bool)
    s = (q @ k.transpose(-1, -2)).masked_fill(~(ones.tril() & ones.triu(-3)), float("-inf"))
    return finish(s.softmax(dim=-1), v)


@legal("full")
def encoder(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish(torch.softmax(q @ k.transpose(-1, -2) * 0.3, -1), v)


@legal("window from -2 to 1")
def two_sided_window(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    i = torch.arange(q.size(2))
    d = i[None, :] - i[:, None]
    s = (q @ k.transpose(-1, -2)).masked_fill((d > 1) | (d < -2), float("-inf"))
    return finish(s.softmax(dim=-1), v)


@legal("dense constant bias")
def prefix_lm(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    i = torch.arange(q.size(2))
    allowed = (i[None, :] <= i[:, None]) | (i[None, :] < 3)
    s = (q @ k.transpose(-1, -2)).masked_fill(~allowed, float("-inf"))
    return finish(s.softmax(dim=-1), v)


@legal("causal, chunks of 4")
def causal_within_blocks(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    i = torch.arange(q.size(2))
    allowed = (i[None, :] <= i[:, None]) & (i[None, :] // 4 == i[:, None] // 4)
    s = (q @ k.transpose(-1, -2)).masked_fill(~allowed, float("-inf"))
    return finish(s.softmax(dim=-1), v)


@legal("causal")
def two_masks(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    t = q.size(2)
    s = q @ k.transpose(-1, -2)
    s = s + torch.full((t, t), -1e9, dtype=s.dtype).triu(1)
    s = s.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(2), float("-inf"))
    return finish(s.softmax(dim=-1), v)


@legal("causal")
def clamped_at_finfo_min(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    low = torch.finfo(q.dtype).min
    mask = torch.full((q.size(2), q.size(2)), low, dtype=q.dtype).triu(1)
    s = torch.max(q @ k.transpose(-1, -2) + mask, torch.tensor(low, dtype=q.dtype))
    return finish(s.softmax(dim=-1), v)


# -- softmax -------------------------------------------------------------------------------------


@legal("causal")
def softmax_written_out(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(q.size(2)), float("-inf"))
    e = torch.exp(s - s.amax(dim=-1, keepdim=True))
    return finish(e / e.sum(dim=-1, keepdim=True), v)


@legal("full")
def softmax_with_max_values(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2)
    e = (s - s.max(dim=-1, keepdim=True).values.detach()).exp()
    return finish(e / e.sum(-1, keepdim=True), v)


@legal("full")
def exp_of_log_softmax(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish(F.log_softmax(q @ k.transpose(-1, -2), dim=-1).exp(), v)


@legal("causal")
def keys_in_rows(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = k @ q.transpose(-1, -2)  # [B, H, Tk, Tq]
    s = s.masked_fill(torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril(-1), float("-inf"))
    return finish(s.softmax(dim=-2).transpose(-1, -2), v)


import spellings_factors  # noqa: E402, F401
import spellings_layouts  # noqa: E402, F401  (adds its spellings to LEGAL)
import spellings_logsum  # noqa: E402, F401
import spellings_masks  # noqa: E402, F401
import spellings_normalised  # noqa: E402, F401
import spellings_powers  # noqa: E402, F401
import spellings_rare  # noqa: E402, F401
import spellings_spread  # noqa: E402, F401
import spellings_weights  # noqa: E402, F401
import spellings_written  # noqa: E402, F401
