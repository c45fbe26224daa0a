"""Operators that tracing does not look into, with little between a call and its kernel.

``torch.library.custom_op`` does the same at a higher price: a tiny call took 8 to 15 us more, one
that is differentiated another 75 (it fills in defaults from the schema, and ours has none). That no
result shares memory with an argument, which it checks at every call, ``opcheck`` checks in the
tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing Dynamo

__all__ = ["Below", "autocast", "differentiate", "opaque_op"]

_library = torch.library.Library("fxport", "FRAGMENT")
_kernels: dict[str, Callable[..., Any]] = {}

# What is left below autograd of plain tensors where no mode is on: nothing comes before the kernel.
_PLAIN = frozenset(
    torch._C.DispatchKeySet(key).raw_repr()
    for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
)

Below: TypeAlias = Callable[..., Any]
"""The operator without autograd; takes the same arguments."""


def opaque_op(name: str, schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Defines an operator whose kernel, on every device, is the decorated function.

    Results share no memory with arguments, nor with each other.
    """
    short = name.removeprefix("fxport::")

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        _library.define(short + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(short, _disable_dynamo(kernel), "CompositeExplicitAutograd")
        _kernels[short] = kernel
        return kernel

    return register


def differentiate(name: str, function: type[torch.autograd.Function]) -> None:
    """Gives an operator its derivative.

    Args:
        name: of an operator that `opaque_op` defined.
        function: ``forward(ctx, below, *arguments)`` computes it by calling `below`.
    """
    short = name.removeprefix("fxport::")
    op = getattr(torch.ops.fxport, short).default
    called_directly = partial(_below_autograd, _kernels[short])

    def kernel(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        keys = keys & torch._C._after_autograd_keyset
        if keys.raw_repr() in _PLAIN:  # spares a way through the dispatcher: a quarter of all
            below = called_directly
        else:
            below = partial(_below_autograd, op.redispatch, keys)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(below, *arguments)
        return below(*arguments)

    _library.impl(short, _disable_dynamo(kernel), "Autograd", with_keyset=True)


def _below_autograd(function: Callable[..., Any], *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return function(*arguments)


def autocast(name: str, operands: int) -> None:
    """Under autocast, casts an operator's first `operands` arguments first, differentiably.

    float64 and what is not floating is left alone.
    """
    short = name.removeprefix("fxport::")
    op = getattr(torch.ops.fxport, short)
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        _library.impl(short, partial(_cast_and_call, op, operands, device_type, keys), key)


def _cast_and_call(
    op: Callable[..., Any],
    operands: int,
    device_type: str,
    keys: torch._C.DispatchKeySet,
    *arguments: Any,
) -> Any:
    dtype = torch.get_autocast_dtype(device_type)
    cast = [
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
        for x in arguments[:operands]
    ]
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return op(*cast, *arguments[operands:])
