"""How every known op carries axes from its inputs to its output.

An op without a rule is refused: nothing is assumed of it. Ops that ATen tags as pointwise need
no entry. The rules are in `rules_shape`, `rules_compute` and `rules_places`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments
from fxport.errors import ReasonCode
from fxport.passes.axes import Axes, Refusal, Symbols, join
from fxport.passes.constants import is_symbolic
from fxport.passes.tokens import rules_compute, rules_places, rules_shape
from fxport.passes.tokens.call import RULES, Call
from fxport.passes.tokens.weights import is_function

__all__ = ["has_rule", "is_pointwise", "may_be_saved", "propagate"]

aten = torch.ops.aten

# Importing them is what fills the table.
RULE_MODULES = (rules_shape, rules_compute, rules_places)


def may_be_saved(target: Any) -> bool:
    """Whether a saved port may hold this op: one with a rule, or a function of weights."""
    return has_rule(target) or is_function(target)


def has_rule(target: Any) -> bool:
    """Whether the analysis knows what this op does to tokens."""
    return isinstance(target, torch._ops.OpOverload) and (target in RULES or is_pointwise(target))


def is_pointwise(target: torch._ops.OpOverload) -> bool:
    """Whether the op works position by position, operands broadcast."""
    if RULES.get(target) is _pointwise:
        return True
    tags = target.tags
    random = torch.Tag.nondeterministic_seeded in tags
    return torch.Tag.pointwise in tags and not target._schema.is_mutable and not random


def propagate(node: fx.Node, axes: dict[fx.Node, Any], symbols: Symbols) -> Any:
    """Axes of the node's output (a tuple of axes where it returns several tensors).

    Raises:
        Refusal: no rule, or the rule refuses.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not has_rule(target):
        raise Refusal(ReasonCode.UNSUPPORTED_OP, f"no rule for the operation `{target}`")
    call = Call(node, arguments(node), axes, symbols)
    _no_sizes_as_numbers(call)
    return RULES.get(target, _pointwise)(call)


# Only these arguments may hold a size that varies with the input.
_SIZE_ARGUMENTS = {"size", "shape", "start", "end", "length", "repeats", "sizes", "implicit"}


def _no_sizes_as_numbers(call: Call) -> None:
    for argument, value in call.arguments.items():
        values = value if isinstance(value, list | tuple) else [value]
        varies = any(isinstance(v, fx.Node) and is_symbolic(v) for v in values)
        if varies and argument not in _SIZE_ARGUMENTS:
            raise Refusal(
                ReasonCode.DEPENDS_ON_LENGTH,
                "the number of tokens (or the batch size) enters the computation as a number",
                "in vLLM the batch is a mix of requests: this number would not be the same",
            )


def _pointwise(call: Call) -> Axes:
    return join(*call.all()) if call.all() else ()


# Pointwise by their documentation, though ATen does not tag these overloads so.
for _op in (
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar, aten.masked_fill.Tensor,
    aten.polar.default, aten.complex.default, aten.hardswish.default, aten.rsub.Tensor,
    aten.floor_divide.default, aten.log_sigmoid.default,
):  # fmt: skip
    RULES[_op] = _pointwise
