"""Names of models and the functions that build them.

config.json holds the name alone, never code: what runs is what the user's own program or installed
package registered.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from fxport.errors import FxportError
from fxport.parallel.context import ParallelContext

__all__ = ["Build", "find_builder", "register_model"]

Build = Callable[[Any, ParallelContext], nn.Module]
MODULES = "FXPORT_MODELS"  # environment: modules to import, comma-separated; they register
GROUP = "fxport.models"  # entry points: name = "package.module:build"

_builders: dict[str, Build] = {}


def register_model(name: str, build: Build) -> None:
    """Makes ``LLM(directory)`` serve models saved under `name` with what `build` returns.

    Args:
        name: stands in config.json as ``fxport_builder``.
        build: ``build(config, parallel_context) -> nn.Module``; config has config.json's entries
            as attributes. vLLM calls it in every worker, after it has set up its groups. The
            module needs ``hidden_states(input_ids [N], positions [N]) -> [N, C]`` and
            ``compute_logits(hidden [M, C]) -> [M, V]``, and all attention in `VLLMFlashAttention`.

    Raises:
        FxportError: another function is registered under this name.
    """
    known = _builders.get(name)
    if known is not None and _origin(known) != _origin(build):
        raise FxportError(
            f"the model {name!r} is registered already, as {' in '.join(_origin(known))}"
        )
    _builders[name] = build


def _origin(build: Build) -> tuple[str, str]:
    """What it is called and the file it stands in.

    Not the module's name: a spawned worker imports the main module under another one.
    """
    module = sys.modules.get(str(getattr(build, "__module__", None)))
    return getattr(build, "__qualname__", repr(build)), getattr(module, "__file__", None) or ""


def find_builder(name: str) -> Build:
    """The function registered under `name`: by call, by FXPORT_MODELS, or by entry point.

    Raises:
        FxportError: none is, or several installed packages claim the name.
    """
    if name not in _builders:
        for module in filter(None, os.environ.get(MODULES, "").split(",")):
            importlib.import_module(module.strip())
    if name in _builders:
        return _builders[name]
    points = tuple(importlib.metadata.entry_points(group=GROUP, name=name))
    if len(points) > 1:
        claims = ", ".join(point.value for point in points)
        raise FxportError(f"several installed packages register the model {name!r}: {claims}")
    if not points:
        raise FxportError(
            f"no model {name!r} is registered in this process. Give your package the entry point "
            f'[project.entry-points."{GROUP}"] {name} = "package.module:build", or set {MODULES} '
            f"to the module that calls fxport.register_model({name!r}, build). A call in the main "
            "program alone reaches workers that vLLM spawns (always on CPU) only if it stands "
            'outside `if __name__ == "__main__":`'
        )
    build: Build = points[0].load()
    return build
