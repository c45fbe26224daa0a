"""What forward asks about the model's own numbers: buffers have values while it is traced, too.

    if self.freqs_cos[0, 0] == 0: ...        answered by the buffer `freqs_cos`
    scale = self.scale.item()                a number
    y[:, self.is_rotated] = x                y[:, [0, 1, 2, ...]] = x

Parameters are trained, so nothing is known of them. What forward writes to is refused by
`unwritten`, on the whole graph: another call would be told something else. Where sizes are plain
numbers, ``table[3]`` may be ``table[B]``: nothing is known then of what any larger number made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

__all__ = ["StoredValues"]

# First, last, whole: numbers that no batch size or length of a trace is, nor all of them make.
_NO_SIZES = (-2, -1, 0, 1, sys.maxsize)


class StoredValues:
    """The values of what is computed from buffers alone.

    Args:
        model: before a trace puts its own tensors in place of the buffers.
        plain: whether the sizes of the trace are plain numbers.
    """

    def __init__(self, model: nn.Module, *, plain: bool) -> None:
        self._model = model
        self._plain = plain
        self._buffers = {name: b for name, b in model.named_buffers() if not b.is_meta}
        self._given: dict[fx.Node, Tensor] | None = None
        self._found: dict[fx.Node, Tensor | None] = {}

    def number(self, node: fx.Node) -> bool | int | float | None:
        """The one number that a node of the graph being traced holds; None where nobody knows."""
        value = self._of(node)
        if value is None or value.numel() != 1 or value.is_complex():
            return None
        with _real():
            number: bool | int | float = value.item()
        return number

    def places(self, node: fx.Node) -> list[list[int]] | None:
        """Where a mask holds, axis by axis; None where nobody knows."""
        value = self._of(node)
        if value is None or value.dtype != torch.bool:
            return None
        with _real():
            return [axis.tolist() for axis in value.nonzero(as_tuple=True)]

    def _of(self, node: fx.Node) -> Tensor | None:
        pending = [node]
        while pending:
            at = pending[-1]
            missing = [] if at in self._found or not _is_plain(at) else at.all_input_nodes
            missing = [n for n in missing if n not in self._found]
            if missing and not any(self._found.get(n, self) is None for n in at.all_input_nodes):
                pending += missing
                continue
            if at not in self._found:
                self._found[at] = self._value(at)
            pending.pop()
        return self._found[node]

    def _value(self, node: fx.Node) -> Tensor | None:
        if not _is_plain(node):
            return self._inputs().get(node)
        given = [self._found.get(n) for n in node.all_input_nodes]
        if not given or any(value is None for value in given):
            return None
        if self._plain and not all(map(_is_no_size, tree_leaves((node.args, node.kwargs)))):
            return None
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._found.__getitem__)
        target: Any = node.target
        with _real():
            result = target(*args, **kwargs)
        return result if isinstance(result, Tensor) else None

    def _inputs(self) -> dict[fx.Node, Tensor]:
        """The placeholders of the buffers, as the trace has put them in place."""
        if self._given is None:
            mode = get_proxy_mode()
            assert mode is not None
            self._given = {}
            for name, buffer in self._model.named_buffers():
                slot = get_proxy_slot(buffer, mode.tracer, None) if is_fake(buffer) else None
                if slot is not None and slot.proxy.node.op == "placeholder":
                    known = self._buffers.get(name)
                    if known is not None:
                        self._given[slot.proxy.node] = known
        return self._given


def _is_no_size(value: Any) -> bool:
    return not isinstance(value, int | float) or value != value // 1 or value in _NO_SIZES


@contextmanager
def _real() -> Iterator[None]:
    """With numbers, unseen by the trace."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


def _is_plain(node: fx.Node) -> bool:
    """Whether the value follows from those of its inputs: no write, no random numbers."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )
