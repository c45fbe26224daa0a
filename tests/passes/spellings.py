"""Attention as people write it. Each spelling: qkv ``[3, B, T, H, D]`` (and weights) -> a tensor.

All shapes differ: B=2, H=4, T=7, D=6; the functions read them from their input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LEGAL", "Spelling"]


@dataclass(frozen=True)
class Spelling:
    """One way to write an attention.

    Attributes:
        function: ``(qkv, *parameters, *buffers) -> output``.
        parameters, buffers: shapes or tensors made by a function of (H, limit).
        expect: words that must stand in the decision's detail.
    """

    function: Callable[..., Any]
    parameters: tuple[Callable[[], Tensor], ...] = ()
    buffers: tuple[Callable[[], Tensor], ...] = ()
    expect: tuple[str, ...] = ("causal",)

    def __str__(self) -> str:
        return self.function.__name__


LEGAL: list[Spelling] = []
LIMIT = 16


def legal(
    *expect: str,
    parameters: tuple[Callable[[], Tensor], ...] = (),
    buffers: tuple[Callable[[], Tensor], ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        LEGAL.append(Spelling(function, parameters, buffers, expect or ("causal",)))
        return function

    return register


def _tril_buffer() -> Tensor:
    return torch.tril(torch.ones(LIMIT, LIMIT)).view(1, 1, LIMIT, LIMIT)


def _bool_buffer() -> Tensor:
    return torch.ones(LIMIT, LIMIT, dtype=torch.bool).tril()


def _minus_inf_buffer() -> Tensor:
    return torch.full((LIMIT, LIMIT), float("-inf")).triu(1)


def _parameter(*shape: int) -> Callable[[], Tensor]:
    def make() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5

    return make


def heads_first(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(0))
    return q, k, v


def causal_bool(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def finish(w: Tensor, v: Tensor) -> Tensor:
    return (w @ v).transpose(1, 2).flatten(2)


# -- scale and mask ------------------------------------------------------------------------------


@legal(buffers=(_tril_buffer,))
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


@legal("scale 0.408248", "causal", buffers=(_bool_buffer,))
def where_self(qkv: Tensor, tril: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    t = q.size(2)
    s = q @ k.transpose(-1, -2) / torch.sqrt(torch.tensor(6.0))
    s = torch.where(tril[:t, :t], s, torch.finfo(s.dtype).min)
    return finish(torch.nn.functional.softmax(s, -1, dtype=torch.float64), v)


@legal("scale 0.408248", "causal", buffers=(_minus_inf_buffer,))
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


@legal("dense constant bias")
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


@legal("causal", "dense learned bias", parameters=(_parameter(4, 1, 1),))
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


@legal("causal", "sinks", parameters=(_parameter(4),))
def sinks_by_cat(qkv: Tensor, sinks: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    b, h, t, _ = q.shape
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(t), float("-inf"))
    column = sinks.view(1, -1, 1, 1).expand(b, h, t, 1)
    s = torch.cat([s, column], dim=-1)
    s = s - s.max(dim=-1, keepdim=True).values
    return finish(s.softmax(-1)[..., :-1], v)


@legal("causal", "sinks", parameters=(_parameter(4, 1, 1),))
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


@legal("causal", "dense learned bias", parameters=(_parameter(31, 4),))
def relative_bias(qkv: Tensor, table: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    i = torch.arange(q.size(2))
    bias = table[i[None, :] - i[:, None] + 15].permute(2, 0, 1)
    s = q @ k.transpose(-1, -2) + bias
    s = s.masked_fill(i[None, :] > i[:, None], float("-inf"))
    return finish(s.softmax(-1), v)


@legal("causal", parameters=(_parameter(4, 1, 1),))
def per_head_temperature(qkv: Tensor, temperature: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) * temperature
    s = s.masked_fill(~causal_bool(q.size(2)), float("-inf"))
    return finish(s.softmax(-1), v)


@legal("causal", parameters=(_parameter(1),))
def learned_divisor(qkv: Tensor, temperature: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) / temperature
    s = s.masked_fill(~causal_bool(q.size(2)), float("-inf"))
    return finish(s.softmax(-1), v)


@legal("causal", parameters=(_parameter(6), _parameter(6)))
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


@legal("causal", buffers=(_bool_buffer,))
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
