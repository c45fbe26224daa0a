"""`torch.vmap` as the loop that it stands for, which torch.export can trace.

vmap(head, in_dims=1, out_dims=1)(q, k)  ->  stack([head(q[:, i], k[:, i]) for i in range(H)], 1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch import apis
from torch._functorch.vmap import _broadcast_to_and_flatten, _process_batched_inputs
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["vmap_as_loop"]


@contextmanager
def vmap_as_loop() -> Iterator[None]:
    """For the time of a trace. What maps over scalars (masks by index) stays: it is traced well."""
    original = apis.vmap_impl

    def vmap(
        func: Callable[..., Any],
        in_dims: Any,
        out_dims: Any,
        randomness: str,
        chunk_size: int | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        count, dims, flat, spec = _process_batched_inputs(in_dims, args, func)
        mapped = [value for value, dim in zip(flat, dims, strict=True) if dim is not None]
        plain = type(count) is int and all(value.dim() > 1 for value in mapped)
        if not plain or randomness == "same":
            return original(func, in_dims, out_dims, randomness, chunk_size, *args, **kwargs)
        results = [
            func(*tree_unflatten(_row(flat, dims, row), spec), **kwargs) for row in range(count)
        ]
        return _stacked(results, out_dims)

    apis.vmap_impl = vmap
    try:
        yield
    finally:
        apis.vmap_impl = original


def _row(values: Sequence[Any], dims: Sequence[int | None], row: int) -> list[Any]:
    pairs = zip(values, dims, strict=True)
    return [value if dim is None else value.select(dim, row) for value, dim in pairs]


def _stacked(results: Sequence[Any], out_dims: Any) -> Any:
    first, spec = tree_flatten(results[0])
    rows = [tree_flatten(result)[0] for result in results]
    dims = _broadcast_to_and_flatten(out_dims, spec)
    if dims is None or not all(isinstance(value, Tensor) for value in first):
        raise ValueError("torch.vmap: `out_dims` does not fit what the function returns")
    columns = zip(*rows, strict=True)
    stacked = [c[0] if d is None else torch.stack(c, d) for c, d in zip(columns, dims, strict=True)]
    return tree_unflatten(stacked, spec)
