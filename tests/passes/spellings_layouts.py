"""Layouts, grouped heads, extras and `scaled_dot_product_attention`: more of `spellings`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spellings_base import bool_buffer, causal_bool, finish, heads_first, legal, parameter
from torch import Tensor

# -- layouts -------------------------------------------------------------------------------------


@legal("causal")
def einsum_tokens_first(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unbind(0)
    s = torch.einsum("bthd,bshd->bhts", q, k) * 0.5
    s = s.masked_fill(~causal_bool(q.size(1)), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", s.softmax(-1), v)


@legal("causal")
def einsum_implicit_ellipsis(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = torch.einsum("...id, ...jd -> ...ij", q, k)
    s = s.masked_fill(~causal_bool(q.size(2)), float("-inf"))
    return torch.einsum("...ij,...jd->...id", s.softmax(-1), v)


@legal("causal")
def folded_heads_bmm(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
    s = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(d)
    s = s.view(b, h, t, t) + torch.full((t, t), float("-inf"), dtype=s.dtype).triu(1)
    w = s.view(b * h, t, t).softmax(-1)
    return torch.bmm(w, v).view(b, h, t, d).transpose(1, 2).reshape(b, t, h * d)


@legal("causal", "dense learned bias", parameters=(parameter(4, 1, 1),))
def baddbmm_bias(qkv: Tensor, slopes: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
    bias = (slopes * torch.arange(t)).expand(b, h, 1, t).reshape(b * h, 1, t)
    s = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=d**-0.5)
    s = s.view(b, h, t, t).masked_fill(~causal_bool(t), float("-inf"))
    return torch.bmm(s.softmax(-1).view(b * h, t, t), v).view(b, h, t, d)


@legal("causal", "2 kv heads")
def gqa_repeat_interleave(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = (x[:, :2].repeat_interleave(2, dim=1) for x in (k, v))
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(q.size(2)), float("-inf"))
    return finish(s.softmax(-1), v)


@legal("causal", "2 kv heads")
def gqa_expand(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    b, h, t, d = q.shape
    k, v = (x[:, :2, None].expand(b, 2, 2, t, d).reshape(b, h, t, d) for x in (k, v))
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(t), float("-inf"))
    return finish(s.softmax(-1), v)


@legal("causal", "2 kv heads")
def gqa_tiled_heads(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = (x[:, :2].repeat(1, 2, 1, 1) for x in (k, v))
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(q.size(2)), float("-inf"))
    return finish(s.softmax(-1), v)


@legal("causal", "2 kv heads")
def gqa_grouped_einsum(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unbind(0)
    q = q.unflatten(2, (2, 2))
    s = torch.einsum("btkgd,bskd->bkgts", q, k[:, :, :2])
    s = s.masked_fill(~causal_bool(q.size(1)), float("-inf"))
    return torch.einsum("bkgts,bskd->btkgd", s.softmax(-1), v[:, :, :2]).flatten(2)


@legal("causal", "2 kv heads")
def gqa_groups_folded_into_rows(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    b, h, t, d = q.shape
    q = q.reshape(b, 2, 2 * t, d)
    s = (q @ k[:, :2].transpose(-1, -2)).view(b, 2, 2, t, t)
    s = s.masked_fill(~causal_bool(t), float("-inf")).view(b, 2, 2 * t, t)
    return (s.softmax(-1) @ v[:, :2]).view(b, h, t, d)


@legal("causal", "1 kv heads")
def mqa_broadcast(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = k[:, :1], v[:, :1]
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(q.size(2)), float("-inf"))
    return finish(s.softmax(-1), v)


@legal("causal", "1 heads")
def heads_in_a_loop(qkv: Tensor) -> Tensor:
    outputs = []
    for head in range(2):
        q, k, v = (x[:, :, head] for x in qkv.unbind(0))
        s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(q.size(1)), float("-inf"))
        outputs.append(s.softmax(-1) @ v)
    return torch.cat(outputs, dim=-1)


@legal("full")
def cross_lengths(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    q = q[:, :, :3]
    return finish((q @ k.transpose(-1, -2)).softmax(-1), v)


# -- additions -----------------------------------------------------------------------------------


@legal("causal", "softcap 2")
def softcapped(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) * 0.4
    s = 2.0 * torch.tanh(s / 2.0)
    s = s.masked_fill(~causal_bool(q.size(2)), float("-inf"))
    return finish(s.softmax(-1), v)


@legal("causal", "sinks", parameters=(parameter(4),))
def sinks_by_cat(qkv: Tensor, sinks: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    b, h, t, _ = q.shape
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(t), float("-inf"))
    column = sinks.view(1, -1, 1, 1).expand(b, h, t, 1)
    s = torch.cat([s, column], dim=-1)
    s = s - s.max(dim=-1, keepdim=True).values
    return finish(s.softmax(-1)[..., :-1], v)


@legal("causal", "sinks", parameters=(parameter(4, 1, 1),))
def sinks_first(qkv: Tensor, sinks: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    b, _, t, _ = q.shape
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(t), float("-inf"))
    s = torch.cat([sinks.expand(b, -1, t, 1), s], dim=-1)
    return finish(s.softmax(-1)[..., 1:], v)


@legal("causal", "ALiBi")
def alibi(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    i = torch.arange(q.size(2))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    s = q @ k.transpose(-1, -2) + slopes[:, None, None] * (i[None, :] - i[:, None])
    s = s.masked_fill(i[None, :] > i[:, None], float("-inf"))
    return finish(s.softmax(-1), v)


@legal("causal", "ALiBi")
def alibi_per_column(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    t = q.size(2)
    slopes = 2.0 ** -torch.arange(1, 5)
    s = q @ k.transpose(-1, -2) * 0.2 + (slopes.view(4, 1, 1) * torch.arange(t)).view(1, 4, 1, t)
    return finish((s + torch.full((t, t), float("-inf")).triu(1)).softmax(-1), v)


@legal("causal", "dense learned bias", parameters=(parameter(31, 4),))
def relative_bias(qkv: Tensor, table: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    i = torch.arange(q.size(2))
    bias = table[i[None, :] - i[:, None] + 15].permute(2, 0, 1)
    s = q @ k.transpose(-1, -2) + bias
    s = s.masked_fill(i[None, :] > i[:, None], float("-inf"))
    return finish(s.softmax(-1), v)


@legal("causal", parameters=(parameter(4, 1, 1),))
def per_head_temperature(qkv: Tensor, temperature: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) * temperature
    s = s.masked_fill(~causal_bool(q.size(2)), float("-inf"))
    return finish(s.softmax(-1), v)


@legal("causal", parameters=(parameter(1),))
def learned_divisor(qkv: Tensor, temperature: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) / temperature
    s = s.masked_fill(~causal_bool(q.size(2)), float("-inf"))
    return finish(s.softmax(-1), v)


@legal("causal", parameters=(parameter(6), parameter(6)))
def qk_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    q, k = F.rms_norm(q, (6,), q_weight), F.rms_norm(k, (6,), k_weight)
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(q.size(2)), float("-inf"))
    return finish(s.softmax(-1), v)


# -- scaled_dot_product_attention ------------------------------------------------------------------


@legal("causal", "scale 0.408248")
def sdpa_causal(qkv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*heads_first(qkv), is_causal=True)


@legal("causal", "2 kv heads", "scale 0.3")
def sdpa_gqa(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return F.scaled_dot_product_attention(
        q, k[:, :2], v[:, :2], is_causal=True, scale=0.3, enable_gqa=True
    )


@legal("causal", buffers=(bool_buffer,))
def sdpa_bool_mask(qkv: Tensor, mask: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[: q.size(2), : q.size(2)])


@legal("causal")
def sdpa_float_mask(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    t = q.size(2)
    mask = torch.zeros(t, t, dtype=q.dtype).masked_fill(~causal_bool(t), float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None])


@legal("full", "1 heads")
def sdpa_three_dims(qkv: Tensor) -> Tensor:
    q, k, v = (x[:, :, 0] for x in qkv.unbind(0))
    return F.scaled_dot_product_attention(q, k, v)
