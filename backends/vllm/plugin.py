"""vLLM's entry point: makes a bare ``LLM("my_model/")`` work in every worker process."""

from __future__ import annotations

__all__ = ["register"]

ARCHITECTURE = "FxportForCausalLM"
BUILDER = "FxportBuilderForCausalLM"  # models registered with fxport.register_model


def register() -> None:
    """Registers config and model class with vLLM; may be called any number of times."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from fxport.backends.vllm.config import FxportConfig

    AutoConfig.register(FxportConfig.model_type, FxportConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # Lazily, by name: importing the class would start CUDA before vLLM forks its workers.
        ModelRegistry.register_model(ARCHITECTURE, f"fxport.backends.vllm.model:{ARCHITECTURE}")
    if BUILDER not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(BUILDER, f"fxport.backends.vllm.builder:{BUILDER}")
