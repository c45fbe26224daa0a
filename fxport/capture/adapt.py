"""A copy of a model that is called with token ids ``[B, T]`` alone, however the model is called.

forward(ids, mask)  ->  forward(ids), which calls forward(ids, a mask made of ids)

What is captured and proven is the model together with what is put around it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fxport.capture.clone import clone_for_capture, take_modes

__all__ = ["adapted"]


def adapted(model: nn.Module, call: Callable[[Callable[..., Any], Tensor], Any]) -> nn.Module:
    """A copy that shares the model's tensors and modes.

    Args:
        call: ``(the model's own forward, token ids) -> what the copy returns``.

    Raises:
        PortError: the model cannot be copied.
    """
    clone = clone_for_capture(model)
    take_modes(clone, model)
    cls = type(clone)

    def forward(self: nn.Module, ids: Tensor) -> Any:
        return call(functools.partial(cls.forward, self), ids)

    # A class, not an attribute of the instance: copies of the copy call themselves.
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    clone.__class__ = type(cls.__name__, (cls,), {"forward": forward, **names})
    return clone
