"""Modules built from dotted names."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["attach"]


def attach(
    root: nn.Module, path: str, value: nn.Module | torch.Tensor, *, persistent: bool = False
) -> None:
    """Puts a module, parameter or buffer under a dotted name; modules on the way are made.

    Args:
        path: ``"blocks.0.attn.weight"``.
        persistent: of a buffer: whether it is part of the state dict.
    """
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    if isinstance(value, nn.Module):
        root.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(last, value)
    else:
        root.register_buffer(last, value, persistent=persistent)
