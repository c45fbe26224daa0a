"""A copy of a model whose attributes hold what nothing can copy.

    self.lock = threading.Lock()     the copy has a lock of its own
    self.math = math                 a module of Python is the same one everywhere
    self.last = x.detach() * w       a tensor with a history is shared, as parameters are
    self.log = open("log.txt", "a")  forward of the copy may not use it: it is the original's

In place of the last stands a value that knows its name, and refuses to be used.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from fxport.capture.location import is_torch_or_own, line_of_user
from fxport.capture.memos import files_around
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["copy_of", "nothing_uncopied_used"]

_LOCKS: dict[type, Callable[[], Any]] = {
    type(threading.Lock()): threading.Lock,
    type(threading.RLock()): threading.RLock,
}
_PLAIN = frozenset({str, bytes, int, float, bool, type(None)})
_HINT = "keep it out of the model's attributes, or set it where forward does not need it"


def copy_of(model: nn.Module, shared: Mapping[int, Any], *, lend: bool) -> nn.Module:
    """A deep copy.

    Args:
        shared: by its number (`id`), what the copy has in common with the model.
        lend: what cannot be copied is shared, too: the copy is the user's own to run.

    Raises:
        PortError: an attribute cannot be copied, nor can anything stand there instead; by name.
    """
    try:
        return copy.deepcopy(model, dict(shared))
    except Exception as error:  # whatever `__deepcopy__` and `__reduce__` raise
        failed = error
    found = list(_Search(model, shared).run())
    instead = {
        id(value): value if lend else _instead(model, *hit) for hit in found for value in hit[1:]
    }
    try:
        return copy.deepcopy(model, {**shared, **instead})
    except Exception as error:
        raise PortError([_in_the_way(found, failed)]) from error


def _in_the_way(found: list[tuple[str, Any]], error: Exception) -> Reason:
    names = ", ".join(f"`{path}` ({type(value).__name__})" for path, value in found)
    return Reason(
        ReasonCode.CAPTURE_FAILED,
        f"the model cannot be copied for capture: {names or 'an attribute'}: {error}",
        hint=_HINT,
    )


class _Search:
    """Looks for what cannot be copied, though all that it holds can."""

    def __init__(self, model: nn.Module, shared: Mapping[int, Any]) -> None:
        self._model = model
        # Numbers of tensors do not matter here, so none is copied.
        tensors = (*model.parameters(), *model.buffers())
        self._known = {**{id(t): t for t in tensors}, **shared}
        self._seen: set[int] = set()

    def run(self) -> Iterator[tuple[str, Any]]:
        """(dotted path, value)"""
        for path, module in self._model.named_modules():
            for name, value in vars(module).items():
                if name not in ("_modules", "_parameters", "_buffers"):
                    yield from self._within(f"{path}.{name}".removeprefix("."), value)

    def _within(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if type(value) in _PLAIN or id(value) in self._seen or id(value) in self._known:
            return
        self._seen.add(id(value))
        if self._copies(value):
            return
        inner = False
        for name, held in _held(value):
            for hit in self._within(f"{path}.{name}", held):
                inner = True
                yield hit
        if not inner:
            yield path, value

    def _copies(self, value: Any) -> bool:
        try:
            copy.deepcopy(value, dict(self._known))
        except Exception:
            return False
        return True


def _held(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a copy of `value` would copy, with names."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from enumerate(value)
    elif isinstance(value, MethodType):
        yield "__self__", value.__self__
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), *enumerate(value.args), *value.keywords.items())
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield name, getattr(value, name)
    yield from getattr(value, "__dict__", {}).items()


def _instead(model: nn.Module, path: str, value: Any) -> Any:
    if isinstance(value, ModuleType | torch.Tensor):
        return value
    if type(value) in _LOCKS:
        return _LOCKS[type(value)]()
    if any(v is value for file in files_around(model) for v in list(vars(file).values())):
        reason = Reason(
            ReasonCode.CAPTURE_FAILED,
            f"the model cannot be copied for capture: `{path}` is a {type(value).__name__}, and "
            "a global of the same file as well",
            hint=_HINT,
        )
        raise PortError([reason])
    return _class_for(type(value))(path, type(value).__name__)  # type: ignore[arg-type]


# --- what stands there instead -------------------------------------------------------------------

_USED: list[Reason] = []


@contextmanager
def nothing_uncopied_used() -> Iterator[None]:
    """Refuses a use inside also where the user's code goes on after the error."""
    before = len(_USED)
    try:
        yield
        if len(_USED) > before:
            raise PortError([_USED[before]])
    finally:
        del _USED[before:]


class _Uncopied:
    """Is what it is, may be compared with None, and nothing else.

    Torch and fxport look at attributes without using them.
    """

    __slots__ = ("__weakref__", "_kind", "_path")

    def __init__(self, path: str, kind: str) -> None:
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_kind", kind)

    def __getattribute__(self, name: str) -> Any:
        if _looks_alone():
            return object.__getattribute__(self, name)
        raise _used(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Uncopied:
        return self


def _looks_alone() -> bool:
    file = sys._getframe(2).f_code.co_filename
    return is_torch_or_own(file) or file == copy.__file__


def _used(value: Any) -> PortError:
    path, kind = (object.__getattribute__(value, name) for name in ("_path", "_kind"))
    reason = Reason(
        ReasonCode.CAPTURE_FAILED,
        f"forward uses `{path}` ({kind}), which cannot be copied for capture",
        line_of_user(sys._getframe(2)),
        _HINT,
    )
    _USED.append(reason)
    return PortError([reason])


def _use(self: Any, *_: Any, **__: Any) -> Any:
    if _looks_alone():
        return NotImplemented
    raise _used(self)


def _printed(self: Any, *_: Any) -> str:
    if _looks_alone():
        return f"<{object.__getattribute__(self, '_kind')}>"
    raise _used(self)


# Identity is no use, and with it a place in a dictionary.
_KEPT = set(vars(_Uncopied)) | {
    "__class__", "__new__", "__hash__", "__init_subclass__", "__subclasshook__", "__del__",
    "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__sizeof__", "__dict__",
    "__copy__", "__class_getitem__", "__getattr__",
}  # fmt: skip


@functools.cache
def _class_for(kind: type) -> type[_Uncopied]:
    """Python looks for `__iter__` and the like at the type: there are those that `kind` has."""
    special = [n for n in dir(kind) if n.startswith("__") and callable(getattr(kind, n, None))]
    used = {n: _use for n in special if n not in _KEPT}
    printed = dict.fromkeys(("__repr__", "__str__", "__format__"), _printed)
    return type(
        "_Uncopied", (_Uncopied,), {"__slots__": (), **used, **printed, "__hash__": object.__hash__}
    )
