"""Where forward may treat one token, or one row, in another way than several.

if x.shape[1] == 1:   x.squeeze(1)   int(T)   ->  that line

Torch takes a size that may vary for two or more.
"""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import DimDynamic

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.batches import asked_about
from fxport.capture.clone import clone_for_capture, take_modes
from fxport.capture.export import ready
from fxport.capture.location import location_at, user_location
from fxport.errors import Location

__all__ = ["line_about_one"]

_USUAL = 5
_BOTH = (DimDynamic.DYNAMIC, DimDynamic.DYNAMIC)


def line_about_one(
    model: nn.Module, captured: fx.GraphModule | None = None, *, own_modes: bool = False
) -> Location | None:
    """The first such line; None where there is none to be seen.

    Args:
        captured: the graph of the model, where squeezes are not shown to be harmless.
        own_modes: in the modes that its modules are in, instead of eval mode.
    """
    clone = clone_for_capture(model)
    ready(clone)
    if own_modes:
        take_modes(clone, model)
    heard = asked_about(clone, _USUAL, _BOTH)
    for question in heard.questions:
        if any(question.otherwise(size, 1, _USUAL) for size in (heard.rows, heard.tokens)):
            return location_at(*question.line)
    nodes = captured.graph.nodes if captured is not None else ()
    squeezes = (user_location(n) for n in nodes if _drops_a_one(n))
    return next((line for line in squeezes if line is not None), None)


def _drops_a_one(node: fx.Node) -> bool:
    """Whether an axis goes where there is one row or one token."""
    if getattr(node.target, "overloadpacket", None) is not torch.ops.aten.squeeze:
        return False
    bound = arguments(node)
    sizes = shape_of(bound["self"])
    axes = bound.get("dim", range(len(sizes)))
    axes = [axes] if isinstance(axes, int) else axes
    return any(not isinstance(sizes[axis], int) for axis in axes)
