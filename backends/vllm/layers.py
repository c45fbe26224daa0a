"""The module that stands in a serving graph for attention, which vLLM must see."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from fxport.backends.vllm.chunks import ChunkFlags
from fxport.errors import FxportError
from fxport.serving import AttentionLayer

__all__ = ["PagedAttention", "supported_head_size"]


def supported_head_size(size: int) -> int:
    """The smallest head size of vLLM's attention that holds `size`; zero padding is exact.

    Raises:
        FxportError: larger than every supported size.
    """
    if current_platform.is_cpu():
        sizes = [32, 64, 80, 96, 112, 128, 192, 256]
    else:  # FlashAttention takes every multiple of 8 up to 256, from 32
        sizes = list(range(32, 257, 8))
    for candidate in sizes:
        if candidate >= size:
            return candidate
    raise FxportError(f"vLLM's attention takes head sizes up to {sizes[-1]}, not {size}")


class PagedAttention(nn.Module):
    """``fxport::attention`` on vLLM's paged cache: ``[1, H, N, D]`` in, ``[1, H, N, Dv]`` out."""

    def __init__(
        self,
        layer: AttentionLayer,
        sinks: torch.Tensor | None,
        vllm_config: VllmConfig,
        prefix: str,
    ) -> None:
        super().__init__()
        self.layer, self.sinks = layer, sinks
        params = layer.params
        self.flags = ChunkFlags.of(params, vllm_config)
        size = layer.head_size + (0 if self.flags is None else self.flags.size)
        self.padded = supported_head_size(max(size, layer.head_size_v))
        window = params.window_left if self.flags is None else self.flags.window_left
        # Not every attention backend knows sinks: passed only where there are some.
        extra: dict[str, Any] = {} if sinks is None else {"sinks": sinks.flatten()}
        self.attn = Attention(
            layer.num_heads,
            self.padded,
            params.scale,
            num_kv_heads=layer.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            logits_soft_cap=params.softcap or None,
            # vLLM counts the token itself; a window of one looks at nothing else.
            per_layer_sliding_window=window + 1 if window >= 0 else None,
            alibi_slopes=list(layer.alibi_slopes) if layer.alibi_slopes else None,
            prefix=prefix,
            **extra,
        )
        self.dtype = vllm_config.model_config.dtype

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`positions` ``[N]`` are those of the rows; layers without chunks need none."""
        layer = self.layer
        if self.flags is not None:
            assert positions is not None
            q, k = self.flags.append(q.to(self.dtype), k.to(self.dtype), positions)
        out = self.attn(self._flat(q), self._flat(k), self._flat(v))
        out = out.view(1, -1, layer.num_heads, self.padded)
        if self.padded != layer.head_size_v:
            out = out[..., : layer.head_size_v]
        return out.transpose(1, 2).to(v.dtype)

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        """``[1, H, N, D]`` -> ``[N, H * padded]``"""
        x = x.transpose(1, 2).to(self.dtype)
        if x.shape[-1] != self.padded:
            x = F.pad(x, (0, self.padded - x.shape[-1]))
        flat = x.reshape(-1, x.shape[2] * self.padded)
        # Kernels take rows at any distance, but of neighbouring numbers (not `conv1d`'s columns).
        return flat if flat.stride(1) == 1 else flat.contiguous()
