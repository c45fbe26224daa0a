"""A copy of the user's model that capture may run without leaving a trace on the original."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxport.capture.identities import bind_to_copy
from fxport.capture.location import direct_caller, location_at
from fxport.capture.uncopied import copy_of
from fxport.errors import PortError, Reason, ReasonCode

__all__ = [
    "Attributes",
    "carried",
    "clone_for_capture",
    "clone_to_run",
    "convert",
    "off_meta",
    "spread_constants",
    "take_modes",
    "uncompiled",
    "watch_attributes",
]


def uncompiled(model: nn.Module) -> nn.Module:
    """What ``torch.compile(module)`` has wrapped, else `model`: the wrapper cannot be exported."""
    from torch._dynamo import OptimizedModule

    if not isinstance(model, OptimizedModule):
        return model
    inner = model._orig_mod
    assert isinstance(inner, nn.Module)
    return inner


def clone_for_capture(model: nn.Module, *, lend: bool = False) -> nn.Module:
    """Deep-copies modules and plain attributes, shares every parameter and buffer; eval mode.

    Buffers that hold nothing (yet) come last: export counts them among the inputs.

    Args:
        lend: the copy is the user's to run: it shares what cannot be copied. Else that is refused
            when forward uses it.

    Raises:
        PortError: when an attribute cannot be copied.
    """
    clone = _copied(model, {id(t): t for t in _tensors(model)}, lend=lend)
    for module in clone.modules():
        for name in [n for n, buffer in module._buffers.items() if buffer is None]:
            module._buffers[name] = module._buffers.pop(name)
    return clone


def clone_to_run(model: nn.Module) -> nn.Module:
    """The same with buffers and other tensors of its own: a run with numbers may write to them.

    Raises:
        PortError: when an attribute cannot be copied.
    """
    # A tensor with a history cannot be copied, nor written to.
    shared = (t for t in _tensors(model) if isinstance(t, nn.Parameter) or not t.is_leaf)
    return _copied(model, {id(t): t for t in shared})


def _copied(model: nn.Module, shared: dict[int, Any], *, lend: bool = False) -> nn.Module:
    clone = copy_of(model, shared, lend=lend)
    bind_to_copy(clone, model)
    return clone.eval()


def convert(model: nn.Module, dtype: torch.dtype, *, buffers: bool) -> None:
    """Gives a clone parameters of another dtype, without data: what `model.to(dtype)` would see.

    Args:
        model: from `clone_for_capture`; changed in place, ties kept.
        buffers: convert floating point buffers too (their values are kept).
    """
    _replace_parameters(
        model, lambda p: torch.empty_like(p, dtype=dtype) if p.is_floating_point() else None
    )
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffers and buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


def take_modes(clone: nn.Module, model: nn.Module) -> None:
    """Puts every module of a clone into the mode, training or eval, that its original is in."""
    for module, original in zip(clone.modules(), model.modules(), strict=True):
        module.training = original.training


def spread_constants(model: nn.Module) -> None:
    """Gives a clone numbers of their own in place of parameters that hold one number only.

    A layer that begins as zeros hides whatever is computed before it from a comparison.
    """
    generator = torch.Generator().manual_seed(0)

    def spread(parameter: nn.Parameter) -> torch.Tensor | None:
        if not _is_constant(parameter):
            return None
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        return parameter.detach() + 0.1 * noise.to(parameter)

    _replace_parameters(model, spread)


def _is_constant(value: torch.Tensor) -> bool:
    if not value.is_floating_point() or not value.numel():
        return False
    flat = value.detach().flatten()
    return bool(flat[-1] == flat[0]) and bool((flat == flat[0]).all())


def off_meta(model: nn.Module) -> None:
    """Gives a clone parameters on the CPU where they were on the meta device, without data.

    Their memory is never touched, so the system never provides it. Buffers must have values:
    masks and position tables decide what the model computes.

    Args:
        model: from `clone_for_capture`; changed in place, ties kept.

    Raises:
        PortError: a buffer is on the meta device; each one is named.
    """
    reasons = [
        Reason(
            ReasonCode.CAPTURE_FAILED,
            f"the buffer `{name}` is on the meta device, so nobody knows its values",
            hint="parameters may be on the meta device; give buffers their values on the CPU",
        )
        for name, buffer in model.named_buffers()
        if buffer.is_meta
    ]
    if reasons:
        raise PortError(reasons)
    _replace_parameters(model, lambda p: torch.empty_like(p, device="cpu") if p.is_meta else None)


def _replace_parameters(
    model: nn.Module, other: Callable[[nn.Parameter], torch.Tensor | None]
) -> None:
    """Puts another tensor in the place of each parameter for which there is one; ties are kept."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                tensor = other(parameter)
                if tensor is None:
                    continue
                made[id(parameter)] = nn.Parameter(tensor, parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and tensors that modules hold as plain attributes."""
    for module in model.modules():
        yield from (p for p in module._parameters.values() if p is not None)
        yield from (b for b in module._buffers.values() if b is not None)
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                yield value


_INTERNAL = {"training", "_parameters", "_buffers", "_modules"}


@dataclass
class Attributes:
    """What one run of `forward` did with the attributes of modules: (module path, attribute).

    Attributes:
        changed: those that it changed, each with a reason and the user's line.
        read: those that it read before it set them; None for all of a module's.
        set: those that it set.
    """

    changed: dict[tuple[str, str], Reason] = field(default_factory=dict)
    read: set[tuple[str, str | None]] = field(default_factory=set)
    set: set[tuple[str, str]] = field(default_factory=set)

    def kept(self) -> list[Reason]:
        """Reasons for those changes that the next call would read.

        ``self.aux_loss = ...`` is none if forward sets it before anybody reads it.
        """
        return [r for key, r in self.changed.items() if _reads(self.read, key)]

    def overwritten(self) -> dict[tuple[str, str], Reason]:
        """The other changes: a call of the same kind sets them anew before anybody reads them."""
        return {key: r for key, r in self.changed.items() if not _reads(self.read, key)}


def carried(
    overwritten: Mapping[tuple[str, str], Reason], read: Set[tuple[str, str | None]]
) -> list[Reason]:
    """Reasons for what calls leave in attributes, of which some call reads what was left there."""
    return [reason for key, reason in overwritten.items() if _reads(read, key)]


def _reads(read: Set[tuple[str, str | None]], key: tuple[str, str]) -> bool:
    return key in read or (key[0], None) in read


@contextmanager
def watch_attributes(model: nn.Module) -> Iterator[Attributes]:
    """Sees each attribute that `forward` changes.

    Every module becomes an instance of a subclass that sees assignments: torch.export undoes
    them afterwards, so looking at the attributes before and after finds nothing.
    """
    seen = Attributes()
    paths = {id(m): path for path, m in model.named_modules()}
    classes = [(module, type(module)) for module in model.modules()]
    for module, cls in classes:
        module.__class__ = _watching(cls, paths, seen)
    try:
        yield seen
    finally:
        for module, cls in classes:
            object.__setattr__(module, "__class__", cls)


def _watching(cls: type[nn.Module], paths: dict[int, str], seen: Attributes) -> type[nn.Module]:
    def __getattribute__(self: nn.Module, name: str) -> Any:
        path = paths.get(id(self), "")
        if name != "__dict__":  # torch looks there for every parameter
            if (path, name) not in seen.set:
                seen.read.add((path, name))
        elif direct_caller() is not None:
            seen.read.add((path, None))
        return cls.__getattribute__(self, name)

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        path = paths.get(id(self), "")
        key = path, name
        was_read = key in seen.read
        old = getattr(self, name, _MISSING)
        if not was_read:
            seen.read.discard(key)
        line = direct_caller()
        if name not in _INTERNAL and line is not None and not _same(old, value):
            reason = Reason(
                ReasonCode.MUTATED_STATE,
                f"forward changes the attribute `{name}` of "
                f"{f'`{path}`' if path else 'the model'} ({cls.__name__}), "
                "so its result may depend on earlier calls",
                location_at(*line),
                hint="compute the value in __init__, or pass it through forward",
            )
            seen.changed.setdefault(key, reason)
        cls.__setattr__(self, name, value)
        seen.set.add(key)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    watched = {"__getattribute__": __getattribute__, "__setattr__": __setattr__}
    return type(cls.__name__, (cls,), {**watched, **names})


_MISSING = object()


def _same(old: Any, new: Any) -> bool:
    """Whether an assignment changes nothing; tensors and sizes count as changed."""
    if old is new:
        return True
    plain = int | float | bool | str | None
    return isinstance(old, plain) and isinstance(new, plain) and old == new
