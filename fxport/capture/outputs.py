"""What forward returns, in containers that a trace can hold.

Output(loss=None, logits=x)  ->  {"loss": None, "logits": x}
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

from fxport.capture.gradients import as_called

__all__ = ["plain", "plain_outputs"]


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


def plain(value: Any) -> Any:
    """Mappings, dataclasses and namespaces as dictionaries, sequences as lists, at any depth."""
    if isinstance(value, Mapping):
        return {key: plain(held) for key, held in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, SimpleNamespace):
        return plain(vars(value))
    if isinstance(value, tuple | list):
        return [plain(held) for held in value]
    return value
