"""Buffers that a proof relied on: watched while the compiled code runs.

A mask proven causal when the graph was compiled is no longer looked at, so a later change of
the buffer behind it would be ignored without a word.

Known limit: a write that PyTorch does not count (``buffer.data[..] = x``, or memory shared with
NumPy) is not noticed. To notice it every value would have to be read at every call: 2.6 ms for
2048 by 2048 bools on one CPU core, and a synchronisation on a GPU.

What the values were is remembered as a digest: copies of masks of T * T bools would be a good part
of what a compiled step holds.
"""

from __future__ import annotations

import ctypes
import hashlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from fxport.capture.inputs import InputKind, graph_input
from fxport.errors import FxportError

__all__ = ["watch_buffers"]


def watch_buffers(
    compiled: Callable[..., Any], gm: fx.GraphModule, names: Iterable[str]
) -> Callable[..., Any]:
    """`compiled`, called only while the named buffers hold the values they were proven with.

    Args:
        compiled: takes the values of gm's placeholders.
        gm: the lowered graph.
        names: qualified names of the buffers.

    Raises (when called):
        FxportError: a buffer holds other values than at compile time.
    """
    wanted = frozenset(names)
    buffers: list[_Buffer] = []
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        entry = graph_input(node)
        if entry.kind is InputKind.BUFFER and entry.name in wanted:
            assert entry.value is not None
            buffers.append(_Buffer(entry.name, position, entry.value))
    if not buffers:
        return compiled

    def checked(*args: Any) -> Any:
        for buffer in buffers:
            buffer.check(args[buffer.position])
        return compiled(*args)

    return checked


class _Buffer:
    """One buffer. The usual check costs three comparisons; values are read after a change only."""

    def __init__(self, name: str, position: int, value: torch.Tensor) -> None:
        self.name = name
        self.position = position
        self._proven = _digest(value)
        self._remember(value)

    def _remember(self, value: torch.Tensor) -> None:
        self._tensor = weakref.ref(value)
        self._address = value.data_ptr()
        self._version = None if value.is_inference() else value._version

    def check(self, value: torch.Tensor) -> None:
        if (
            self._tensor() is value
            and self._version is not None  # inference tensors count no versions
            and self._version == value._version
            and self._address == value.data_ptr()
        ):
            return
        # Loading a checkpoint writes the same values again; only other values matter.
        if _digest(value) != self._proven:
            raise FxportError(
                f"buffer {self.name!r} has changed since the model was compiled, and the attention "
                "that was proven with its old values would ignore the change. Call "
                "torch._dynamo.reset() after changing it, so that the model is compiled again."
            )
        self._remember(value)


def _digest(value: torch.Tensor) -> bytes:
    """Differs where shape, dtype, device or any value does (0.0 and -0.0 count as different)."""
    found = hashlib.sha256(f"{tuple(value.shape)} {value.dtype} {value.device}".encode())
    held = value.detach().cpu().contiguous()
    if held.numel():
        size = held.numel() * held.element_size()
        found.update((ctypes.c_char * size).from_address(held.data_ptr()))
    return found.digest()
