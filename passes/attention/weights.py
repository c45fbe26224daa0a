"""What happens to the weights between the softmax and the product with the values.

w = dropout(w)                                    w = w[..., :-1]       a sink's column goes
w = nan_to_num(w)                                 w = w * gate          goes onto the output
w = where(isnan(w), 0, w)                         w = w * mask          the mask once more
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.errors import ReasonCode
from fxport.passes.attention.layout import Axis, Dims, LayoutError, axes_of, is_one, resolve
from fxport.passes.attention.paths import Walk
from fxport.passes.attention.products import Product, as_product, factors_of
from fxport.passes.attention.quotient import kept_by
from fxport.passes.attention.site import Apart, Left, MaskKind, MaskStep, RowScale, Torn
from fxport.passes.attention.softmax import Softmax
from fxport.passes.attention.views import (
    is_pointwise,
    moved_input,
    number,
    overload_packet,
    view_dims,
)
from fxport.passes.graph_facts import lends_shape_only, only_checks

__all__ = ["Forward", "check_dropout", "to_values"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Forward:
    """What lies between the softmax and the product with V.

    Attributes:
        nodes: in order, without the product.
        product: with the weights on its left.
        dims: of the weights as the product takes them.
        key_dim, keys: the softmax's axis.
        again: a mask at which weights are set to 0 after the softmax.
        without_nan: NaN weights, those of rows without a key, are replaced by 0.
        out_scales: factors on the weights that do not vary along the keys: they go onto the output.
    """

    nodes: tuple[fx.Node, ...]
    product: Product
    dims: Dims
    key_dim: Any
    keys: frozenset[Axis]
    dropout_p: float
    again: MaskStep | None = None
    without_nan: bool = False
    out_scales: tuple[RowScale, ...] = ()


def to_values(softmax: Softmax, walked: Walk) -> Forward:
    """Follows the weights.

    Raises:
        Left: something else happens to them, or they are not multiplied with values.
    """
    return _Follower(softmax, walked).follow()


class _Follower:
    """The weights on their way from the softmax to the values."""

    def __init__(self, softmax: Softmax, walked: Walk) -> None:
        self.softmax, self.walked = softmax, walked
        self.dims = walked.dims[-1]
        self.key_dim = resolve(self.dims[softmax.dim % len(self.dims)])
        self.has_sink = walked.sink_axis is not None
        self.dropout_p = 0.0
        self.again: MaskStep | None = None
        self.without_nan = False
        self.scales: list[RowScale] = []
        if not self.key_dim:
            raise Left(ReasonCode.NOT_ATTENTION, "this softmax is over a single element")
        if self.has_sink and [f.axis for f in self.key_dim] != [walked.sink_axis]:
            raise Left(ReasonCode.SOFTMAX_AXIS, "the softmax is not over the axis with the sinks")

    def follow(self) -> Forward:
        nodes: list[fx.Node] = []
        current = self.softmax.weights
        while True:
            tests = _nan_tests(current)
            nodes += tests
            user = _only_user(current, self.softmax, tests)
            product = as_product(user)
            if product is not None:
                break
            nodes.append(user)
            product = factors_of(user)
            if product is not None:
                break
            self._step(user, current, tests)
            current = user
        if self.has_sink:
            raise Left(
                ReasonCode.UNSUPPORTED_FEATURE, "the sink's column is not dropped after the softmax"
            )
        key_dim = resolve(self.key_dim)
        return Forward(
            nodes=tuple(nodes),
            product=_weights_left(product, current),
            dims=self.dims,
            key_dim=key_dim,
            keys=frozenset(f.axis for f in key_dim),
            dropout_p=self.dropout_p,
            again=self.again,
            without_nan=self.without_nan,
            out_scales=tuple(self.scales),
        )

    def _step(self, node: fx.Node, current: fx.Node, tests: list[fx.Node]) -> None:
        packet = overload_packet(node)
        if packet is aten.dropout:
            self._drop(node)
        elif packet is aten.slice and self.has_sink:
            self.dims = _drop_sink(node, self.walked, self.dims, self.softmax)
            self.key_dim, self.has_sink = self.walked.key_without_sink, False
        elif _replaces_nan(node, current, tests):
            self._needs_whole_weights(node)
            self.without_nan = True
        elif packet in (aten.mul, aten.div, aten.true_divide):
            self._multiply(node, current)
        elif packet is aten.neg:
            self.scales.append(RowScale(-1.0, self.dims, False))
        elif packet in (aten.masked_fill, aten.where):
            self._mask(node, current)
        else:
            self.dims = _moved(node, current, self.dims)

    def _drop(self, node: fx.Node) -> None:
        given = arguments(node)
        p = float(given["p"]) if given["train"] else 0.0
        if p and self.dropout_p:
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "dropout twice on the weights", node)
        check_dropout(p, node)
        own = axes_of([*self.walked.dims[-1], self.walked.key_without_sink])
        if p and set(axes_of(self.dims)) - set(own):
            raise Left(
                ReasonCode.UNSUPPORTED_FEATURE,
                "dropout comes after the weights are repeated: each copy drops others",
                node,
                "repeat q or the scores instead, or drop first",
            )
        self.dropout_p = p or self.dropout_p

    def _needs_whole_weights(self, node: fx.Node) -> None:
        softmax = self.softmax
        late = softmax.quotient is not None or softmax.kept is not None
        if late or self.has_sink or self.again is not None:
            raise _changed(node)

    def _multiply(self, node: fx.Node, current: fx.Node) -> None:
        divide = overload_packet(node) is not aten.mul
        first, second = node.args[:2]
        factor = second if first is current else first
        fits = first is current or (second is current and not divide)
        if not fits or factor is current or arguments(node).get("rounding_mode") is not None:
            raise _goes_elsewhere(node)
        if shape_of(node) != shape_of(current):  # a product written by hand, say
            raise _goes_elsewhere(node)
        if not self._varies_along_keys(factor):
            assert isinstance(factor, fx.Node) or number(factor) is not None
            self.scales.append(RowScale(factor, self.dims, divide))  # type: ignore[arg-type]
        elif divide:
            raise _changed(node)
        else:
            self._needs_whole_weights(node)
            self.again = MaskStep(MaskKind.KEEP, node, self.dims, factor, -math.inf)  # type: ignore[arg-type]

    def _varies_along_keys(self, factor: object) -> bool:
        if not isinstance(factor, fx.Node) or not isinstance(factor.meta["val"], torch.Tensor):
            return False
        shape = shape_of(factor)
        wide = [d for d, s in zip(self.dims[::-1], shape[::-1], strict=False) if not is_one(s)]
        keys = {f.axis for f in resolve(self.key_dim)}
        return any(f.axis in keys for d in wide for f in resolve(d))

    def _mask(self, node: fx.Node, current: fx.Node) -> None:
        kept = kept_by(node, of=current)
        if kept is None or shape_of(node) != shape_of(current):
            raise _changed(node)
        self._needs_whole_weights(node)
        self.again = MaskStep(kept.kind, node, self.dims, kept.mask, -math.inf, kept.inverted)


def _nan_tests(weights: fx.Node) -> list[fx.Node]:
    return [u for u in weights.users if overload_packet(u) is aten.isnan]


def _replaces_nan(node: fx.Node, weights: fx.Node, tests: list[fx.Node]) -> bool:
    """``nan_to_num(w)``, ``where(isnan(w), 0, w)``, ``masked_fill(w, isnan(w), 0)``"""
    if overload_packet(node) is aten.nan_to_num:
        return number(arguments(node).get("nan") or 0) == 0
    kept = kept_by(node, of=weights)
    return kept is not None and kept.mask in tests and not kept.inverted


def _only_user(node: fx.Node, softmax: Softmax, tests: list[fx.Node]) -> fx.Node:
    users = [u for u in node.users if not only_checks(u) and not lends_shape_only(node, u)]
    users = [u for u in users if u not in tests]
    if softmax.quotient is not None and node is softmax.weights:
        users = [u for u in users if u not in softmax.nodes]
    if len(users) == 1 and users[0].op != "output":
        return users[0]
    products = [u for u in users if as_product(u) is not None]
    where = next((u for u in users if u not in products), None)
    if not users or not (products or any(_leads_to_product(u) for u in users)):
        raise Apart("the softmax's result is not multiplied with values", node)
    raise Left(
        ReasonCode.WEIGHTS_USED_ELSEWHERE,
        "the attention weights are returned or used besides the product with the values",
        where if where is not None and where.op != "output" else None,
        "do not return them (need_weights=False), or accept that this attention is not fused",
    )


def _leads_to_product(node: fx.Node) -> bool:
    """Whether a product follows through casts, views, dropout and what keeps the shape."""
    for _ in range(8):
        if as_product(node) is not None or factors_of(node) is not None:
            return True
        if moved_input(node) is None and not _keeps_places(node):
            return False
        if not node.users:
            return False
        node = next(iter(node.users))
    return False


def _keeps_places(node: fx.Node) -> bool:
    return is_pointwise(node) or overload_packet(node) is aten.dropout


def check_dropout(p: float, node: fx.Node) -> None:
    """Whether the op drops with this probability.

    Raises:
        Left: nothing would be kept.
    """
    if p >= 1:
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "dropout of everything", node)


def _drop_sink(node: fx.Node, walked: Walk, dims: Dims, softmax: Softmax) -> Dims:
    given = arguments(node)
    along = given["dim"] % len(dims)
    first = given["start"] or 0
    kept = shape_of(node)[along]
    expected = 1 if walked.sink_first else 0
    if along != softmax.dim % len(dims) or first != expected or given["step"] != 1:
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the weights are sliced here", node)
    assert walked.sink_axis is not None
    if kept != walked.sink_axis.size - 1:
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the weights are sliced here", node)
    return (*dims[:along], walked.key_without_sink, *dims[along + 1 :])


def _goes_elsewhere(node: fx.Node) -> Left:
    message = f"the softmax's result goes into `{node.target}`"
    if not _values_follow(node):
        return Apart(message, node)
    return Left(ReasonCode.WEIGHTS_USED_ELSEWHERE, message, node)


def _changed(node: fx.Node) -> Left:
    message = "the weights are changed here, each in another way"
    if not _values_follow(node):
        return Apart(message, node)
    return Left(ReasonCode.UNSUPPORTED_FEATURE, message, node)


def _values_follow(node: fx.Node) -> bool:
    return _leads_to_product(node) or any(_leads_to_product(u) for u in node.users)


def _moved(node: fx.Node, current: fx.Node, dims: Dims) -> Dims:
    moved = moved_input(node)
    if moved is not current or not node.meta["val"].is_floating_point():
        raise _goes_elsewhere(node)
    try:
        return view_dims(node, dims)
    except LayoutError:
        raise Torn("the weights are reshaped across their axes", node) from None


def _weights_left(product: Product, weights: fx.Node) -> Product:
    if product.left is weights and product.right is not weights:
        found = product
    elif product.right is weights and product.left is not weights:
        a, b, out = product.labels
        found = replace(product, left=product.right, right=product.left, labels=(b, a, out))
    else:
        raise Left(
            ReasonCode.NOT_ATTENTION, "the weights are not a factor of a product", product.node
        )
    if found.added is not None or found.alpha != 1:
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "something is added to w.v", product.node)
    return found
