"""Launches of Triton kernels, with all that a kind of call has in common laid down once.

``kernel[grid](...)`` asks of each of some fifty arguments, at every launch, what the kernel has to
be compiled for, and a tensor descriptor is checked as it is made: 70 us of the host, more than many
of our kernels run. The first launch of its kind goes that way. Later ones take the compiled kernel
that it found, its numbers and its descriptors, and put other tensors in.

What Triton compiles for is then the same: it asks whether an address is aligned to 16 bytes
(looked at here every time), and of all else only what belongs to the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

__all__ = ["Launches", "Prepare", "on_device_of_first"]

_ALIGNMENT = 16  # bytes: of a descriptor, and what Triton compiles other pointers for

Grid: TypeAlias = tuple[int, ...]
Prepare: TypeAlias = Callable[[], tuple[Grid, dict[str, Any]]]
"""Gives a launch's grid and all its arguments, tensors and descriptors of tensors among them."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class _Prepared:
    """A launch without its tensors.

    Attributes:
        run: the compiled kernel on its grid; takes all the kernel's arguments in order.
        arguments: those, with None for each tensor.
        pointers: where tensors go, by name.
        descriptors: where descriptors of tensors go, by name, and what they are: class, attributes
            without the tensor.
    """

    run: Callable[..., None]
    arguments: tuple[Any, ...]
    pointers: tuple[tuple[int, str], ...]
    descriptors: tuple[tuple[int, str, type, dict[str, Any]], ...]

    @staticmethod
    def of(
        compiled: CompiledKernel, grid: Grid, names: list[str], given: dict[str, Any]
    ) -> _Prepared:
        """Keeps no tensor alive."""
        pointers, descriptors, arguments = [], [], []
        for place, name in enumerate(names):
            x = given[name]
            if isinstance(x, Tensor):
                pointers.append((place, name))
                x = None
            elif _is_descriptor(x):
                descriptors.append((place, name, type(x), {**vars(x), "base": None}))
                x = None
            arguments.append(x)
        whole_grid = (*grid, 1, 1)[:3]
        return _Prepared(
            compiled[whole_grid], tuple(arguments), tuple(pointers), tuple(descriptors)
        )

    def __call__(self, tensors: Mapping[str, Tensor | None]) -> None:
        arguments = list(self.arguments)
        for place, name in self.pointers:
            arguments[place] = tensors[name]
        for place, name, kind, rest in self.descriptors:
            descriptor: Any = object.__new__(kind)  # the checks of the first one hold
            descriptor.__dict__.update(rest)
            descriptor.base = tensors[name]
            arguments[place] = descriptor
        self.run(*arguments)


def _is_descriptor(x: object) -> bool:
    """Triton's, or Gluon's, which has a class of its own."""
    return isinstance(getattr(x, "base", None), Tensor)


class Launches:
    """The launches of one kind of call: everything but the tensors' memory is the same in each."""

    def __init__(self) -> None:
        self._prepared: dict[str, _Prepared] = {}

    def launch(
        self,
        kernel: Any,
        tensors: Mapping[str, Tensor | None],
        prepare: Prepare,
        role: str | None = None,
    ) -> None:
        """Launches a kernel.

        Args:
            kernel: of those that one call of the kind launches.
            tensors: by the names of the kernel's arguments; also those behind descriptors.
            prepare: is only asked where nothing is prepared.
            role: tells the launches of a kernel apart if one call has several.
        """
        name = role or kernel.__name__
        aligned = all(x is None or x.data_ptr() % _ALIGNMENT == 0 for x in tensors.values())
        prepared = self._prepared.get(name)
        if prepared is not None and aligned:
            prepared(tensors)
            return
        grid, arguments = prepare()
        compiled = kernel[grid](**arguments)
        if aligned and isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            names = [p.name for p in kernel.params]
            self._prepared[name] = _Prepared.of(compiled, grid, names, arguments)


def on_device_of_first(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes the device of the first argument, a tensor, current while `function` runs.

    Triton launches on the current device and its stream, wherever the tensors are. Also binds the
    device's context, which descriptors are made for, to a thread that may not have one yet: one of
    autograd's.
    """

    @wraps(function)
    def bound(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        x = args[0]
        assert isinstance(x, Tensor)
        if not x.is_cuda:
            return function(*args, **kwargs)
        before = torch.cuda.current_device()
        torch.cuda.set_device(x.device)
        try:
            return function(*args, **kwargs)
        finally:
            if before != x.device.index:
                torch.cuda.set_device(before)

    return bound
