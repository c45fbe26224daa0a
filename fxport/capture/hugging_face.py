"""A Hugging Face model asked for the plain spelling of what it computes.

config.use_cache = True                  ->  False: no cache of keys and values
config.experts_implementation = grouped  ->  batched_mm: each row times its own expert's weights
"""

from __future__ import annotations

import sys

from torch import nn

__all__ = ["experts_by_row", "without_cache"]

_BY_ROW = "batched_mm"


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


def experts_by_row(model: nn.Module) -> str:
    """Has a Hugging Face mixture of experts multiply each row by its own experts' weights.

    By default the library sorts tokens by expert and multiplies groups of them, which is no
    operation on each token by itself. It says that its implementations are equal; the comparison
    with the original's numbers checks it. The copies of weights that this one makes are in the
    graph only: see `fxport.passes.experts.products`.

    Args:
        model: from `clone_for_capture`; changed in place (its configuration is a copy).

    Returns:
        The implementation that was replaced, or "".
    """
    config = getattr(model, "config", None)
    chosen = getattr(config, "_experts_implementation", None)
    switch = getattr(model, "set_experts_implementation", None)
    if not isinstance(chosen, str) or chosen == _BY_ROW or not callable(switch):
        return ""
    switch(_BY_ROW)
    return chosen
