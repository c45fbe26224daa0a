"""Causal self-attention that trains with flash attention and serves on vLLM's paged cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxport.errors import FxportError
from fxport.nn.linear import ColumnParallelLinear, RowParallelLinear
from fxport.ops.attention import attention
from fxport.ops.params import AttentionParams
from fxport.parallel.collectives import copy_to
from fxport.parallel.context import ParallelContext

__all__ = ["FlashCore", "VLLMFlashAttention", "rotate", "token_positions"]


def token_positions(hidden: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Positions counted from the start of each sequence: ``[T]``, packed ``[num_tokens]``."""
    length = hidden.shape[-2]
    index = torch.arange(length, device=hidden.device)
    if cu_seqlens is None:
        return index
    segment = torch.searchsorted(cu_seqlens.to(torch.int64), index, right=True) - 1
    return index - cu_seqlens[segment]


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary embedding (Su et al., 2021), first half against second half.

    Args:
        x: ``[.., T, H, D]``, D even.
        positions: ``[.., T]`` or ``[T]``, integers.
        base: the angle of pair i at position p is ``p * base^(-2i/D)``, in radians.
    """
    half = x.shape[-1] // 2
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    exponent = torch.arange(half, device=x.device, dtype=precise) / half
    angle = positions[..., None, None].to(precise) * base**-exponent
    cos, sin = angle.cos(), angle.sin()
    one, other = x[..., :half].to(precise), x[..., half:].to(precise)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), -1).to(x.dtype)


class FlashCore(nn.Module):
    """``fxport::attention``: q ``[B, Hq, T, D]``, k and v ``[B, Hkv, T, D]`` -> ``[B, Hq, T, D]``.

    The part of `VLLMFlashAttention` that vLLM's own attention layer replaces when serving.
    """

    def __init__(self, params: AttentionParams) -> None:
        super().__init__()
        self.params = params

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return attention(q, k, v, cu_seqlens=cu_seqlens, params=self.params)[0]


class VLLMFlashAttention(nn.Module):
    """Causal self-attention: q/k/v projections, rotary embedding, flash attention, output.

    Query head h uses key/value head ``h // (num_heads // num_kv_heads)``. Heads are divided over
    the ranks, never cut; with fewer key/value heads than ranks, neighbouring ranks hold copies
    and their gradients are summed. In checkpoints: ``q_proj``, ``k_proj``, ``v_proj`` with weight
    ``[heads * head_dim, C]`` and ``o_proj`` with weight ``[C, heads * head_dim]``.

    Inside vLLM the same module runs on the paged cache: the builder model puts vLLM's attention
    layer in the place of `core`.

    Args:
        hidden_size: C.
        num_heads: query heads of the whole model.
        num_kv_heads: default num_heads.
        head_dim: D; default ``hidden_size // num_heads``.
        bias: of all four projections.
        rope_base: None: no rotary embedding.
        sliding_window: how many tokens a token sees, itself included; None: all before it.
        scale: factor on q.k; default ``head_dim ** -0.5``.
        parallel_context: None is one rank.

    Raises:
        FxportError: heads that do not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        rope_base: float | None = None,
        sliding_window: int | None = None,
        scale: float | None = None,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__()
        context = parallel_context or ParallelContext(0, 1)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if head_dim is None and hidden_size % num_heads:
            raise FxportError(f"hidden size {hidden_size} does not divide over {num_heads} heads")
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        if rope_base is not None and head_dim % 2:
            raise FxportError(f"a rotary embedding needs an even head size, not {head_dim}")
        if sliding_window is not None and sliding_window < 1:
            raise FxportError(f"a sliding window of {sliding_window} tokens sees nothing")
        replicas = _replicas(num_heads, kv_heads, context.world_size)
        self.parallel_context, self.head_dim, self.rope_base = context, head_dim, rope_base
        self.num_heads = num_heads // context.world_size
        self.num_kv_heads = kv_heads * replicas // context.world_size
        self.q_proj = ColumnParallelLinear(
            hidden_size,
            num_heads * head_dim,
            bias,
            disable_grad_reduce=True,
            parallel_context=context,
        )
        self.k_proj, self.v_proj = (
            ColumnParallelLinear(
                hidden_size,
                kv_heads * head_dim,
                bias,
                replicas=replicas,
                disable_grad_reduce=True,
                parallel_context=context,
            )
            for _ in range(2)
        )
        self.o_proj = RowParallelLinear(
            num_heads * head_dim, hidden_size, bias, parallel_context=context
        )
        self.params = AttentionParams(
            scale=head_dim**-0.5 if scale is None else scale,
            causal=True,
            window_left=-1 if sliding_window is None else sliding_window - 1,
        )
        self.core: nn.Module = FlashCore(self.params)

    def forward(
        self, hidden: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Attention over a batch ``[B, T, C]``, or over packed sequences ``[num_tokens, C]``.

        Args:
            positions: ``[T]``, ``[B, T]`` or ``[num_tokens]``; default: counted from the start of
                each sequence. Used by the rotary embedding alone.
            cu_seqlens: int32 ``[sequences + 1]``, from 0 to num_tokens; packed input only, where
                None means one sequence.

        Returns:
            The shape of `hidden`.

        Raises:
            FxportError: another number of dimensions, or cu_seqlens with a batch.
        """
        if hidden.dim() not in (2, 3) or (hidden.dim() == 3 and cu_seqlens is not None):
            raise FxportError(
                "attention takes [B, T, C], or packed [num_tokens, C] with cu_seqlens; not "
                f"{tuple(hidden.shape)}{'' if cu_seqlens is None else ' with cu_seqlens'}"
            )
        hidden = copy_to(hidden, self.parallel_context)  # once for q, k and v
        q = self.q_proj(hidden).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(hidden).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(hidden).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.rope_base is not None:
            if positions is None:
                positions = token_positions(hidden, cu_seqlens)
            q, k = (rotate(x, positions, self.rope_base) for x in (q, k))
        if hidden.dim() == 2:
            q, k, v = q[None], k[None], v[None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        # vLLM's layer knows the sequences by itself and takes three arguments.
        extra = () if cu_seqlens is None else (cu_seqlens,)
        out = self.core(q, k, v, *extra).transpose(1, 2).flatten(-2)
        return self.o_proj(out[0] if hidden.dim() == 2 else out)


def _replicas(num_heads: int, kv_heads: int, ranks: int) -> int:
    """How many ranks hold the same key/value head."""
    if num_heads % kv_heads:
        raise FxportError(f"{num_heads} query heads do not divide over {kv_heads} key/value heads")
    if num_heads % ranks:
        raise FxportError(f"{num_heads} query heads do not divide over {ranks} ranks")
    if kv_heads % ranks == 0:
        return 1
    if ranks % kv_heads:
        raise FxportError(f"{kv_heads} key/value heads and {ranks} ranks: neither divides")
    return ranks // kv_heads
