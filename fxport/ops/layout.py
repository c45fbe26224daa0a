"""The strides that `fxport::attention` promises, those of size-1 dimensions included."""

from __future__ import annotations

from torch import Tensor

__all__ = ["addressable", "empty_heads", "in_heads_layout", "in_row_major_layout"]


def empty_heads(like: Tensor, batch: int, heads: int, length: int, size: int) -> Tensor:
    """Uninitialised [batch, heads, length, size] whose memory is [batch, length, heads, size].

    ``transpose(1, 2).reshape(batch, length, heads * size)`` of it copies nothing.
    """
    return like.new_empty(batch, length, heads, size).transpose(1, 2)


def in_heads_layout(x: Tensor) -> Tensor:
    """`x` [batch, heads, length, size] with the strides of `empty_heads`, copied if need be."""
    batch, heads, length, size = x.shape
    strides = x.stride()
    usual = (length * heads * size, size, heads * size, 1)
    if strides == usual and strides[0] > 0:
        return x
    by_length = _strides((batch, length, heads, size))
    if strides == (by_length[0], by_length[2], by_length[1], by_length[3]):
        return x
    return in_row_major_layout(x.transpose(1, 2)).transpose(1, 2)


def in_row_major_layout(x: Tensor) -> Tensor:
    """`x` with the strides of a new tensor; ``contiguous()`` leaves those of size 1 as they are."""
    strides = _strides(x.shape)
    if x.stride() == strides:
        return x
    x = x.contiguous()
    # where that had nothing to copy, only strides that address nothing are wrong
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


_ALIGNMENT = 16  # bytes


def addressable(x: Tensor) -> Tensor:
    """`x`, or a copy that bulk loads can address: last stride 1, all else aligned to 16 bytes.

    Zero strides (expanded tensors) count as not addressable. A copy keeps the shape; its rows lie
    far enough apart to be aligned, whatever the head size.
    """
    unit = _ALIGNMENT // x.element_size()
    aligned = x.data_ptr() % _ALIGNMENT == 0
    b, h, t, d = x.stride()
    if d == 1 and aligned and b > 0 < h and t > 0 and (b | h | t) % unit == 0:  # nearly always
        return x
    strides = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    if (
        (x.stride(-1) == 1 or x.shape[-1] == 1)
        and all(s > 0 and s % unit == 0 for s in strides)
        and aligned
    ):
        return x
    batch, heads, length, size = x.shape
    return empty_heads(x, batch, heads, length, -(-size // unit) * unit)[..., :size].copy_(x)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [1] * len(shape), 1
    for dim in range(len(shape) - 1, -1, -1):
        strides[dim] = step
        step *= shape[dim] or 1
    return tuple(strides)
