"""Factors that differ from key to key, on scores or weights: they go onto the keys or values.

Before                                          After
    s = q @ k.mT / (qn * kn.mT)                     s = (q / qn) @ (k / kn).mT
    w * g[:, :, None] @ v                           w @ (v * g[..., None])
    e = exp(s) * sigmoid(g);  e / sum(e)            softmax(s + logsigmoid(g))
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.errors import ReasonCode
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.frame import Frame, query_axes
from fxport.passes.attention.layout import Axis, Dims, LayoutError, axes_of, conform, is_one
from fxport.passes.attention.made import power_of
from fxport.passes.attention.products import as_product
from fxport.passes.attention.site import Left, MaskKind, MaskStep, Match, RowScale
from fxport.passes.attention.trace import Step, trace
from fxport.passes.attention.views import CASTS, DIVISIONS, SCALES, moved_input, overload_packet

__all__ = [
    "emit_key_scales",
    "emit_logarithm",
    "is_finite",
    "is_gate",
    "is_truth",
    "outer_factors",
    "with_value_scales",
]

aten = torch.ops.aten


def outer_factors(factor: fx.Node) -> Iterator[tuple[object, bool]]:
    """The factors that a value is the product of, and whether it is divided by them."""
    packet = overload_packet(factor)
    product = as_product(factor) if packet in (aten.matmul, aten.bmm) else None
    if product is not None and is_one(shape_of(product.left)[-1]):
        yield from ((product.left, False), (product.right, False))
    elif packet is aten.mul:
        yield from ((argument, False) for argument in factor.args[:2])
    elif packet in DIVISIONS and arguments(factor).get("rounding_mode") is None:
        yield from zip(factor.args[:2], (False, True), strict=True)


def with_value_scales(match: Match) -> Match:
    """Weights that are multiplied by a factor for each key: it may as well be on the values."""
    again = match.again
    if again is None or again.kind is not MaskKind.KEEP or again.tensor is None:
        return match
    try:
        varies = _identified(trace(again.tensor), again.dims)
    except LayoutError:
        return match
    if varies & {*query_axes(match)}:
        return match
    return replace(match, again=None, value_scales=(RowScale(again.tensor, again.dims, False),))


def emit_key_scales(
    emitter: Emitter, value: fx.Node, scales: Sequence[RowScale], frame: Frame
) -> fx.Node:
    """Keys or values ``[B, Hkv, Tk, ..]``, times the factors.

    Raises:
        Left: one differs from query to query as well, or within a group of heads.
    """
    dtype = value.meta["val"].dtype
    for scale in scales:
        factor = _per_key(emitter, scale, frame)
        value = emitter.call(aten.div.Tensor if scale.divide else aten.mul.Tensor, value, factor)
    if value.meta["val"].dtype != dtype:
        value = emitter.call(aten.to.dtype, value, dtype)
    return value


def _per_key(emitter: Emitter, scale: RowScale, frame: Frame) -> fx.Node:
    assert isinstance(scale.factor, fx.Node)
    steps = trace(scale.factor)
    try:
        varies = _identified(steps, scale.dims)
    except LayoutError:
        raise _entangled(scale) from None
    if not varies <= {*frame.batch, *frame.kv_heads, *frame.key}:
        raise _entangled(scale)
    wanted_dims = (frame.batch, frame.kv_heads, frame.key)
    found, factor = emitter.operand(steps, wanted_dims, steps[-1].node.meta["val"].dtype)
    if factor != 1:
        found = emitter.call(aten.mul.Tensor, found, factor)
    return emitter.call(aten.unsqueeze.default, found, -1)


def _identified(steps: Sequence[Step], dims: Dims) -> set[Axis]:
    """Declares a factor's axes to be those of the scores that it meets; those it varies along.

    Raises:
        LayoutError: they are not.
    """
    own = steps[-1].dims
    for wanted, given in zip(dims[len(dims) - len(own) :], own, strict=True):
        if given:
            conform(wanted, given)
    return set(axes_of(own, repeated=False))


def _entangled(scale: RowScale) -> Left:
    assert isinstance(scale.factor, fx.Node)
    verb = "divided" if scale.divide else "multiplied"
    return Left(
        ReasonCode.UNSUPPORTED_FEATURE,
        f"scores or weights are {verb} by something that is no factor of the queries times one of"
        " the keys",
        scale.factor,
        "scale q and k themselves (for cosines: F.normalize), or add to the scores",
    )


# -- gates on exponentials -------------------------------------------------------------------------


def is_truth(node: fx.Node) -> bool:
    """Whether a value is bools as numbers, 0 and 1."""
    while True:
        before = node.args[0] if node.args else None
        moves = overload_packet(node) in CASTS or moved_input(node) is not None
        if not moves or not isinstance(before, fx.Node):
            return False
        if before.meta["val"].dtype == torch.bool:
            return True
        node = before


def is_gate(node: fx.Node) -> bool:
    """Whether a value is positive by the way it is made, and its logarithm known."""
    first, *moves = trace(node)
    if any(overload_packet(s.node) in SCALES for s in moves):
        return False
    return overload_packet(first.node) is aten.sigmoid or power_of(first.node) is not None


def emit_logarithm(emitter: Emitter, step: MaskStep) -> MaskStep:
    """What a step on exponentials says about scores."""
    if not step.logarithm:
        return step
    assert step.tensor is not None
    if is_truth(step.tensor):
        return replace(step, kind=MaskKind.FILL, inverted=True, logarithm=False)
    steps = trace(step.tensor)
    power = power_of(steps[0].node)
    if power is None:  # the logarithm of a small sigmoid would have no gradient
        value = emitter.call(aten.log_sigmoid.default, steps[0].node.args[0])
    else:
        value = emitter.call(aten.mul.Tensor, *power)
    for moved in steps[1:]:
        args = (value, *moved.node.args[1:])
        value = emitter.call(moved.node.target, *args, **moved.node.kwargs)  # type: ignore[arg-type]
    return replace(step, kind=MaskKind.ADD, tensor=value, number=1.0, logarithm=False)


_BOUNDED = {
    aten.sigmoid, aten.tanh, aten.softmax, aten.relu, aten.gelu, aten.silu, aten.linear,
    aten.matmul, aten.bmm, aten.mm, aten.addmm, aten.einsum, aten.layer_norm,
}  # fmt: skip
_TAKES_PART = {aten.select, aten.slice, aten.chunk, aten.split, aten.unbind, aten.narrow}


def is_finite(node: fx.Node) -> bool:
    """Whether a value is finite by the way it is made, as weights and what is given are."""
    while True:
        node = trace(node)[0].node
        parts = node.target is operator.getitem or overload_packet(node) in _TAKES_PART
        if not parts or not isinstance(node.args[0], fx.Node):
            return node.op == "placeholder" or overload_packet(node) in _BOUNDED
        node = node.args[0]
