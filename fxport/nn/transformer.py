"""A decoder-only transformer of the parallel building blocks: trainable, served by vLLM as is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fxport.errors import FxportError
from fxport.nn.attention import VLLMFlashAttention, token_positions
from fxport.nn.embedding import VocabParallelEmbedding
from fxport.nn.linear import ColumnParallelLinear, RowParallelLinear
from fxport.parallel.collectives import copy_to
from fxport.parallel.context import ParallelContext

__all__ = ["GenericTransformerForCausalLM", "TransformerConfig"]


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the whole model; the fields stand under these names in config.json.

    Attributes:
        num_key_value_heads: None: as many as query heads.
        rope_base: of the rotary embedding.
        sliding_window_size: tokens that a token sees, itself included; None: all before it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 2048
    rope_base: float = 10000.0
    rms_norm_eps: float = 1e-6
    sliding_window_size: int | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def of(cls, config: Any) -> TransformerConfig:
        """From any object with these attributes; what has a default may be missing.

        Raises:
            FxportError: a required attribute is missing.
        """
        found = {f.name: getattr(config, f.name) for f in fields(cls) if hasattr(config, f.name)}
        try:
            return cls(**found)
        except TypeError as error:
            raise FxportError(f"the model's config is incomplete: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``"""

    def __init__(self, config: TransformerConfig, context: ParallelContext) -> None:
        super().__init__()
        hidden, wide = config.hidden_size, config.intermediate_size
        self.parallel_context = context
        self.gate_proj, self.up_proj = (
            ColumnParallelLinear(
                hidden, wide, False, disable_grad_reduce=True, parallel_context=context
            )
            for _ in range(2)
        )
        self.down_proj = RowParallelLinear(wide, hidden, False, parallel_context=context)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = copy_to(hidden, self.parallel_context)  # once for gate and up
        result: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return result


class _Layer(nn.Module):
    def __init__(self, config: TransformerConfig, context: ParallelContext) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = VLLMFlashAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            rope_base=config.rope_base,
            sliding_window=config.sliding_window_size,
            parallel_context=context,
        )
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _MLP(config, context)

    def forward(self, hidden: Tensor, positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), positions, cu_seqlens)
        result: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return result


class GenericTransformerForCausalLM(nn.Module):
    """Pre-norm blocks of attention and gated MLP, RMSNorm, rotary embedding.

    ``forward`` is for training. vLLM calls `hidden_states` and `compute_logits`, the two methods
    that any model needs to be served through `fxport.register_model`.

    Args:
        config: a `TransformerConfig`, or any object with its attributes.
        parallel_context: None is one rank.

    Raises:
        FxportError: the config is incomplete, or sizes do not divide over the ranks.
    """

    def __init__(self, config: Any, parallel_context: ParallelContext | None = None) -> None:
        super().__init__()
        self.config = TransformerConfig.of(config)
        context = parallel_context or ParallelContext(0, 1)
        sizes = self.config
        std = sizes.hidden_size**-0.5
        self.embed_tokens = VocabParallelEmbedding(
            sizes.vocab_size, sizes.hidden_size, std=std, parallel_context=context
        )
        self.layers = nn.ModuleList(_Layer(sizes, context) for _ in range(sizes.num_hidden_layers))
        self.norm = nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.lm_head = VocabParallelEmbedding(
            sizes.vocab_size, sizes.hidden_size, std=std, parallel_context=context
        )
        if sizes.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """``[B, T]`` -> ``[B, T, C]``, or packed ``[num_tokens]`` -> ``[num_tokens, C]``."""
        hidden = self.embed_tokens(input_ids)
        if positions is None:
            positions = token_positions(hidden, cu_seqlens)
        for layer in self.layers:
            hidden = layer(hidden, positions, cu_seqlens)
        result: Tensor = self.norm(hidden)
        return result

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """``[.., C]`` -> ``[.., V]``"""
        return self.lm_head.logits(hidden)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """``[B, T]`` -> logits ``[B, T, V]``, or packed ``[num_tokens]`` -> ``[num_tokens, V]``."""
        return self.compute_logits(self.hidden_states(input_ids, positions, cu_seqlens))
