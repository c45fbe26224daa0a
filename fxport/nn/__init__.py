"""Building blocks of tensor-parallel language models that train here and serve in vLLM."""

from fxport.nn.attention import VLLMFlashAttention
from fxport.nn.checkpoint import load_model, save_model
from fxport.nn.embedding import VocabParallelEmbedding
from fxport.nn.linear import ColumnParallelLinear, RowParallelLinear
from fxport.nn.registry import register_model
from fxport.nn.shards import full_state_dict
from fxport.nn.transformer import GenericTransformerForCausalLM, TransformerConfig

__all__ = [
    "ColumnParallelLinear",
    "GenericTransformerForCausalLM",
    "RowParallelLinear",
    "TransformerConfig",
    "VLLMFlashAttention",
    "VocabParallelEmbedding",
    "full_state_dict",
    "load_model",
    "register_model",
    "save_model",
]
