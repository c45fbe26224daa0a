"""What happens to the scores on their way: scale, softcap, masks, biases, sinks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.errors import ReasonCode
from fxport.passes.attention.factors import outer_factors
from fxport.passes.attention.layout import Axis, Dims, is_one, resolve
from fxport.passes.attention.made import filled_with
from fxport.passes.attention.paths import PADS
from fxport.passes.attention.site import Left, MaskKind, MaskStep, RowScale
from fxport.passes.attention.softmax import subtracted_maximum
from fxport.passes.attention.trace import trace
from fxport.passes.attention.views import number, overload_packet
from fxport.passes.graph_facts import GraphFacts, Source
from fxport.passes.masks.effects import hard_limit, is_forbidding
from fxport.passes.masks.values import constant_value

__all__ = ["Scores"]

aten = torch.ops.aten


class Scores:
    """The scores on their way from the product to the softmax.

    Attributes:
        scale, softcap: ``scale * q.k`` before, ``softcap * tanh(./softcap)`` after; 0: none.
        row_scales, key_scales, early, steps, sinks: as in `Match`.
        shift: the operation that moved all scores of a row alike, which only a softmax ignores.
        finite: the operation that replaced NaN and infinite scores, if one did.
        read: constants whose value was read.
    """

    def __init__(self, facts: GraphFacts, keys: frozenset[Axis], scale: float) -> None:
        self._facts = facts
        self._keys = keys
        self.dims: Dims = ()
        self.scale = scale
        self.softcap = 0.0
        self.row_scales: list[RowScale] = []
        self.key_scales: list[RowScale] = []
        self.early: list[MaskStep] = []
        self.steps: list[MaskStep] = []
        self.sinks: tuple[fx.Node, Dims] | float | None = None
        self.shift: fx.Node | None = None
        self.finite: fx.Node | None = None
        self.read: list[fx.Node] = []

    def add_initial(self, node: fx.Node, added: fx.Node, beta: float, dims: Dims) -> None:
        """What addmm or baddbmm adds."""
        self.steps.append(MaskStep(MaskKind.ADD, node, dims, added, beta))

    def apply(self, node: fx.Node, carrier: fx.Node, dims: Dims) -> None:
        """Follows one operation, whose result has dimensions `dims`.

        Raises:
            Left: it cannot be expressed.
        """
        self.dims = dims
        rule = _RULES.get(overload_packet(node))
        if rule is not None:
            rule(self, node, carrier)
        elif overload_packet(node) is aten.cat:
            along = arguments(node)["dim"] % len(dims)
            other = next(t for t in arguments(node)["tensors"] if t is not carrier)
            same = filled_with(other)
            self.add_sink(
                node, (other, (*dims[:along], (), *dims[along + 1 :])) if same is None else same
            )
        elif overload_packet(node) in PADS:
            self.add_sink(node, number(arguments(node).get("value")) or 0.0)

    def add_sink(self, node: fx.Node, sink: float | tuple[fx.Node, Dims]) -> None:
        """A sink that is one known number, or a tensor with its dimensions.

        Raises:
            Left: the scores were shifted, there are other sinks, or masked scores are as high.
        """
        self._needs_no_shift("the sinks are")
        low, high = self._range_of(sink)
        if self.sinks is not None or is_forbidding(low) or not high < math.inf:
            text = "two sinks, or one that is infinite or as low as masked scores"
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, text, node)
        self.sinks = sink

    def _range_of(self, sink: float | tuple[fx.Node, Dims]) -> tuple[float, float]:
        """The lowest and highest constant sink; 0 for what is learned."""
        if isinstance(sink, float):
            return sink, sink
        value = trace(sink[0])[0].node
        if self._facts.source(value) not in Source.BUFFER:
            return 0.0, 0.0
        self.read.append(value)
        try:
            found = constant_value(value, {})
        except ValueError:  # a size enters it
            return -math.inf, math.inf
        return float(found.min()), float(found.max())

    # -- numbers ---------------------------------------------------------------------------------

    def constant(self, value: object) -> float | None:
        """The number that an argument is, when nothing learned or given decides it."""
        if isinstance(value, fx.Node):
            tensor = value.meta.get("val")
            allowed = Source.BUFFER
            if not isinstance(tensor, torch.Tensor) or not _is_single(tensor):
                return None
            if self._facts.source(value) & ~allowed:
                return None
            try:
                found = float(constant_value(value, {}))
            except ValueError:  # a size enters it
                return None
            self.read.append(value)
            return found
        return number(value)

    def _is_fixed(self, factor: object) -> bool:
        """A buffer may change (it is state), so as a scale it stays a multiplication."""
        if not isinstance(factor, fx.Node) or not self._facts.source(factor) & Source.BUFFER:
            return True
        return self._facts.only_lifted(factor)

    def _needs_no_masks(self, node: fx.Node, what: str) -> None:
        if self.steps or self.sinks is not None:
            raise Left(
                ReasonCode.ORDER_OF_OPS,
                f"{what} comes after the mask or bias",
                node,
                f"apply {what} to the raw scores, and the mask last",
            )

    def _needs_no_shift(self, what: str) -> None:
        """A sink or a softcap sees what the softmax alone would not.

        Raises:
            Left: a number was added to all scores, or a maximum subtracted, before.
        """
        if self.shift is not None:
            raise Left(
                ReasonCode.ORDER_OF_OPS,
                f"the scores are shifted before {what} applied",
                self.shift,
                "take the maximum over the scores and the sinks; add no number before a softcap; "
                "mask with float('-inf')",
            )

    def _meets(self, node: fx.Node, masked: float) -> None:
        """A finite number stands beside scores that may have been shifted: which is lower?

        One as low as -inf is lower, unless the scores were shifted by a number.

        Raises:
            Left: it cannot be told.
        """
        maxima = () if self.shift is None else subtracted_maximum(self.shift)
        by_number = not maxima or any(overload_packet(n) in _CLAMPS for n in maxima)
        if masked != -math.inf and (by_number or masked > hard_limit(node)):
            self._needs_no_shift("a mask with a finite number is")

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
        constant = self.constant(factor) if self._is_fixed(factor) else None
        if constant is not None:
            self.scale_by(node, 1.0 / constant if divide and constant else constant)
        elif isinstance(factor, fx.Node) and self._varies_along_keys(factor):
            self._scale_keys(node, factor, divide)
        elif self._only_filled() and (positive := self._positive(factor)) is not None:
            assert isinstance(factor, fx.Node)
            self.steps = [_scaled(s, 1 / positive if divide else positive) for s in self.steps]
            self.row_scales.append(RowScale(factor, self.dims, divide))
        else:
            self._needs_raw_scores(node, "a tensor scale")
            assert isinstance(factor, fx.Node)
            self.row_scales.append(RowScale(factor, self.dims, divide))

    def _only_filled(self) -> bool:
        """Whether there are masks, and all of them leave the other scores as they are."""
        filled = all(step.kind is MaskKind.FILL for step in self.steps)
        return filled and bool(self.steps) and self.sinks is None and not self.softcap

    def _positive(self, factor: object) -> float | None:
        """The number that a buffer holds now, if a mask may be multiplied by it."""
        found = self.constant(factor)
        return found if found is not None and 0 < found < math.inf else None

    def _scale_keys(self, node: fx.Node, factor: fx.Node, divide: bool) -> None:
        self._needs_no_shift("a factor for each key is")
        if not divide and self._facts.source(factor) in Source.BUFFER:
            self.steps.append(MaskStep(MaskKind.MULTIPLY, node, self.dims, factor))
            return
        self._needs_raw_scores(node, "a factor for each key")
        parts = list(outer_factors(factor))
        for part, below in parts:
            self._scale(node, part, divide != below)
        if not parts:
            self.key_scales.append(RowScale(factor, self.dims, divide))

    def _needs_raw_scores(self, node: fx.Node, what: str) -> None:
        """Nothing precedes but what may turn out to be products of queries and keys as well."""
        added = all(step.kind is MaskKind.ADD for step in self.steps)
        if not added or self.row_scales or self.key_scales or self.sinks is not None:
            self._needs_no_masks(node, what)
        self.early += self.steps
        self.steps = []
        if self.softcap:
            raise Left(ReasonCode.ORDER_OF_OPS, f"{what} comes after the softcap", node)

    def _varies_along_keys(self, factor: fx.Node) -> bool:
        value = factor.meta["val"]
        if not isinstance(value, torch.Tensor):
            return False
        shape = shape_of(factor)
        wide = [d for d, s in zip(self.dims[::-1], shape[::-1], strict=False) if not is_one(s)]
        return any(f.axis in self._keys for d in wide for f in resolve(d))

    def scale_by(self, node: fx.Node, factor: float) -> None:
        """The scores times a number, masks and biases included.

        Raises:
            Left: it has no meaning for a mask, or for sinks.
        """
        if self.sinks is not None:
            self._needs_no_masks(node, "a scale")
        if factor <= 0 and any(s.kind in _ONE_SIDED for s in self.steps):
            raise Left(ReasonCode.ORDER_OF_OPS, "a mask is multiplied by a negative number", node)
        if not math.isfinite(factor) or factor == 0:
            raise Left(ReasonCode.NOT_ATTENTION, f"the scores are multiplied by {factor}", node)
        self.scale *= factor
        self.softcap = abs(self.softcap * factor)  # cap * tanh(s / cap) is the same for -cap
        self.early = [_scaled(step, factor) for step in self.early]
        self.steps = [_scaled(step, factor) for step in self.steps]

    def _negate(self, node: fx.Node, carrier: fx.Node) -> None:
        del carrier
        self.scale_by(node, -1.0)

    def _tanh(self, node: fx.Node, carrier: fx.Node) -> None:
        del carrier
        if self.softcap:
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "two softcaps", node)
        self._needs_raw_scores(node, "the softcap")
        self._needs_no_shift("the softcap is")
        self.softcap = 1.0

    def _add(self, node: fx.Node, carrier: fx.Node) -> None:
        alpha = self.constant(arguments(node).get("alpha", 1))
        first, second = node.args[0], node.args[1]
        if alpha is None or (first is carrier and second is carrier):
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the scores are added to themselves", node)
        if first is carrier:
            self._add_bias(node, second, alpha)
        else:
            self._added_to(node, first, alpha)

    def _subtract(self, node: fx.Node, carrier: fx.Node) -> None:
        first, second = node.args[0], node.args[1]
        alpha = self.constant(arguments(node).get("alpha", 1))
        if first is not carrier and second is carrier and alpha is not None:
            self._added_to(node, first, -alpha)
            return
        if first is not carrier or second is carrier or alpha is None:
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the scores are subtracted here", node)
        # x - amax(x) over the keys: the softmax stays the same.
        maximum = isinstance(second, fx.Node) and bool(subtracted_maximum(node))
        if not maximum or alpha != 1 or self._varies_along_keys(second):  # type: ignore[arg-type]
            self._add_bias(node, second, -alpha)
        else:
            self.shift = node

    def _added_to(self, node: fx.Node, bias: Any, factor: float) -> None:
        """``bias + factor * scores``"""
        if factor != 1:
            self.scale_by(node, factor)
        self._add_bias(node, bias, 1.0)

    def _add_bias(self, node: fx.Node, bias: Any, coefficient: float) -> None:
        if self.sinks is not None:
            self._needs_no_masks(node, "the mask")
        if not isinstance(bias, fx.Node) or not isinstance(bias.meta["val"], torch.Tensor):
            if number(bias) != 0:
                self.shift = node  # one number on every score changes nothing under the softmax
            return
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
        if constant is None and isinstance(value, fx.Node):
            constant = _as_stored(filled_with(value), value)
        if constant is None:
            raise Left(
                ReasonCode.UNSUPPORTED_FEATURE,
                "masked scores are replaced by something that is not a known number",
                node,
                "use float('-inf') or torch.finfo(dtype).min",
            )
        self._meets(node, constant)
        self.steps.append(MaskStep(MaskKind.FILL, node, self.dims, mask, constant, inverted))

    def _maximum(self, node: fx.Node, carrier: fx.Node) -> None:
        self._floor(node, node.args[1] if node.args[0] is carrier else node.args[0])

    def _clamp(self, node: fx.Node, carrier: fx.Node) -> None:
        del carrier
        given = arguments(node)
        if given.get("max") is not None:
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the scores are clamped from above", node)
        self._floor(node, given["min"])

    def _nan_to_num(self, node: fx.Node, carrier: fx.Node) -> None:
        """Nothing, to finite scores; those that are masked with -inf become finite."""
        if self.sinks is not None or any(s.kind is not MaskKind.FILL for s in self.steps):
            raise Left(
                ReasonCode.ORDER_OF_OPS,
                "nan_to_num comes after a mask or bias that is added, or after the sinks",
                node,
                "drop it, or mask with masked_fill",
            )
        lowest = number(arguments(node).get("neginf"))
        if lowest is None:
            lowest = torch.finfo(carrier.meta["val"].dtype).min
        self._meets(node, lowest)
        numbers = [lowest if s.number == -math.inf else s.number for s in self.steps]
        self.steps = [replace(s, number=n) for s, n in zip(self.steps, numbers, strict=True)]
        self.finite = node

    def _floor(self, node: fx.Node, value: Any) -> None:
        constant = self.constant(value)
        if constant is None:
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the scores are clamped", node)
        self._meets(node, constant)
        self.steps.append(MaskStep(MaskKind.FLOOR, node, self.dims, None, constant))


def _as_stored(value: float | None, node: fx.Node) -> float | None:
    """The number as the tensor's dtype holds it."""
    return None if value is None else float(torch.tensor(value, dtype=node.meta["val"].dtype))


def _is_single(tensor: torch.Tensor) -> bool:
    return all(is_one(s) for s in tensor.shape)


def _scaled(step: MaskStep, factor: float) -> MaskStep:
    if step.kind in (MaskKind.MULTIPLY, MaskKind.CAUSAL):
        return step
    return replace(step, number=step.number * factor)


_CLAMPS = {aten.clamp, aten.clamp_min}
_ONE_SIDED = {MaskKind.FLOOR, MaskKind.CAUSAL}  # a minimum becomes a maximum


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
    aten.max: Scores._maximum,
    aten.clamp: Scores._clamp,
    aten.clamp_min: Scores._clamp,
    aten.nan_to_num: Scores._nan_to_num,
}
