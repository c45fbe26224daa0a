"""What torch asks of its tensors at every operation: ten times as many calls as operations.

x.stride(), x.dtype, x.is_sparse, ...       no node, no value, no gradient: no mode need see it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["METADATA", "asked_plainly"]

METADATA: frozenset[Any] = frozenset(
    {
        Tensor.dim,
        Tensor.is_complex,
        Tensor.is_conj,
        Tensor.is_floating_point,
        Tensor.is_inference,
        Tensor.is_neg,
        Tensor.numel,
        Tensor.size,
        Tensor.storage_offset,
        Tensor.stride,
        Tensor.untyped_storage,
        Tensor._is_view,
        *(
            getattr(Tensor, name).__get__
            for name in (
                "dtype",
                "is_mkldnn",
                "is_nested",
                "is_quantized",
                "is_sparse",
                "layout",
                "ndim",
                "shape",
            )
        ),
    }
)


def asked_plainly(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Answers one of these past all further modes; no tensor of a class of its own may be asked."""
    with torch._C.DisableTorchFunction():
        return func(*args, **(kwargs or {}))
