"""A Hugging Face model asked for the plain spelling of what it computes.

config.use_cache = True    ->    False: no cache of keys and values is made or returned
"""

from __future__ import annotations

import sys

from torch import nn

__all__ = ["without_cache"]


def without_cache(model: nn.Module) -> None:
    """Turns the cache off in the configurations that the modules of a clone hold.

    Args:
        model: from `clone_for_capture`: its configurations are copies.
    """
    library = sys.modules.get("transformers")  # nobody has such a model who has not imported it
    if library is None:
        return
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, library.PretrainedConfig) and getattr(config, "use_cache", False):
            config.use_cache = False
