"""Where attentions may be: every softmax of a graph, written as one call or out in full.

softmax(x)     log_softmax(x).exp()     e = exp(x - amax(x)); e / sum(e)     (e @ v) / sum(e)
exp(x - logsumexp(x))     p = softmax(x) * mask; p / sum(p)     e / (sum(e) + 1)
e = exp2(x); e / sum(e)   e * sum(e).reciprocal()               e / sum(e).clamp(min=1e-9)
exp(x) / sum(exp(x))
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.computed_twice import computed_again
from fxport.passes.attention.layout import resolve_all
from fxport.passes.attention.logsum import given_back, log_sum_of
from fxport.passes.attention.made import filled_with, is_zero, power_of
from fxport.passes.attention.quotient import (
    Denominator,
    Kept,
    denominator_of,
    divides_rows,
    division_of,
    fills_of,
    kept_by,
)
from fxport.passes.attention.site import MaskKind, Shift
from fxport.passes.attention.views import SCALES, is_cast, number, overload_packet

__all__ = [
    "PlacedSink",
    "Softmax",
    "is_softmax_call",
    "softmaxes",
    "subtracted_maximum",
    "subtracts_whole",
]

aten = torch.ops.aten

_CALLS = {aten.softmax, aten._softmax, aten.special_softmax, aten._safe_softmax}
_LOGS = {aten.log_softmax, aten._log_softmax, aten.special_log_softmax}
_MAXIMA = {aten.amax, aten.max}
_CLAMPS = {aten.clamp, aten.clamp_min}
_NOT = {aten.logical_not, aten.bitwise_not}
_QUOTIENTS = {aten.div, aten.true_divide, aten.mul}


PlacedSink: TypeAlias = float | tuple[fx.Node, tuple[int | None, ...]]


@dataclass(frozen=True)
class Softmax:
    """One softmax.

    Attributes:
        start: the node it is reported by.
        scores: what it is taken of.
        weights: its result.
        dim: the axis, maybe negative.
        nodes: the nodes it consists of.
        zero_rows: gives zeros where everything is -inf, instead of NaN.
        quotient: the division by the sum, when it comes after the product with the values;
            `weights` are then not divided yet.
        kept: a mask on the exponentials.
        sink: a number that stands beside every row's scores without a value of its own, or a tensor
            of them and the dimensions of the scores that its own are, None for size 1.
        factor: on the scores: the exponentials may have another base than e.
        shift: of the scores.
    """

    start: fx.Node
    scores: fx.Node
    weights: fx.Node
    dim: int
    nodes: tuple[fx.Node, ...]
    zero_rows: bool = False
    quotient: fx.Node | None = None
    kept: Kept | None = None
    sink: PlacedSink | None = None
    factor: float = 1.0
    shift: Shift = Shift.ROW


def is_softmax_call(node: fx.Node) -> bool:
    return overload_packet(node) in _CALLS | _LOGS


def softmaxes(graph: fx.Graph) -> Iterator[Softmax]:
    """Every softmax, in graph order, that is no part of a larger one.

    The graph must not change in between.
    """
    found = list(_candidates(graph))
    parts = {n for s in found for n in s.nodes if n is not s.start}
    yield from (s for s in found if s.start not in parts)


def _candidates(graph: fx.Graph) -> Iterator[Softmax]:
    for node in graph.nodes:
        found = _whole_softmax(node)
        if found is not None:
            yield found


def _exponential_of_log(node: fx.Node) -> Softmax | None:
    log = node.args[0]
    if not isinstance(log, fx.Node):
        return None
    if overload_packet(log) in _LOGS and len(log.users) == 1:
        given = arguments(log)
        return Softmax(log, given["self"], node, given["dim"], (log, node))
    return _less_its_logsumexp(node, log)


def _less_its_logsumexp(node: fx.Node, shifted: fx.Node) -> Softmax | None:
    """``exp(x - logsumexp(x, dim, keepdim=True))``"""
    if overload_packet(shifted) is not aten.sub or arguments(shifted).get("alpha", 1) != 1:
        return None
    scores, total = shifted.args[:2]
    if not isinstance(scores, fx.Node) or not isinstance(total, fx.Node):
        return None
    found = log_sum_of(total, scores)
    if found is None:
        return None
    nodes = (*found.nodes, shifted, node)
    sink = _placed(found)
    # Beside a sum's logarithm of -1e9 there is no room for what is left of it.
    return Softmax(node, scores, node, found.dim, nodes, sink=sink, shift=Shift.NONE)


def _quotient(node: fx.Node) -> Softmax | None:
    """``e / e.sum(dim, keepdim=True)`` with ``e = exp(x)``, or ``(e @ v) / e.sum(..)``."""
    division = division_of(node)
    under = denominator_of(division[1]) if division is not None else None
    if division is None or under is None:
        return None
    top, _, between = division
    weights = under.summed
    kept = kept_by(weights)
    source = weights if kept is None else kept.before
    under = _without_idle(under, source, kept)
    exponent = _exponent(source, under)
    if exponent is None or not _bound_is_idle(exponent[0], under, kept):
        return None
    scores, factor, inner = exponent
    nodes = (*inner, *((weights,) if kept is not None else ()), *under.nodes, *between)
    sink = _placed(under)
    if under.maximum is not None:
        shifted = given_back(scores, under.maximum, under.dim)
        if shifted is None or factor != 1:
            return None
        scores, more = shifted
        nodes = (*more, *nodes)
    # A row without a key has sums of 0, which the bound makes zeros of.
    zeroed = bool(under.bound) and any(map(_or_zero, subtracted_maximum(scores)))
    quiet = _beside_sink(under) or zeroed
    whole = _whole_softmax(source) is not None
    shift = Shift.ROW if whole or _is_shifted(scores, under.dim) else Shift.NONE
    again = () if weights is top else computed_again(top, weights)
    if again is not None:
        if not under.in_place:
            return None
        nodes = (*again, *nodes, node)
        return Softmax(node, scores, node, under.dim, nodes, quiet, None, kept, sink, factor, shift)
    if not divides_rows(top, under):
        return None
    return Softmax(node, scores, weights, under.dim, nodes, quiet, node, kept, sink, factor, shift)


def _exponent(
    source: fx.Node, under: Denominator
) -> tuple[fx.Node, float, tuple[fx.Node, ...]] | None:
    """What the weights before any mask are the exponentials of, up to a factor for each row.

    Also the factor on it that makes e their base, and the nodes.
    """
    inner = _whole_softmax(source)
    if inner is not None:
        whole = inner.sink is None and inner.kept is None and inner.quotient is None
        same = inner.dim % len(shape_of(source)) == under.dim
        fits = whole and same and under.sink is None and under.maximum is None
        return (inner.scores, inner.factor, inner.nodes) if fits else None
    power = power_of(source)
    return None if power is None else (*power, (source,))


def _whole_softmax(node: fx.Node) -> Softmax | None:
    """The softmax that a node is the result of."""
    packet = overload_packet(node)
    if packet in _CALLS:
        given = arguments(node)
        zero_rows = packet is aten._safe_softmax
        return Softmax(node, given["self"], node, given["dim"], (node,), zero_rows)
    if packet is aten.exp:
        return _exponential_of_log(node)
    return _quotient(node) if packet in _QUOTIENTS else None


def _bound_is_idle(scores: fx.Node, under: Denominator, kept: Kept | None) -> bool:
    """Where the largest exponential is 1 their sum is never below that (or it is NaN)."""
    if not under.bound:
        return True
    if kept is not None and not _masked_before(scores, kept):
        return False  # the largest exponential may be what is set to 0
    return under.bound < 1 and _has_a_one(scores, under.dim)


def _without_idle(under: Denominator, source: fx.Node, kept: Kept | None) -> Denominator:
    """Drops a number that is lost when it is added to a sum of 1 or more: ``sum(e) + 1e-9``.

    Args:
        source: the exponentials, or a softmax that is divided by its own sum.
    """
    if not isinstance(under.sink, float) or under.maximum is not None:
        return under
    power = power_of(source)
    if power is None:
        known = kept is None and _whole_softmax(source) is not None
    else:
        # The largest exponential may be what is set to 0.
        known = _has_a_one(power[0], under.dim) and (kept is None or _masked_before(power[0], kept))
    # Half of the last digit of 1 is eps / 2; a softmax may sum to a little less than 1.
    lost = torch.finfo(under.summed.meta["val"].dtype).eps / 8
    return replace(under, sink=None) if known and math.exp(under.sink) < lost else under


def _has_a_one(scores: fx.Node, dim: int) -> bool:
    """Whether the largest exponential of every row is 1 (or NaN)."""
    plain = not any(overload_packet(n) in _CLAMPS for n in subtracted_maximum(scores))
    return plain and arguments(scores).get("alpha", 1) == 1 and _subtracts(scores, dim)


def _subtracts(scores: fx.Node, dim: int) -> bool:
    """Whether these are ``x - amax(x, dim)``."""
    reductions = [n for n in subtracted_maximum(scores) if overload_packet(n) in _MAXIMA]
    along = arguments(reductions[0]).get("dim") if len(reductions) == 1 else None
    dims = [along] if isinstance(along, int) else list(along or ())
    return [d % len(shape_of(scores)) for d in dims] == [dim]


def _is_shifted(scores: fx.Node, dim: int) -> bool:
    """The same, up to a number and the precision."""
    while not _subtracts(scores, dim):
        scaled = overload_packet(scores) in SCALES and number(scores.args[1]) is not None
        before = scores.args[0] if scaled or is_cast(scores) else None
        if not isinstance(before, fx.Node):
            return False
        scores = before
    return True


def _masked_before(shifted: fx.Node, kept: Kept) -> bool:
    """Whether the scores are -inf already where their exponentials are set to 0."""
    scores = shifted.args[0]
    if not isinstance(scores, fx.Node) or kept.kind is not MaskKind.FILL:
        return False
    for _, mask, value, inverted in fills_of(scores)[:1]:
        low = filled_with(value) if isinstance(value, fx.Node) else number(value)
        if mask is kept.mask and inverted == kept.inverted and low == -math.inf:
            return True
    return False


def _placed(under: Denominator) -> PlacedSink | None:
    """The sink, with the dimensions of the scores that its own are."""
    if under.sink is None or isinstance(under.sink, float):
        return under.sink
    column, dims = under.sink
    rank = len(shape_of(column)) if isinstance(column.meta.get("val"), torch.Tensor) else 0
    of = list(resolve_all(under.of))
    places = [of.index(d) if d in of and d else None for d in resolve_all(dims)]
    return column, tuple(places[len(places) - rank :])


def _beside_sink(under: Denominator) -> bool:
    """Whether a row without a key has zeros: what is subtracted is never as low."""
    if under.sink is None or under.maximum is None:
        return under.sink is not None
    bounded = overload_packet(under.maximum) is aten.maximum
    return bounded and isinstance(under.sink, tuple) and under.sink[0] in under.maximum.args


def subtracted_maximum(scores: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes of the maximum in ``x - amax(x)``, which changes no softmax; () otherwise.

    Over the keys, or of all scores at once.
    """
    if overload_packet(scores) is not aten.sub or not isinstance(scores.args[1], fx.Node):
        return ()
    known = {*_MAXIMA, *_CLAMPS, aten.detach, aten.unsqueeze}
    found: list[fx.Node] = []
    node: object = scores.args[1]
    while isinstance(node, fx.Node) and node is not scores.args[0]:
        bounded = _or_zero(node)
        if bounded is not None:
            node, inner = bounded
            found.extend(inner)
            continue
        first = node.target is operator.getitem and node.args[1] == 0
        if not first and overload_packet(node) not in known:
            return ()
        found.append(node)
        node = node.args[0]
    kept = [n for n in found if _keeps_dimension(n)]
    return tuple(found) if kept else ()


def _or_zero(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """(m, the nodes) of ``where(isfinite(m), m, 0)`` or ``masked_fill(m, isinf(m), 0)``."""
    for maximum, asked, other, keeps in fills_of(node)[:1]:
        if not isinstance(asked, fx.Node) or not is_zero(other):
            continue
        nodes = [node, asked, *([other] if isinstance(other, fx.Node) else [])]
        while overload_packet(asked) in _NOT and isinstance(asked.args[0], fx.Node):
            asked, keeps = asked.args[0], not keeps
            nodes.append(asked)
        wanted = aten.isfinite if keeps else aten.isinf
        if overload_packet(asked) is wanted and maximum is asked.args[0]:
            assert isinstance(maximum, fx.Node)
            return maximum, tuple(nodes)
    return None


def _keeps_dimension(node: fx.Node) -> bool:
    packet = overload_packet(node)
    if node.target is operator.getitem or packet is aten.unsqueeze:
        return True
    if packet not in _MAXIMA:
        return False
    given = arguments(node)
    of_all = given.get("dim") in (None, [], ())
    return of_all or bool(given["keepdim"])


def subtracts_whole(scores: fx.Node) -> bool:
    """Whether these are ``x - x.max()``, the maximum of all scores."""
    reductions = [n for n in subtracted_maximum(scores) if overload_packet(n) in _MAXIMA]
    return any(arguments(n).get("dim") in (None, [], ()) for n in reductions)
