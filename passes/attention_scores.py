"""From the product of Q and K forward to the softmax: scale, softcap, masks, biases, sinks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.errors import ReasonCode
from fxport.passes.attention_layout import Axis, Dim, Dims, Factor, LayoutError, is_one
from fxport.passes.attention_products import as_product
from fxport.passes.attention_site import Left, MaskKind, MaskStep, RowScale
from fxport.passes.attention_views import is_cast, moved_input, number, overload_packet, view_dims
from fxport.passes.constants import evaluate, is_symbolic
from fxport.passes.graph_facts import GraphFacts, Source

__all__ = ["Scores", "paths"]

aten = torch.ops.aten

_BINARY = {aten.mul, aten.div, aten.true_divide, aten.add, aten.sub, aten.maximum}
_UNARY = {aten.tanh, aten.clamp, aten.clamp_min, aten.masked_fill, aten.neg}


def paths(end: fx.Node) -> Iterator[list[fx.Node]]:
    """Ways from a product of two tensors to `end`, product first, through known operations."""
    if as_product(end) is not None:
        yield [end]
        return
    for candidate in _carriers(end):
        for path in paths(candidate):
            yield [*path, end]


def _carriers(node: fx.Node) -> list[fx.Node]:
    """Inputs that may carry the scores."""
    packet = overload_packet(node)
    if packet is aten.cat:
        given: list[Any] = list(arguments(node)["tensors"])
    elif packet is aten.where:
        given = list(node.args[1:])
    elif packet in _BINARY:
        given = list(node.args[:2])
    elif packet in _UNARY:
        given = [node.args[0]]
    else:
        moved = moved_input(node)
        given = [] if moved is None or (_converts(node) and not is_cast(node)) else [moved]
    return [g for g in given if _is_score_like(g)]


def _converts(node: fx.Node) -> bool:
    return overload_packet(node) in (aten.to, aten._to_copy, aten.type_as)


def _is_score_like(value: object) -> bool:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return False
    tensor = value.meta["val"]
    return bool(tensor.is_floating_point() and tensor.dim() >= 2)


class Scores:
    """The scores on their way from the product to the softmax.

    Attributes:
        dims: dimensions of the current value.
        scale, softcap: ``scale * q.k`` before, ``softcap * tanh(./softcap)`` after; 0: none.
        sink_axis: after sinks were concatenated, the key axis with the sink on it.
    """

    def __init__(self, facts: GraphFacts, dims: Dims, scale: float) -> None:
        self._facts = facts
        self.dims = dims
        self.scale = scale
        self.softcap = 0.0
        self.row_scales: list[RowScale] = []
        self.steps: list[MaskStep] = []
        self.sinks: tuple[fx.Node, Dims] | None = None
        self.sink_axis: Axis | None = None
        self.sink_first = False
        self.key_without_sink: Dim = ()
        self.read_buffers: list[fx.Node] = []

    def add_initial(self, node: fx.Node, added: fx.Node, beta: float) -> None:
        """What baddbmm adds."""
        self.dims = _broadcast(self.dims, node)
        self.steps.append(MaskStep(MaskKind.ADD, node, self.dims, added, beta))

    def apply(self, node: fx.Node, carrier: fx.Node) -> None:
        """Follows one operation.

        Raises:
            Left: it cannot be expressed.
        """
        rule = _RULES.get(overload_packet(node))
        try:
            if rule is not None:
                self.dims = _broadcast(self.dims, node)
                rule(self, node, carrier)
            elif overload_packet(node) is aten.cat:
                self._concatenate(node, carrier)
            else:
                self.dims = view_dims(node, self.dims)
        except LayoutError:
            raise Left(
                ReasonCode.UNSUPPORTED_FEATURE,
                "the scores are reshaped in a way that mixes their axes",
                node,
            ) from None

    # -- numbers ---------------------------------------------------------------------------------

    def constant(self, value: object) -> float | None:
        """The number that an argument is, when nothing learned or given decides it."""
        if isinstance(value, fx.Node):
            tensor = value.meta.get("val")
            allowed = Source.BUFFER
            if not isinstance(tensor, torch.Tensor) or tensor.dim() > 0 and tensor.numel() != 1:
                return None
            if self._facts.source(value) & ~allowed or _has_symbols(value):
                return None
            self.read_buffers.append(value)
            return float(evaluate(value, {}))
        return number(value)

    def _is_row_factor(self, value: object) -> bool:
        """A tensor that may move onto q: it does not vary along the key axis."""
        if not isinstance(value, fx.Node):
            return False
        if not isinstance(value.meta["val"], torch.Tensor):
            return is_symbolic(value)
        shape = shape_of(value)
        return len(shape) == 0 or is_one(shape[-1]) or self._key_is_not_last(shape)

    def _key_is_not_last(self, shape: tuple[Any, ...]) -> bool:
        del shape
        return False

    def _needs_no_masks(self, node: fx.Node, what: str) -> None:
        if self.steps or self.sinks:
            raise Left(
                ReasonCode.ORDER_OF_OPS,
                f"{what} comes after the mask or bias",
                node,
                f"apply {what} to the raw scores, and the mask last",
            )

    # -- operations ------------------------------------------------------------------------------

    def _multiply(self, node: fx.Node, carrier: fx.Node) -> None:
        first, second = node.args[0], node.args[1]
        self._scale(node, second if first is carrier else first, divide=False)

    def _divide(self, node: fx.Node, carrier: fx.Node) -> None:
        if node.args[0] is not carrier or arguments(node).get("rounding_mode") is not None:
            raise Left(ReasonCode.NOT_ATTENTION, "the scores are a divisor here", node)
        self._scale(node, node.args[1], divide=True)

    def _scale(self, node: fx.Node, factor: Any, divide: bool) -> None:
        if factor in node.args[:1] and factor in node.args[1:2]:
            raise Left(ReasonCode.NOT_ATTENTION, "the scores are multiplied by themselves", node)
        constant = None if _is_buffer(factor) else self.constant(factor)
        if constant is not None:
            self._scale_by_number(node, 1.0 / constant if divide and constant else constant)
        elif isinstance(factor, fx.Node) and self._varies_along_last(factor):
            if divide:
                raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the scores are divided per key", node)
            self.steps.append(MaskStep(MaskKind.MULTIPLY, node, self.dims, factor))
        else:
            self._needs_no_masks(node, "a tensor scale")
            if self.softcap:
                raise Left(ReasonCode.ORDER_OF_OPS, "a tensor scale comes after the softcap", node)
            assert isinstance(factor, fx.Node)
            self.row_scales.append(RowScale(factor, self.dims, divide))

    def _varies_along_last(self, factor: fx.Node) -> bool:
        """Whether a factor varies along any axis that could be the keys."""
        value = factor.meta["val"]
        if not isinstance(value, torch.Tensor):
            return False
        shape = shape_of(factor)
        wide = [d for d, s in zip(self.dims[::-1], shape[::-1], strict=False) if not is_one(s)]
        return any(f.axis in self.key_candidates for d in wide for f in d)

    key_candidates: frozenset[Axis] = frozenset()

    def _scale_by_number(self, node: fx.Node, factor: float) -> None:
        if self.sinks is not None:
            self._needs_no_masks(node, "a scale")
        if self.steps and factor <= 0:
            raise Left(ReasonCode.ORDER_OF_OPS, "a mask is multiplied by a negative number", node)
        self.scale *= factor
        self.softcap *= factor
        if self.softcap < 0:  # cap * tanh(s / cap) is the same for -cap
            self.softcap, self.scale = -self.softcap, self.scale
        self.steps = [_scaled(step, factor) for step in self.steps]

    def _negate(self, node: fx.Node, carrier: fx.Node) -> None:
        del carrier
        self._scale_by_number(node, -1.0)

    def _tanh(self, node: fx.Node, carrier: fx.Node) -> None:
        del carrier
        self._needs_no_masks(node, "the softcap")
        if self.softcap:
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "two softcaps", node)
        self.softcap = 1.0

    def _add(self, node: fx.Node, carrier: fx.Node) -> None:
        alpha = self.constant(arguments(node).get("alpha", 1))
        first, second = node.args[0], node.args[1]
        if alpha is None or (first is carrier and second is carrier):
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the scores are added to themselves", node)
        if first is carrier:
            self._add_bias(node, second, alpha)
        elif alpha == 1:
            self._add_bias(node, first, 1.0)
        else:
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the scores are added with a factor", node)

    def _subtract(self, node: fx.Node, carrier: fx.Node) -> None:
        first, second = node.args[0], node.args[1]
        alpha = self.constant(arguments(node).get("alpha", 1))
        if first is not carrier or alpha != 1:
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the scores are subtracted here", node)
        if not _is_row_maximum(second, carrier):
            self._add_bias(node, second, -1.0)

    def _add_bias(self, node: fx.Node, bias: Any, coefficient: float) -> None:
        if self.sinks is not None:
            self._needs_no_masks(node, "the mask")
        if not isinstance(bias, fx.Node) or not isinstance(bias.meta["val"], torch.Tensor):
            return  # one number on every score changes nothing under the softmax
        self.steps.append(MaskStep(MaskKind.ADD, node, self.dims, bias, coefficient))

    def _masked_fill(self, node: fx.Node, carrier: fx.Node) -> None:
        given = arguments(node)
        self._fill(node, given["mask"], given["value"], inverted=False)

    def _where(self, node: fx.Node, carrier: fx.Node) -> None:
        condition, kept, other = node.args[:3]
        inverted = kept is carrier
        self._fill(node, condition, other if inverted else kept, inverted)

    def _fill(self, node: fx.Node, mask: Any, value: Any, inverted: bool) -> None:
        if self.sinks is not None:
            self._needs_no_masks(node, "the mask")
        constant = self.constant(value)
        if constant is None:
            raise Left(
                ReasonCode.UNSUPPORTED_FEATURE,
                "masked scores are replaced by something that is not a known number",
                node,
                "use float('-inf') or torch.finfo(dtype).min",
            )
        self.steps.append(MaskStep(MaskKind.FILL, node, self.dims, mask, constant, inverted))

    def _maximum(self, node: fx.Node, carrier: fx.Node) -> None:
        other = node.args[1] if node.args[0] is carrier else node.args[0]
        self._floor(node, other)

    def _clamp(self, node: fx.Node, carrier: fx.Node) -> None:
        del carrier
        given = arguments(node)
        if given.get("max") is not None:
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the scores are clamped from above", node)
        self._floor(node, given["min"])

    def _floor(self, node: fx.Node, value: Any) -> None:
        constant = self.constant(value)
        if constant is None:
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the scores are clamped", node)
        self.steps.append(MaskStep(MaskKind.FLOOR, node, self.dims, None, constant))

    # -- sinks -----------------------------------------------------------------------------------

    def _concatenate(self, node: fx.Node, carrier: fx.Node) -> None:
        given = arguments(node)
        tensors, along = list(given["tensors"]), given["dim"] % len(self.dims)
        other = [t for t in tensors if t is not carrier]
        if len(tensors) != 2 or len(other) != 1 or not is_one(shape_of(other[0])[along]):
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the scores are concatenated here", node)
        if self.sinks is not None:
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "two sinks", node)
        self.key_without_sink = self.dims[along]
        self.sink_first = tensors[0] is not carrier
        self.sink_axis = Axis(shape_of(node)[along], (node, along))
        before = (*self.dims[:along], (), *self.dims[along + 1 :])
        self.sinks = (other[0], before)
        self.dims = (
            *self.dims[:along],
            (Factor(self.sink_axis),),
            *self.dims[along + 1 :],
        )


def _is_buffer(value: object) -> bool:
    """A buffer may change (it is state), so as a scale it stays a multiplication."""
    return isinstance(value, fx.Node) and value.op == "placeholder"


def _has_symbols(node: fx.Node) -> bool:
    return any(is_symbolic(n) for n in node.all_input_nodes)


def _scaled(step: MaskStep, factor: float) -> MaskStep:
    if step.kind in (MaskKind.MULTIPLY, MaskKind.CAUSAL):
        return step
    return MaskStep(
        step.kind, step.node, step.dims, step.tensor, step.number * factor, step.inverted
    )


def _is_row_maximum(value: object, scores: fx.Node) -> bool:
    """Whether `value` is a maximum of these scores: subtracting it changes no softmax."""
    while isinstance(value, fx.Node) and (
        overload_packet(value) is aten.detach or not isinstance(value.target, torch._ops.OpOverload)
    ):
        if not value.args or not isinstance(value.args[0], fx.Node):
            return False
        value = value.args[0]
    if overload_packet(value) not in (aten.amax, aten.max):
        return False
    assert isinstance(value, fx.Node)
    given = arguments(value)
    return given["self"] is scores and bool(given.get("keepdim", False))


def _broadcast(dims: Dims, node: fx.Node) -> Dims:
    """The dimensions after an elementwise operation, whose other operand may be larger."""
    shape = shape_of(node)
    padded: Dims = ((),) * (len(shape) - len(dims)) + dims
    return tuple(
        dim if dim or is_one(size) else (Factor(Axis(size, (node, i)), True),)
        for i, (dim, size) in enumerate(zip(padded, shape, strict=True))
    )


_RULES: dict[Any, Callable[[Scores, fx.Node, fx.Node], None]] = {
    aten.mul: Scores._multiply,
    aten.div: Scores._divide,
    aten.true_divide: Scores._divide,
    aten.neg: Scores._negate,
    aten.tanh: Scores._tanh,
    aten.add: Scores._add,
    aten.sub: Scores._subtract,
    aten.masked_fill: Scores._masked_fill,
    aten.where: Scores._where,
    aten.maximum: Scores._maximum,
    aten.clamp: Scores._clamp,
    aten.clamp_min: Scores._clamp,
}
