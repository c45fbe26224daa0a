"""Every place where forward can leave something for its next call.

self.calls    SEEN["n"]    Layer.calls    def f(x, seen=[0])    a closure's variable    @lru_cache

What the modules hold, and what the user's files do: their globals, what their functions close
over, remember and have as defaults, the attributes of their classes. Of tensors, only attributes:
what is written into one is seen in the graph.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import random
import sys
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from types import CellType, FunctionType, GeneratorType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from fxport.capture.memos import files_around

__all__ = ["SIZE", "STATE", "Place", "Reachable", "draws_numbers"]

Place = tuple[int, Any]  # the number of the holder, and the key in it

ATOMS = frozenset({str, bytes, int, float, bool, complex, type(None)})
_PLAIN = (tuple, frozenset)
# Of what has more entries than this, their number is all that is noted.
_MOST = 10_000
# So many entries with keys are added at most.
_LONGEST = 100_000
_LISTS = (list, deque, bytearray)
_SIZED = (dict, set, *_LISTS)
_CELLS = (CellType, ContextVar)
# The classes of objects that are looked into wherever they lie; others where a module holds them.
_NAMESPACES = ("SimpleNamespace", "Namespace", "_local")


class _Mark:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


SIZE = _Mark("its size")
STATE = _Mark("how far it is")
_NOTHING = _Mark("nothing")


class Reachable:
    """The holders of such places as they are found now.

    Args:
        model: whose modules are looked into, and whose files.
    """

    def __init__(self, model: nn.Module) -> None:
        self._holders: list[tuple[str, Any]] = []
        self._seen: set[int] = set()
        self._kept: list[Any] = []  # so that no number is given away
        self._own = {file.__name__ for file in files_around(model)}
        for path, module in model.named_modules():
            self._seen.add(id(module))
            self._look(path, vars(module), everywhere=True)
        for module in model.modules():
            self._look(type(module).__qualname__, type(module), everywhere=False)
        for file in files_around(model):
            self._look(file.__name__, vars(file), everywhere=False)
        self._look("os.environ", os.environ._data, everywhere=False)  # type: ignore[attr-defined]
        for library in (sys, torch):
            self._look(library.__name__, library, everywhere=False)
        self._copies = [_entries(holder) for _, holder in self._holders]

    def path(self, place: Place) -> str:
        """In words that a user knows it by."""
        index, key = place
        path = self._holders[index][0]
        return path if isinstance(key, _Mark) or key == "" else f"{path}.{key}".removeprefix(".")

    def values(self) -> dict[Place, Any]:
        """What lies at each place now, as far as it can be compared: numbers, sizes, types."""
        found: dict[Place, Any] = {}
        for index, (_, holder) in enumerate(self._holders):
            for key, value in _entries(holder).items():
                found[index, key] = _comparable(value)
            if isinstance(holder, _SIZED) and not _is_file(holder):
                found[index, SIZE] = len(holder)
        return found

    def holder(self, place: Place) -> Any:
        """What the place is in."""
        return self._holders[place[0]][1]

    def get(self, place: Place) -> Any:
        """What lies there; the holder itself for its size."""
        holder, key = self.holder(place), place[1]
        return holder if key is SIZE else _entries(holder).get(key, _NOTHING)

    def put(self, place: Place, value: Any) -> None:
        """Changes what lies there; for a size, to as many entries."""
        index, key = place
        holder = self._holders[index][1]
        if key is SIZE:
            _resize(holder, value)
        else:
            _write(holder, key, value)

    def restore(self) -> None:
        """Puts every holder back as it was found."""
        for (_, holder), entries in zip(self._holders, self._copies, strict=True):
            now = _entries(holder)
            if len(now) == len(entries) and all(
                now.get(k, _NOTHING) is v for k, v in entries.items()
            ):
                continue
            if isinstance(holder, deque | list):
                values = list(entries.values())
                holder.clear()
                holder.extend(values)
                continue
            for key in now.keys() - entries.keys():
                _remove(holder, key)
            for key, value in entries.items():
                if now.get(key, _NOTHING) is not value:
                    _write(holder, key, value)

    def _look(self, path: str, value: Any, *, everywhere: bool) -> None:
        """
        Args:
            everywhere: also into objects of classes that are not the user's.
        """
        pending = [(path, value)]
        while pending:
            at, value = pending.pop()
            if type(value) in ATOMS or id(value) in self._seen:
                continue
            self._seen.add(id(value))
            self._kept.append(value)
            if self._is_holder(value, everywhere):
                self._holders.append((at, value))
                if not _is_large(value) and not isinstance(value, ModuleType):
                    pending += [
                        (f"{at}.{key}".removeprefix("."), held)
                        for key, held in _entries(value).items()
                        if type(held) not in ATOMS
                    ]
            else:
                pending += [(at, held) for held in self._held(value, everywhere)]

    def _is_holder(self, value: Any, everywhere: bool) -> bool:
        if isinstance(value, type):
            return value.__module__ in self._own
        if isinstance(value, ModuleType):
            return value in (sys, torch)
        kinds = (*_SIZED, *_CELLS, GeneratorType)
        return (
            isinstance(value, kinds)
            or _is_iterator(value)
            or draws_numbers(value)
            or bool(_slots(value, None if everywhere else self._own))
        )

    def _held(self, value: Any, everywhere: bool) -> Iterator[Any]:
        """What lies in something that is no holder itself."""
        kind = type(value)
        if isinstance(value, nn.Module | type | ModuleType | torch.dtype | torch.device):
            return
        if isinstance(value, FunctionType):
            if value.__module__ in self._own or value.__closure__ or everywhere:
                yield from value.__closure__ or ()
                yield from value.__defaults__ or ()
                yield value.__kwdefaults__
                yield vars(value)
        elif isinstance(value, (MethodType, classmethod, staticmethod)):
            yield value.__func__
            yield getattr(value, "__self__", None)
        elif isinstance(value, functools.partial):
            yield from (value.func, value.args, value.keywords)
        elif isinstance(value, property):
            yield from (value.fget, value.fset)
        elif kind.__name__ in ("_lru_cache_wrapper", "_lru_list_elem") and "functools" in str(kind):
            yield from gc.get_referents(value)
        elif isinstance(value, _PLAIN):
            yield from value if len(value) <= _MOST else ()
        elif isinstance(getattr(value, "__dict__", None), dict):
            own = kind.__module__ in self._own or kind.__name__ in _NAMESPACES
            if own or everywhere or isinstance(value, torch.Tensor | SimpleNamespace):
                yield vars(value)


def _entries(holder: Any) -> dict[Any, Any]:
    """Key -> value."""
    if isinstance(holder, dict):
        if _is_large(holder):
            return {}
        file = _is_file(holder)
        # A warning leaves its registry in a file.
        return {k: v for k, v in holder.items() if not (file and str(k).startswith("__"))}
    if isinstance(holder, _LISTS):
        return {} if _is_large(holder) else dict(enumerate(holder))
    if isinstance(holder, set):
        return {} if _is_large(holder) else dict.fromkeys(holder, True)
    if isinstance(holder, type):
        return dict(vars(holder))
    if isinstance(holder, ModuleType):
        return {k: v for k, v in vars(holder).items() if type(v) in ATOMS}
    if isinstance(holder, _CELLS):
        try:
            return {"": holder.cell_contents if isinstance(holder, CellType) else holder.get()}
        except (ValueError, LookupError):  # not assigned yet
            return {}
    if isinstance(holder, GeneratorType) or _is_iterator(holder):
        return {STATE: _how_far(holder)}
    if draws_numbers(holder):
        return {STATE: _numbers_left(holder)}
    names = _slots(holder, None)
    return {name: getattr(holder, name) for name in names if hasattr(holder, name)}


def draws_numbers(holder: Any) -> bool:
    """Whether it is a generator of random numbers, Python's or NumPy's, but not the common one:
    `fxport.capture.drawn` knows more of what that is asked for.
    """
    if isinstance(holder, random.Random):
        return holder is not random.random.__self__  # type: ignore[attr-defined]
    numpy = sys.modules.get("numpy")  # who has not loaded it has none of its generators
    if numpy is None or not isinstance(holder, numpy.random.Generator | numpy.random.RandomState):
        return False
    return holder is not numpy.random.mtrand._rand  # type: ignore[no-any-return]


def _numbers_left(generator: Any) -> Any:
    """What it will draw from now on."""
    if isinstance(generator, random.Random):
        try:
            return generator.getstate()
        except NotImplementedError:  # `SystemRandom` has none; it can be told from no other
            return ()
    own = getattr(generator, "bit_generator", None)
    return repr(own.state if own is not None else generator.get_state(legacy=False))


def _write(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, random.Random) and value:
        holder.setstate(value)
    elif isinstance(holder, dict | list | deque | bytearray):
        holder[key] = value
    elif isinstance(holder, set):
        holder.add(key)
    elif isinstance(holder, CellType):
        holder.cell_contents = value
    elif isinstance(holder, ContextVar):
        holder.set(value)
    elif not (key is STATE or isinstance(holder, GeneratorType)):
        setattr(holder, key, value)


def _remove(holder: Any, key: Any) -> None:
    if isinstance(holder, dict):
        del holder[key]
    elif isinstance(holder, set):
        holder.discard(key)
    elif isinstance(holder, bytearray):
        del holder[-1]
    elif not isinstance(holder, _CELLS):
        delattr(holder, key)


def _resize(holder: Any, size: int) -> None:
    """To `size` entries; what is added is like the last one, under keys of its own."""
    added = min(size - len(holder), _LONGEST if isinstance(holder, dict | set) else size)
    if isinstance(holder, dict):
        for key in list(itertools.islice(reversed(holder), max(-added, 0))):
            del holder[key]
        value = next(iter(holder.values()), None)
        holder.update({(_NOTHING, n): value for n in range(added)})
    elif isinstance(holder, set):
        for _ in range(-added):
            holder.pop()
        holder.update((_NOTHING, n) for n in range(added))
    elif added > 0:
        last = holder[-1] if holder else 0
        holder.extend(itertools.repeat(last, added))
    else:
        for _ in range(-added):
            holder.pop()


def _comparable(value: Any) -> Any:
    """Equal where nothing that Python's own code can ask of it is another; of objects, the kind."""
    if isinstance(value, _Mark):
        return value
    if type(value) in ATOMS:
        return type(value), value
    if isinstance(value, tuple) and len(value) <= _MOST:
        return type(value), tuple(map(_comparable, value))
    return type(value)


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and "__name__" in value and "__builtins__" in value


