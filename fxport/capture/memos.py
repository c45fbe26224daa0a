"""What the user's files remember beside the model: a trace must leave none of its tensors there.

@lru_cache
def mask(length): ...       emptied before a trace, and after it
TABLES = {}                 a global of a file that defines one of the model's modules, or of
                            a file of the user's that such a file imports: put back after a trace
class Layer(nn.Module):
    tables = {}             an attribute of a class of such a file: the same
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
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
    files = files_around(model)
    names = [vars(file) for file in files]
    classes = _own_classes(model, files)
    memos = [memo for held in (*names, *map(vars, classes)) for memo in _memos(held.values())]
    tables = [v for held in (*names, *map(vars, classes)) for v in held.values() if _is_memory(v)]
    before = [(held, held.copy()) for held in (*names, *tables)]
    attributes = [(cls, _attributes(cls)) for cls in classes]
    try:
        for memo in memos:
            memo.cache_clear()
        yield
    finally:
        for memo in memos:
            memo.cache_clear()
        for held, entries in before:
            for key in [k for k in held if k not in entries]:
                del held[key]
            held.update({k: v for k, v in entries.items() if held.get(k, memos) is not v})
        for cls, entries in attributes:
            _put_back(cls, entries)


def _own_classes(model: nn.Module, files: Iterable[ModuleType]) -> list[type]:
    """Of the model's modules, wherever they are defined, and those that the files define."""
    own = {file.__name__: file for file in files}
    classes = dict.fromkeys(cls for module in model.modules() for cls in type(module).__mro__)
    found = dict.fromkeys(cls for cls in classes if cls.__module__ in own)
    for name, file in own.items():
        defined = [v for v in vars(file).values() if isinstance(v, type)]
        found.update(dict.fromkeys(cls for cls in defined if cls.__module__ == name))
    return list(found)


def _attributes(cls: type) -> dict[str, Any]:
    """What code writes; Python keeps the rest."""
    return {k: v for k, v in vars(cls).items() if not k.startswith("__")}


def _put_back(cls: type, before: dict[str, Any]) -> None:
    now = _attributes(cls)
    for key in now.keys() - before.keys():
        delattr(cls, key)
    for key, value in before.items():
        if now.get(key, before) is not value:
            setattr(cls, key, value)


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


def _memos(values: Iterable[Any]) -> Iterator[Any]:
    """Functions with a memory."""
    for value in list(values):
        # Nothing else is asked anything: what stands for a missing library raises.
        function = value.__func__ if isinstance(value, _METHODS) else value
        if isinstance(function, functools._lru_cache_wrapper):
            yield function


def _is_memory(value: Any) -> bool:
    """What is imported meanwhile stays imported, also where a file has a name for `sys.modules`."""
    return type(value) in (dict, OrderedDict, defaultdict) and value is not sys.modules
