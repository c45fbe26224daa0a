"""A tiny random model for each Hugging Face family that has a causal language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["families", "sharpen", "tiny_model"]

LAYERS, LENGTH, VOCABULARY = 4, 160, 128

# Names that configurations use for the same thing -> the small size.
_SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS
    ),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), 128),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "global_head_dim"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "ffn_hidden_size",
         "intermediate_size_mlp", "shared_intermediate_size", "word_embed_proj_dim"), 192,
    ),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_groups"), 1),
    **dict.fromkeys(
        ("moe_intermediate_size", "expert_intermediate_size", "shared_expert_intermediate_size",
         "expert_ffn_hidden_size"), 96,
    ),
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "qk_head_dim": 48,
    "num_kv_shared_layers": 1,
    "v_head_dim": 32,
    "sliding_window": 24,
    "attention_chunk_size": 32,
    "rotary_dim": 16,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"),
        LENGTH,
    ),
}  # fmt: skip
_SAME_AS_HIDDEN = {"word_embed_proj_dim"}
_EVEN_IF_NONE = {
    "head_dim", "num_key_value_heads", "n_routed_experts", "n_shared_experts",
    "num_experts_per_tok",
}  # fmt: skip
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def families() -> list[str]:
    """Model types of the installed transformers with an `AutoModelForCausalLM`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(family: str, implementation: str = "eager", seed: int = 0) -> nn.Module:
    """A model of a few layers in float32 with random weights, in eval mode.

    The weights are large enough that the best next token is clear and depends on the context.

    Raises:
        Exception: whatever transformers raises where a family cannot be shrunk generically.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family]()
    text = config.get_text_config(decoder=True)
    for part in {id(c): c for c in (config, text)}.values():
        _shrink(part)
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=implementation
    )
    return sharpen(model, seed, spread=2.0)


def _shrink(config: Any) -> None:
    depth = next(
        (getattr(config, n) for n in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
         if isinstance(getattr(config, n, None), int)), 0,
    )  # fmt: skip
    for name, size in _SIZES.items():
        value = _get(config, name)
        given = isinstance(value, int) and not isinstance(value, bool)
        if given or (value is None and name in _EVEN_IF_NONE and name in vars(config)):
            _set(config, name, 128 if name in _SAME_AS_HIDDEN else size)
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and depth > LAYERS and len(value) == depth:
            _set(config, name, _kinds(value))
    if isinstance(getattr(config, "qk_rope_head_dim", None), int):
        _set(config, "head_dim", config.qk_rope_head_dim)  # what is rotated of a latent head
        _set(config, "num_key_value_heads", 4)  # every head has keys of its own
    for name, token in _TOKENS.items():
        if getattr(config, name, None) is not None:
            _set(config, name, token)


def _kinds(values: list[Any] | tuple[Any, ...]) -> list[Any]:
    """The first layers, with every kind of layer that there is among them, in order."""
    kinds = list(dict.fromkeys(map(str, values)))
    first = [next(v for v in values if str(v) == kind) for kind in kinds][:LAYERS]
    return [first[i % len(first)] for i in range(LAYERS)]


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except (ValueError, NotImplementedError, RuntimeError):  # it differs from layer to layer
        return None


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        return  # computed from other sizes


def sharpen(model: nn.Module, seed: int, spread: float) -> nn.Module:
    """Random weights large enough that the best token is clear; the model itself, in eval mode.

    Args:
        spread: standard deviation of a matrix, times the root of what it sums over.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * (spread / parameter.shape[-1] ** 0.5))
            else:
                parameter.add_(noise * 0.1)
    return model.eval()
