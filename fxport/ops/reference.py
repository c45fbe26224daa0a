"""The dense formula of `fxport::attention`, written to be read; autograd differentiates it.

It makes ``[B, Hq, Tq, Tk]`` tensors. Tests hold every other implementation against it in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxport.ops.dropout import keep_mask, keep_scale
from fxport.ops.params import AttentionParams

__all__ = ["allowed", "reference_attention"]


def allowed(
    params: AttentionParams,
    rows: int,
    columns: int,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> Tensor:
    """bool [Tq, Tk]: what causality, the window and the segments leave to each row."""
    j = torch.arange(columns, device=device)
    i = torch.arange(rows, device=device)
    distance = j[None, :] - (i[:, None] + params.q_offset)
    seen = torch.ones(rows, columns, dtype=torch.bool, device=device)
    if params.causal:
        seen &= distance <= 0
    if params.window_left >= 0:
        seen &= distance >= -params.window_left
    if params.window_right >= 0:
        seen &= distance <= params.window_right
    first_row, first_column = torch.zeros_like(i), torch.zeros_like(j)
    if cu_seqlens is not None:
        of_row, of_column = (torch.bucketize(x, cu_seqlens[1:], right=True) for x in (i, j))
        seen &= of_row[:, None] == of_column
        first_row, first_column = cu_seqlens[of_row], cu_seqlens[of_column]
    if params.chunk > 0:
        chunk_of_row = (i - first_row) // params.chunk
        seen &= chunk_of_row[:, None] == (j - first_column) // params.chunk
    return seen


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """Attention as `AttentionParams` defines it; arguments and results as `fxport::attention`."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, q_heads, rows, _ = q.shape
    columns = k.shape[2]
    groups = q_heads // k.shape[1]
    keys = k.to(compute).repeat_interleave(groups, dim=1)
    values = v.to(compute).repeat_interleave(groups, dim=1)

    scores = params.scale * (q.to(compute) @ keys.mT)
    if params.softcap > 0:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    seen = allowed(params, rows, columns, cu_seqlens, q.device).expand(scores.shape)
    if bias is not None and bias.dtype == torch.bool:
        seen = seen & bias
    elif bias is not None:
        scores = scores + bias.to(compute)
    if alibi_slopes is not None:
        a = torch.arange(rows, device=q.device)[:, None] + params.q_offset
        distance = torch.arange(columns, device=q.device) - a
        scores = scores + alibi_slopes.to(compute)[:, None, None] * distance
    columns_and_sink = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        sink = sinks.to(compute)[None, :, None, None].expand(batch, q_heads, rows, 1)
        columns_and_sink = torch.cat([columns_and_sink, sink], dim=-1)
    # a row that sees nothing (a bias of -inf forbids too) is computed on zeros and then replaced,
    # so that no NaN arises, in its gradient either
    empty = torch.isneginf(columns_and_sink).all(-1, keepdim=True)
    finite = columns_and_sink.masked_fill(empty, 0)
    # written out: the derivative of torch.logsumexp is wrong where lse rounds log(n) away
    top = finite.detach().amax(-1, keepdim=True)
    lse = (top + (finite - top).exp().sum(-1, keepdim=True).log()).masked_fill(empty, -torch.inf)
    weights = finite.softmax(-1).masked_fill(empty, 0)[..., :columns]
    if params.dropout_p > 0:
        assert seed is not None
        heads = range(params.head_offset, params.head_offset + q_heads)
        keep = keep_mask(seed, params.dropout_p, range(batch), heads, range(rows), range(columns))
        weights = weights * keep * keep_scale(params.dropout_p)
    return (weights @ values).to(q.dtype), lse[..., 0]
