"""A tiny random model for each Hugging Face family that has a causal language model."""

from __future__ import annotations

from collections.abc import Mapping
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
_OF_A_TOWER = {
    "num_hidden_layers": 1, "depth": 1, "hidden_size": 64, "intermediate_size": 64,
    "num_attention_heads": 2, "num_heads": 2,
}  # fmt: skip
# Where the defaults leave out a kind of layer, or sizes hang together: given to the configuration
# as it is made, and left as they are.
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "bamba": {"hidden_size": 128, "mamba_n_heads": 4, "mamba_d_state": 16,
              "num_hidden_layers": LAYERS, "attn_layer_indices": [1, 3]},
    "dbrx": {"d_model": 128, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
             "ffn_config": {"ffn_hidden_size": 192, "moe_num_experts": 4, "moe_top_k": 2,
                            "hidden_size": 128}},
    "granitemoehybrid": {"hidden_size": 128, "mamba_n_heads": 4, "mamba_d_state": 16,
                         "num_hidden_layers": LAYERS,
                         "layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_hidden_layers": LAYERS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"num_hidden_layers": LAYERS, "layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"num_hidden_layers": LAYERS, "layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"hidden_size": 128, "num_heads": 8, "head_dim": 32, "state_size": 16},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32,
                       "indexer_budget": 16, "indexer_compress_ratio": 2},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 2},
    "rwkv": {"attention_hidden_size": 128, "intermediate_size": 192},
    "xlm": {"causal": True},
    "xlnet": {"use_mems_eval": False},
    "xlstm": {"hidden_size": 128, "num_hidden_layers": LAYERS, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"hidden_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
              "num_key_value_heads": 4,
              "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"hidden_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
               "n_mamba_heads": 4, "mamba_d_state": 16,
               "layers_block_type": ["linear_attention", "hybrid"] * 2},
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

    own = _OF_FAMILY.get(family, {})
    config = CONFIG_MAPPING[family](**own)
    text = config.get_text_config(decoder=True)
    for part in {id(c): c for c in (config, text)}.values():
        _shrink(part, own)
    for name in ("vision_config", "audio_config"):  # no token goes through it
        if getattr(config, name, None) is not None:
            _shrink_tower(getattr(config, name))
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=implementation
    )
    return sharpen(model, seed, spread=2.0)


def _shrink_tower(config: Any) -> None:
    for name, size in _OF_A_TOWER.items():
        if isinstance(getattr(config, name, None), int):
            _set(config, name, size)


def _shrink(config: Any, own: Mapping[str, Any]) -> None:
    """Smaller sizes wherever the configuration has one of the names, but for those in `own`."""
    depth = next(
        (getattr(config, n) for n in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
         if isinstance(getattr(config, n, None), int)), 0,
    )  # fmt: skip
    for name, size in _SIZES.items():
        if name in own:
            continue
        value = _get(config, name)
        given = isinstance(value, int) and not isinstance(value, bool)
        if given or (value is None and name in _EVEN_IF_NONE and name in vars(config)):
            _set(config, name, 128 if name in _SAME_AS_HIDDEN else size)
    for name, value in list(vars(config).items()):
        if (
            name not in own
            and isinstance(value, list | tuple)
            and depth > LAYERS
            and len(value) == depth
        ):
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
