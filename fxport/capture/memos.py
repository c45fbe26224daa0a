"""What the user's files remember beside the model: a trace must leave none of its tensors there.

@lru_cache
def mask(length): ...       emptied before a trace, and after it
TABLES = {}                 a global of a file that defines one of the model's modules, or of
                            a file of the user's that such a file imports: put back after a trace
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType, ModuleType
from typing import Any

from torch import nn

from fxport.capture.location import is_library

__all__ = ["files_around", "nothing_remembered", "own_files"]

_METHODS = (classmethod, staticmethod, MethodType)


def own_files(model: nn.Module) -> list[ModuleType]:
    """The user's files that define the model's modules."""
    classes = dict.fromkeys(cls for module in model.modules() for cls in type(module).__mro__)
    names = sorted({c.__module__ for c in classes})
    return [sys.modules[n] for n in names if n in sys.modules and _is_own(sys.modules[n])]


def _is_own(file: ModuleType) -> bool:
    """A session at a prompt has no file."""
    path = getattr(file, "__file__", None)
    return file.__name__ == "__main__" if path is None else not is_library(path)


@contextmanager
def nothing_remembered(model: nn.Module) -> Iterator[None]:
    """For the time of a trace."""
    files = [vars(file) for file in files_around(model)]
    memos = [memo for names in files for memo in _memos(names)]
    held = [(names, names.copy()) for names in files]
    held += [(v, v.copy()) for _, names in list(held) for v in names.values() if _is_memory(v)]
    try:
        for memo in memos:
            memo.cache_clear()
        yield
    finally:
        for memo in memos:
            memo.cache_clear()
        for names, before in held:
            for key in [k for k in names if k not in before]:
                del names[key]
            names.update({k: v for k, v in before.items() if names.get(k, memos) is not v})


def files_around(model: nn.Module) -> list[ModuleType]:
    """Those, and the user's files that they import; not through what is installed: that imports
    hundreds."""
    files = own_files(model)
    found = dict.fromkeys(files)
    pending = [f for f in files if "site-packages" not in (f.__file__ or "")]
    while pending:
        for value in list(vars(pending.pop()).values()):
            name = getattr(value, "__name__" if isinstance(value, ModuleType) else "__module__", 0)
            file = sys.modules.get(name) if isinstance(name, str) else None
            if file is None or file in found or not _is_own(file):
                continue
            if "site-packages" not in (file.__file__ or ""):
                found[file] = None
                pending.append(file)
    return list(found)


def _memos(names: dict[str, Any]) -> Iterator[Any]:
    """Functions with a memory, also those of classes."""
    for value in list(names.values()):
        held = [value, *vars(value).values()] if isinstance(value, type) else [value]
        for one in held:
            # Nothing else is asked anything: what stands for a missing library raises.
            function = one.__func__ if isinstance(one, _METHODS) else one
            if isinstance(function, functools._lru_cache_wrapper):
                yield function


def _is_memory(value: Any) -> bool:
    """What is imported meanwhile stays imported, also where a file has a name for `sys.modules`."""
    return type(value) is dict and value is not sys.modules
