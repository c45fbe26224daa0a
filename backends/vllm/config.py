"""The Hugging Face config class of a saved port."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

__all__ = ["FxportConfig"]


class FxportConfig(PretrainedConfig):
    """Sizes that vLLM reads before the model exists; the graph itself is in its own file."""

    model_type = "fxport"

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
