"""Where a checkpoint tensor goes, and what of it a rank reads."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from fxport.errors import SavedPortError
from fxport.passes.tensor_parallel.boxes import Box, select

__all__ = ["Target", "fill"]


@dataclass(frozen=True)
class Target:
    """A tensor of this rank that a checkpoint tensor fills.

    Attributes:
        tensor: parameter or buffer; gone when vLLM has packed it into another.
        shape: of the whole checkpoint tensor.
        box: what this rank reads of it; None: the tensor's own `weight_loader` takes its part.
        rows: of the tensor, that it fills, or the one entry; None: all of them.
    """

    tensor: weakref.ref[torch.Tensor]
    shape: tuple[int, ...]
    box: Box | None
    rows: slice | int | None = None


def fill(name: str, target: Target, tensor: torch.Tensor) -> None:
    """Copies this rank's part of a whole checkpoint tensor.

    Raises:
        SavedPortError: another shape than the port needs, or nothing left to fill.
    """
    held = target.tensor()
    if held is None:
        raise SavedPortError(f"vLLM has packed `{name}`: it cannot be loaded a second time")
    if target.rows is not None:
        held = held[target.rows]
    value = torch.view_as_complex(tensor) if held.is_complex() else tensor
    if tuple(value.shape) != target.shape:
        raise SavedPortError(
            f"`{name}` has shape {tuple(value.shape)} in the checkpoint; "
            f"the port needs {target.shape}"
        )
    if target.box is None:
        loader = getattr(held, "weight_loader", default_weight_loader)
        loader(held, value)
        return
    # The checkpoint is mapped into memory: only this rank's part is read. The rest is padding.
    part = select(value, target.box)
    with torch.no_grad():
        held.zero_()
        held[tuple(slice(n) for n in part.shape)].copy_(part)