def _is_large(value: Any) -> bool:
    return isinstance(value, _SIZED) and len(value) > _MOST


def _is_iterator(value: Any) -> bool:
    return type(value).__module__ == "itertools" or type(value).__name__ in (
        "list_iterator", "range_iterator", "tuple_iterator", "enumerate", "zip", "reversed",
    )  # fmt: skip


def _how_far(iterator: Any) -> Any:
    if isinstance(iterator, GeneratorType):
        frame = iterator.gi_frame
        if frame is None:
            return "at its end"
        return frame.f_lasti, str([(k, v) for k, v in frame.f_locals.items() if type(v) in ATOMS])
    hint = getattr(iterator, "__length_hint__", None)
    return hint() if hint is not None else repr(iterator) + _reduced(iterator)


def _reduced(iterator: Any) -> str:
    try:
        return repr(iterator.__reduce__())
    except (TypeError, AttributeError, RecursionError):
        return ""


def _slots(value: Any, own: set[str] | None) -> list[str]:
    """Attributes of an object without a dictionary; `own`: of classes of these files alone."""
    cls = type(value)
    if own is not None and cls.__module__ not in own:
        return []
    held = [vars(c).get("__slots__", ()) for c in cls.__mro__]
    return [n for names in held for n in ((names,) if isinstance(names, str) else names)]
