"""A Hugging Face model asked for the plain spelling of what it computes.

config.use_cache = True                  ->  False: no cache of keys and values
config.experts_implementation = grouped  ->  eager: the library's own loop over experts
"""

from __future__ import annotations

import sys

from torch import nn

__all__ = ["experts_as_loop", "without_cache"]


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


def experts_as_loop(model: nn.Module) -> str:
    """Has a Hugging Face mixture of experts run as its library's own loop over experts.

    By default it sorts tokens by expert and multiplies groups of them, which is no operation on
    each token by itself. The library says that its implementations are equal; the comparison with
    the original's numbers checks it.

    Args:
        model: from `clone_for_capture`; changed in place (its configuration is a copy).

    Returns:
        The implementation that was replaced, or "".
    """
    config = getattr(model, "config", None)
    chosen = getattr(config, "_experts_implementation", None)
    switch = getattr(model, "set_experts_implementation", None)
    if not isinstance(chosen, str) or chosen == "eager" or not callable(switch):
        return ""
    switch("eager")
    return chosen
