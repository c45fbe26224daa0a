"""What is computed of weights alone needs no rule: no token flows in, so none is mixed.

    kron(a [8, 8], b [8, 8])                 [64, 64]    whatever `kron` does
    linear(x [B, T, 64], kron(a, b))         judged by the rule of `linear`

An operation is a function of its operands where it writes to nothing, draws no random numbers, and
the shape of what it gives does not hang on their values. Nothing that counts tokens may enter,
neither as a tensor along the tokens nor as a number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import shape_of
from fxport.passes.axes import Symbols, has_axis
from fxport.passes.constants import is_symbolic

__all__ = ["axes_of_weights", "is_function"]

_NOT_FUNCTIONS = (
    torch.Tag.nondeterministic_seeded,
    torch.Tag.dynamic_output_shape,
    torch.Tag.data_dependent_output,
    torch.Tag.maybe_aliasing_or_mutating,
    torch.Tag.generated,
)


def is_function(target: Any) -> bool:
    """Whether an op of ATen gives tensors that are a function of the tensors it is given.

    Ops whose names begin with an underscore are ATen's own affair: they need not check what they
    are given, so a saved graph may not call them.
    """
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    schema = target._schema
    private = schema.name.startswith("aten::_")
    tags = target.tags
    given, made = ([str(a.type) for a in side] for side in (schema.arguments, schema.returns))
    takes = any(kind in ("Tensor", "List[Tensor]") for kind in given)
    gives = bool(made) and all(kind in ("Tensor", "List[Tensor]") for kind in made)
    pure = not schema.is_mutable and not any(tag in tags for tag in _NOT_FUNCTIONS)
    return takes and gives and pure and not private


def axes_of_weights(node: fx.Node, axes: dict[fx.Node, Any], symbols: Symbols) -> Any:
    """Axes of what an op without a rule makes of weights alone; None where that is not proven."""
    value = node.meta.get("val")
    given = node.all_input_nodes
    if not is_function(node.target) or any(n not in axes or is_symbolic(n) for n in given):
        return None
    if any(map(has_axis, (dim for n in given for dim in _dims(n, axes)))):
        return None
    if isinstance(value, torch.Tensor):
        return _whole(shape_of(node), symbols)
    found = tuple(_whole(tuple(v.shape), symbols) for v in value or ())
    return found if found and None not in found else None


def _dims(node: fx.Node, axes: dict[fx.Node, Any]) -> Any:
    return axes[node] if isinstance(node.meta["val"], torch.Tensor) else sum(axes[node], ())


def _whole(shape: tuple[Any, ...], symbols: Symbols) -> Any:
    fixed = all(isinstance(size, int) for size in shape)
    return tuple(symbols.factor(size) for size in shape) if fixed else None
