"""Every further style by name: what the engine test and the zoo runner go through."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from tests.zoo import awkward, caches, loose, older
from tests.zoo.modern import CONFIGS, Modern

__all__ = ["STYLES"]

STYLES: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(Modern, config) for name, config in CONFIGS.items()},
    "per-head GPT": loose.PerHeadGPT,
    "nn.TransformerEncoder": loose.SinusoidalLM,
    "nn.MultiheadAttention": loose.MultiheadGPT,
    "einsum": loose.EinsumLM,
    "speed run": loose.SpeedRun,
    "growing rotary": awkward.MODELS["growing rotary"],
    "tables keyed by length": awkward.MODELS["tables keyed by length"],
    "mask for the exact length": awkward.MODELS["mask for the exact length"],
    "window branch": awkward.MODELS["window branch"],
    "cache in attributes": caches.EXACT["cache in attributes"],
    "nn.TransformerEncoder, mask": older.EXACT["nn.TransformerEncoder, mask"],
    "weights beside modules": older.EXACT["weights beside modules"],
}
