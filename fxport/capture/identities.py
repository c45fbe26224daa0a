"""A copy of a model tells its modules from the original's, also where no attribute leads to them.

    layers = self.layers
    self.step = lambda layer, x: layer(x) * (2 if layer is layers[1] else 1)

Copied as it is, the function would go on to compare with the original's modules, and the copy
would quietly take another path.
"""

from __future__ import annotations

import dis
import functools
import weakref
from collections.abc import Iterator, Mapping
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from fxport.capture.location import is_library, location_at
from fxport.capture.memos import own_files
from fxport.capture.state import containers
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["bind_to_copy"]


def bind_to_copy(clone: nn.Module, model: nn.Module) -> None:
    """Functions and weak references that a clone holds lead to its modules, no longer the model's.

    Raises:
        PortError: a module's number (`id`) is kept, or forward reaches a module of the model
            through a global or the closure of a class: a copy has no part in those.
    """
    copies = {
        id(original): copied
        for original, copied in zip(model.modules(), clone.modules(), strict=True)
    }
    _refuse_numbers(model, copies)
    _refuse_globals(model, copies)
    binding, seen = _Binding(copies), set[int]()
    for module in clone.modules():
        for _, container in containers("", vars(module), seen):
            binding.within(container)


_HOLDERS = (FunctionType, MethodType, functools.partial)
# What most large containers hold: vocabularies, token counts.
_PLAIN = frozenset({str, bytes, int, float, bool, type(None)})


class _Binding:
    """Values in which modules of the model have given way to those of the copy.

    Args:
        copies: by the number of the original.
    """

    def __init__(self, copies: Mapping[int, nn.Module]) -> None:
        self._copies = copies
        self._made: dict[int, tuple[Any, Any]] = {}  # with what it was made of, to keep its id

    def within(self, container: Any) -> None:
        """Changes a mapping or list that the copy owns."""
        if isinstance(container, dict):
            for key, held in list(container.items()):
                if (bound := self.bound(held)) is not held:
                    container[key] = bound
        elif isinstance(container, list):
            container[:] = [self.bound(held) for held in container]

    def bound(self, value: Any) -> Any:
        """The value itself where it leads to no module of the model."""
        if id(value) in self._made:
            return self._made[id(value)][1]
        if isinstance(value, nn.Module):
            return self._copies.get(id(value), value)
        if not _leads_to(value, self._copies, set()):
            return value
        if isinstance(value, FunctionType):
            return self._function(value)
        made: Any
        if isinstance(value, MethodType):
            made = MethodType(self.bound(value.__func__), self.bound(value.__self__))
        elif isinstance(value, weakref.ref):
            made = weakref.ref(self.bound(value()))
        elif isinstance(value, functools.partial):
            keywords = {k: self.bound(v) for k, v in value.keywords.items()}
            made = functools.partial(
                self.bound(value.func), *(self.bound(a) for a in value.args), **keywords
            )
        elif isinstance(value, dict):
            made = {self.bound(k): self.bound(v) for k, v in value.items()}
        else:
            made = type(value)(self.bound(v) for v in value)
        self._made[id(value)] = value, made
        return made

    def _function(self, function: FunctionType) -> FunctionType:
        cells = tuple(CellType() for _ in function.__closure__ or ())
        made = FunctionType(
            function.__code__, function.__globals__, function.__name__, None, cells or None
        )
        made.__dict__.update(vars(function))
        made.__qualname__, made.__module__ = function.__qualname__, function.__module__
        self._made[id(function)] = function, made  # before its cells: it may call itself
        if function.__defaults__ is not None:
            made.__defaults__ = tuple(self.bound(v) for v in function.__defaults__)
        if function.__kwdefaults__ is not None:
            made.__kwdefaults__ = {k: self.bound(v) for k, v in function.__kwdefaults__.items()}
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            if _filled(original):
                cell.cell_contents = self.bound(original.cell_contents)
        return made


def _leads_to(value: Any, modules: Mapping[int, nn.Module], seen: set[int]) -> bool:
    """Whether a module of the model is reached through what a copy shares with it."""
    if id(value) in modules:
        return True
    if id(value) in seen:
        return False
    seen.add(id(value))
    return any(_leads_to(held, modules, seen) for held in _held(value))


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, FunctionType):
        yield from (c.cell_contents for c in value.__closure__ or () if _filled(c))
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif type(value) in (list, tuple, set, dict):
        yield from (held for held in value if type(held) not in _PLAIN)
        if isinstance(value, dict):
            yield from (held for held in value.values() if type(held) not in _PLAIN)


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # not assigned yet: Python has no other way to ask
        return False
    return True


def _refuse_numbers(model: nn.Module, modules: Mapping[int, nn.Module]) -> None:
    paths = {id(m): path or "the model" for path, m in model.named_modules()}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            for held in _plain(value, seen):
                number = id(held()) if isinstance(held, weakref.ref) else held
                if type(number) is int and number in modules:
                    where = f"{path}.{name}".removeprefix(".")
                    message = (
                        f"`{where}` knows `{paths[number]}` by its id or a weak key, which "
                        "a copy of the model does not share"
                    )
                    hint = "keep it under the module's name or index"
                    raise PortError([Reason(ReasonCode.CAPTURE_FAILED, message, hint=hint)])


def _plain(value: Any, seen: set[int]) -> Iterator[Any]:
    """Numbers and weak references that are keys: in containers, objects, and what functions hold.

    Args:
        seen: the numbers of what was looked at; added to.
    """
    pending = [value]
    while pending:
        value = pending.pop()
        if type(value) is int:
            yield value
        elif isinstance(value, _HOLDERS):
            if id(value) not in seen:
                seen.add(id(value))
                pending += _held(value)
        else:
            for _, container in containers("", value, seen):
                mapping = isinstance(container, dict)
                if mapping:
                    yield from (key for key in container if isinstance(key, int | weakref.ref))
                for held in container.values() if mapping else container:
                    if type(held) is int or isinstance(held, _HOLDERS):
                        pending.append(held)


def _refuse_globals(model: nn.Module, modules: Mapping[int, nn.Module]) -> None:
    """Functions that forward may call, and that no attribute holds, name no module of the model."""
    parts = {id(vars(file)): _parts(vars(file), modules) for file in own_files(model)}
    classes = {c for m in modules.values() for c in type(m).__mro__}
    methods: dict[str, list[FunctionType]] = {}
    for cls in classes:
        for name, function in _functions(cls).items():
            methods.setdefault(name, []).append(function)
    closed = any(_leads_to(f, modules, set()) for found in methods.values() for f in found)
    if not closed and not any(parts.values()):
        return
    # What an attribute holds is bound to the copy, with all that it closes over.
    attributes = [v for m in modules.values() for v in vars(m).values()]
    pending = [(f, True) for f in attributes if isinstance(f, FunctionType)]
    pending += [(f, False) for f in methods.get("forward", ())]
    seen: set[int] = set()
    while pending:
        function, bound = pending.pop()
        code = function.__code__
        if id(function) in seen or is_library(code.co_filename):
            continue
        seen.add(id(function))
        inner = list(_held(function))
        if not bound and any(id(value) in modules for value in inner):
            what = f"`{function.__qualname__}` closes over a module of the model"
            raise _reached(what, function)
        read, asked = _names(code)
        for name in read & parts.get(id(function.__globals__), set()):
            what = f"forward reads the global `{name}`, which is a part of the model"
            raise _reached(what, function)
        called = [function.__globals__.get(name) for name in read]
        pending += [(f, bound) for f in inner if isinstance(f, FunctionType)]
        pending += [(f, False) for f in called if isinstance(f, FunctionType)]
        pending += [(f, False) for name in asked for f in methods.get(name, ())]


def _parts(names: Mapping[str, Any], modules: Mapping[int, nn.Module]) -> set[str]:
    """Which globals are a module of the model, or hold one."""
    return {
        name
        for name, value in list(names.items())
        if id(value) in modules
        or (not isinstance(value, FunctionType) and any(id(v) in modules for v in _held(value)))
    }


def _functions(cls: type) -> dict[str, FunctionType]:
    """The functions of a class itself, properties and static ones included."""
    found = {}
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if isinstance(function, FunctionType):
            found[name] = function
    return found


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """(globals that are read, attributes that are asked for), nested functions included."""
    read, attributes = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more = _names(inner)
            read |= more[0]
            attributes |= more[1]
    return frozenset(read), frozenset(attributes)


def _reached(message: str, function: FunctionType) -> PortError:
    code = function.__code__
    place = location_at(code.co_filename, code.co_firstlineno, function.__qualname__)
    hint = "reach the model's modules through self"
    return PortError([Reason(ReasonCode.CAPTURE_FAILED, message, place, hint)])
