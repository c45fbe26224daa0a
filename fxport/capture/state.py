"""What a model keeps between calls: attributes of its modules and of plain objects they hold."""

from __future__ import annotations

from collections.abc import Container, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["State", "containers"]

_LEAVES = (
    torch.Tensor,
    nn.Module,
    type,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    ModuleType,
    torch.dtype,
    torch.device,
)
_ATOMS = frozenset({str, bytes, int, float, bool, type(None)})  # most entries of large ones


class State:
    """A snapshot of every mapping, list and object that a model's modules lead to.

    Tensors are noted by identity: what is written into them is seen in the graph.
    """

    def __init__(self, model: nn.Module) -> None:
        self._containers: list[tuple[str, Any, Any]] = []
        self._attributes = {id(vars(module)): path for path, module in model.named_modules()}
        seen: set[int] = set()
        for path, module in model.named_modules():
            for found, container in containers(path, vars(module), seen):
                if not isinstance(container, tuple):  # it cannot change
                    self._containers.append((found, container, container.copy()))

    def now(self) -> State:
        """What the same containers hold by now."""
        other = State.__new__(State)
        other._attributes = self._attributes
        other._containers = [(path, c, c.copy()) for path, c, _ in self._containers]
        return other

    def restore(self) -> None:
        """Puts every container back as it was, in place."""
        for _, container, copy in self._containers:
            if isinstance(container, list):
                container[:] = copy
            else:
                container.clear()
                container.update(copy)

    def values(self) -> Iterator[Any]:
        """What the containers held."""
        for _, _, copy in self._containers:
            yield from copy.values() if isinstance(copy, dict) else copy

    def numbers(self) -> dict[tuple[int, Any], float]:
        """By container, in order, and key: the plain numbers that mappings held."""
        return {
            (index, key): value
            for index, (_, _, copy) in enumerate(self._containers)
            if isinstance(copy, dict)
            for key, value in copy.items()
            if type(value) in (int, float)
        }

    def put(self, place: tuple[int, Any], number: float) -> None:
        """Changes what lies where `numbers` found one."""
        index, key = place
        self._containers[index][1][key] = number

    def changes(self, but: Container[tuple[str, str]] = ()) -> list[str]:
        """Dotted paths of what differs now: added, removed, or another object.

        Args:
            but: attributes of modules, (module path, name), that do not count.
        """
        found = []
        for path, container, copy in self._containers:
            if isinstance(container, list):
                same = len(container) == len(copy) and all(map(_same, container, copy))
                if not same:
                    found.append(path)
            elif isinstance(container, set):
                if container != copy:
                    found.append(path)
            else:
                of = self._attributes.get(id(container))
                for key in {**copy, **container}:
                    if of is not None and (of, key) in but:
                        continue
                    missing = key not in copy or key not in container
                    if missing or not _same(copy[key], container[key]):
                        found.append(f"{path}.{key}".removeprefix("."))
        return found


def _same(one: Any, other: Any) -> bool:
    """The same object, or an equal container of the same: torch.export puts those back."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    plain = (int, float, bool, str, bytes, type(None), set, frozenset)
    return isinstance(one, plain) and one == other


def containers(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """(dotted path, container), outer ones first: mappings, lists, sets, tuples, attributes.

    What lies in one is looked at after it was given out, so that it may be changed.

    Args:
        value: whose name is `path`.
        seen: the numbers of what was looked at; added to.
    """
    if id(value) in seen or isinstance(value, _LEAVES):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        yield path, value
        for key, held in list(value.items()):
            if isinstance(held, _LEAVES) or type(held) in _ATOMS:
                continue
            # The registries of a module are containers of the module itself.
            yield from containers(f"{path}.{key}".removeprefix("."), held, seen)
    elif isinstance(value, list | set | tuple):
        yield path, value
        for index, held in enumerate(value):
            if isinstance(held, _LEAVES) or type(held) in _ATOMS:
                continue
            yield from containers(f"{path}.{index}", held, seen)
    elif isinstance(getattr(value, "__dict__", None), dict):
        yield from containers(path, vars(value), seen)
