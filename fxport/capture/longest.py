"""The longest sequence that forward takes, asked by shapes alone.

self.mask[:T, :T], assert T <= 256      a run on shapes fails beyond it
self.positions(arange(T))               shapes do not tell; the numbers of the positions do
"""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves

from fxport.capture.location import forward_line
from fxport.capture.questions import by_shapes
from fxport.capture.sample import device_of
from fxport.capture.walk import last_within_tables
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["UNBOUNDED", "continues", "longest", "runs"]

# Without a limit in the model, tables are made up to here; also the longest [T, T] constant.
UNBOUNDED = 4096


def continues(model: nn.Module, limit: int) -> bool:
    """Whether forward also runs beyond a limit: then it was the graph's, not the model's."""
    return runs(model, limit + 1, limit)


def runs(model: nn.Module, length: int, usual: int) -> bool:
    """Whether forward takes this many tokens as it takes the `usual` number, by shapes alone.

    It may take more and cut off the first, ``ids[:, -limit:]``: the others are not answered.
    """
    sizes = _sizes(model, length)
    return sizes is not None and (length in sizes or usual not in (_sizes(model, usual) or ()))


def _sizes(model: nn.Module, length: int) -> set[int] | None:
    """Every size of what forward gives for this many tokens; None where it does not take them."""
    ids = torch.zeros(1, length, dtype=torch.long, device=device_of(model))
    # Sizes that depend on data, such as how many experts were chosen, are symbols.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    with by_shapes(model, mode):
        try:
            outputs = model(mode.from_tensor(ids))
        except Exception:  # an assertion, an index, a shape: the model does not take it
            return None
    tensors = [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)]
    return {size for t in tensors for size in t.shape if isinstance(size, int)}


def longest(model: nn.Module, known: int) -> int | None:
    """The largest length that forward accepts; None when that is beyond what is tried.

    Raises:
        PortError: forward cannot be run on shapes alone.
    """
    within = last_within_tables(model, known, UNBOUNDED)
    beyond = UNBOUNDED + 1 if within is None else within
    if runs(model, beyond, known):
        return within
    if _sizes(model, known) is None:  # a trace at this very length succeeded
        reason = Reason(
            ReasonCode.LENGTH_SPECIALISED,
            "the longest sequence is unknown: forward looks at values, so it cannot be asked "
            "with shapes alone",
            forward_line(model),
            "control flow must not depend on the values of tensors",
        )
        raise PortError([reason])
    low, high = known, beyond
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if runs(model, middle, known) else (low, middle)
    return low
