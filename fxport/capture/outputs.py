"""What forward returns, in containers that a trace can hold.

Output(loss=None, logits=x)    ->  {"loss": None, "logits": x}
(logits, [Cache(k, v), ...])   ->  [logits, [{"k": k, "v": v}, ...]]
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

from fxport.capture.gradients import as_called

__all__ = ["plain", "plain_outputs"]

# What a trace can hold.
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, complex)
_HELD = (torch.Tensor, *_NUMBERS, str, bytes, type(None), torch.dtype, torch.device)


def plain_outputs(model: nn.Module) -> None:
    """Lets a clone return dictionaries and lists where it returns objects of its own.

    Args:
        model: from `clone_for_capture`; its `forward` is wrapped.
    """
    call = model.forward

    @functools.wraps(call)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with as_called():
            return plain(call(*args, **kwargs))

    vars(model)["forward"] = forward


def plain(value: Any, within: frozenset[int] = frozenset()) -> Any:
    """Mappings and objects as dictionaries, sequences as lists, at any depth.

    An object is what its attributes hold. Modules, functions and what holds itself are None: no
    trace can hold them, and nobody looks there for logits.

    Args:
        within: the objects that hold `value`, by id.
    """
    if isinstance(value, _HELD):
        return value
    if id(value) in within:
        return None
    within |= {id(value)}
    if isinstance(value, Mapping):
        return {key: plain(held, within) for key, held in value.items()}
    if isinstance(value, tuple | list):
        return [plain(held, within) for held in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), within) for f in dataclasses.fields(value)}
    if isinstance(value, type | FunctionType | nn.Module) or not hasattr(value, "__dict__"):
        return None
    return plain(vars(value), within)
