"""Buffers that a proof relied on: watched while the compiled code runs.

A mask proven causal when the graph was compiled is no longer looked at, so a later change of
the buffer behind it would be ignored without a word.

Known limit: a write that PyTorch does not count (``buffer.data[..] = x``, or memory shared with
NumPy) is not noticed. To notice it every value would have to be read at every call: 2.6 ms for
2048 by 2048 bools on one CPU core, and a synchronisation on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
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
            known = [b.proven for b in buffers]
            buffers.append(_Buffer(entry.name, position, entry.value, known))
    if not buffers:
        return compiled

    def checked(*args: Any) -> Any:
        for buffer in buffers:
            buffer.check(args[buffer.position])
        return compiled(*args)

    return checked


class _Buffer:
    """One buffer. The usual check costs three comparisons; values are read after a change only."""

    def __init__(
        self, name: str, position: int, value: torch.Tensor, known: Sequence[torch.Tensor]
    ) -> None:
        self.name = name
        self.position = position
        # Layers mostly hold equal masks: one copy serves them all.
        same = next((k for k in known if _same(k, value)), None)
        self.proven = value.detach().clone() if same is None else same
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
        if not _same(self.proven, value):
            raise FxportError(
                f"buffer {self.name!r} has changed since the model was compiled, and the attention "
                "that was proven with its old values would ignore the change. Call "
                "torch._dynamo.reset() after changing it, so that the model is compiled again."
            )
        self._remember(value)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype or left.device != right.device:
        return False
    # Exact for every dtype, NaN included.
    return bool(((left == right) | ((left != left) & (right != right))).all())
