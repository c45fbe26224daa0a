"""Finds an attention around a softmax: back to the product of Q and K, forward to that with V.

    q, k -> product -> scale, softcap, mask -> softmax -> dropout -> product <- v

Which axis is the key axis, which the head size, follows from what is contracted with what.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.errors import ReasonCode
from fxport.passes.attention_checks import check_closed, check_grad_mode, check_rounding
from fxport.passes.attention_layout import Axis, Dims, LayoutError, axes_of, resolve, resolve_all
from fxport.passes.attention_paths import Walk, obstacles, paths, product_behind, walk
from fxport.passes.attention_products import Contraction, Product, as_product, contract, factors_of
from fxport.passes.attention_scores import Scores
from fxport.passes.attention_site import Left, MaskKind, MaskStep, Match
from fxport.passes.attention_softmax import Softmax, subtracted_maximum
from fxport.passes.attention_views import Step, moved_input, overload_packet, trace, view_dims
from fxport.passes.graph_facts import GraphFacts, Source, lends_shape_only, only_checks

__all__ = ["match_softmax"]

aten = torch.ops.aten

_MAX_PATHS = 8  # sums of several products: more than two have not been seen


def match_softmax(facts: GraphFacts, softmax: Softmax) -> Match:
    """The attention that a softmax belongs to.

    Raises:
        Left: there is none, or it cannot be expressed.
    """
    reasons: list[Left] = []
    for count, path in enumerate(paths(softmax.scores)):
        if count == _MAX_PATHS:
            break
        try:
            return _match_path(facts, softmax, path)
        except Left as left:
            reasons.append(left)
    if not reasons:
        raise _no_product(facts, softmax.scores)
    serious = [r for r in reasons if r.code is not ReasonCode.NOT_ATTENTION]
    raise (serious or reasons)[0]


def _no_product(facts: GraphFacts, scores: fx.Node) -> Left:
    """Why no way of known operations leads from a product to the scores."""
    for obstacle in obstacles(scores):
        if any(_of_data(facts, n) for n in product_behind(obstacle)):
            return Left(
                ReasonCode.UNSUPPORTED_FEATURE,
                f"`{obstacle.target}` stands between the product of q and k and the softmax",
                obstacle,
            )
    return Left(
        ReasonCode.NOT_ATTENTION, "this softmax is not over a product of two tensors", scores
    )


def _of_data(facts: GraphFacts, node: fx.Node) -> bool:
    product = as_product(node)
    assert product is not None
    return all(Source.DATA in facts.source(n) for n in (product.left, product.right))


def _match_path(facts: GraphFacts, softmax: Softmax, path: list[fx.Node]) -> Match:
    scored = as_product(path[0])
    assert scored is not None
    left, right = trace(scored.left), trace(scored.right)
    try:
        contraction = contract(scored.labels, left[-1].dims, right[-1].dims)
    except LayoutError:
        raise Left(ReasonCode.NOT_ATTENTION, "this product is no q.k", path[0]) from None
    walked = walk(path, contraction.result)
    forward = _to_values(softmax, walked)
    q, k = _which_is_key(left, right, forward.keys, softmax)
    _check_source_of_keys(facts, k, forward)
    v = trace(forward.product.right)
    out = _contract_values(forward, v)
    scores = Scores(facts, forward.keys, scored.alpha)
    if scored.added is not None:
        scores.add_initial(path[0], scored.added, scored.beta, walked.dims[0])
    for before, node, dims in zip(path, path[1:], walked.dims[1:], strict=False):
        scores.apply(node, before, dims)
    if softmax.factor != 1:
        scores.scale_by(softmax.start, softmax.factor)
    _apply_kept(facts, scores, softmax, walked.dims[-1])
    check_grad_mode(facts, (*path, *softmax.nodes, *forward.nodes), forward.product.node)
    maxima = (n for node in path for n in subtracted_maximum(node))
    interior = (*path, *maxima, *softmax.nodes, *forward.nodes)
    output = forward.product.node
    if softmax.quotient is not None:
        interior, output = (*interior, output), softmax.quotient
    check_closed(interior, output)
    check_rounding(interior, output)
    key = forward.key_dim
    return Match(
        start=softmax.start,
        output=output,
        interior=interior,
        q=q,
        k=k,
        v=v,
        scores=tuple(d for d in _score_dims(walked) if resolve(d) != key),
        key=key,
        head=resolve_all(contraction.summed),
        value=_value_dims(out, forward, v),
        out_dims=resolve_all(out.result),
        scale=scores.scale,
        softcap=scores.softcap,
        row_scales=tuple(scores.row_scales),
        steps=_without_repeated_zero(scores, forward),
        sinks=scores.sinks,
        dropout_p=forward.dropout_p,
        # Where no key is allowed a sink takes all the weight.
        zero_rows=softmax.zero_rows
        or forward.zeroed is not None
        or (scores.sinks is not None and softmax.sink is None),
        relied_on=facts.buffers(scores.read),
    )


def _apply_kept(facts: GraphFacts, scores: Scores, softmax: Softmax, dims: Dims) -> None:
    """What is done to the exponentials before they are divided."""
    if softmax.sink is not None:
        scores.add_sink(softmax.start, softmax.sink)
    kept = softmax.kept
    if kept is None:
        return
    for step in scores.steps:
        finite = step.kind is not MaskKind.FILL or step.number != float("-inf")
        if finite and step.tensor is not None and facts.source(step.tensor) & Source.DATA:
            raise Left(
                ReasonCode.EMPTY_ROW,
                "scores are masked by data with a finite number, and the weights once more: "
                "rows without any key come out as NaN or not, as the scores will have it",
                kept.node,
                "fill the scores with float('-inf') under both masks",
            )
    scores.steps.append(MaskStep(kept.kind, kept.node, dims, kept.mask, -math.inf, kept.inverted))


def _score_dims(walked: Walk) -> Dims:
    """The scores' dimensions, the sink's column left out."""
    dims = resolve_all(walked.dims[-1])
    if walked.sink_axis is None:
        return dims
    sink = walked.sink_axis
    return tuple(
        resolve(walked.key_without_sink) if sink in [f.axis for f in d] else d for d in dims
    )


# -- forward: from the softmax to the product with V ---------------------------------------------


@dataclass(frozen=True)
class _Forward:
    """What lies between the softmax and the product with V.

    Attributes:
        nodes: in order, without the product.
        product: with the weights on its left.
        dims: of the weights as the product takes them.
        key_dim, keys: the softmax's axis.
        zeroed: a mask at which weights are set to 0 after the softmax.
    """

    nodes: tuple[fx.Node, ...]
    product: Product
    dims: Dims
    key_dim: Any
    keys: frozenset[Axis]
    dropout_p: float
    zeroed: fx.Node | None


def _to_values(softmax: Softmax, walked: Walk) -> _Forward:
    dims = walked.dims[-1]
    key_dim = resolve(dims[softmax.dim % len(dims)])
    has_sink = walked.sink_axis is not None
    if not key_dim:
        raise Left(ReasonCode.NOT_ATTENTION, "this softmax is over a single element")
    if has_sink and [f.axis for f in key_dim] != [walked.sink_axis]:
        raise Left(ReasonCode.SOFTMAX_AXIS, "the softmax is not over the axis with the sinks")
    nodes: list[fx.Node] = []
    current, dropout_p, zeroed = softmax.weights, 0.0, None
    while True:
        user = _only_user(current, softmax)
        product = as_product(user)
        if product is not None:
            break
        nodes.append(user)
        product = factors_of(user)
        if product is not None:
            break
        packet = overload_packet(user)
        if packet is aten.dropout:
            dropout_p = _dropout(user, dropout_p)
        elif packet is aten.slice and has_sink:
            dims, key_dim = _drop_sink(user, walked, dims, softmax), walked.key_without_sink
            has_sink = False
        elif packet is aten.masked_fill:
            zeroed = _zeroing(user)
        else:
            dims = _moved(user, current, dims)
        current = user
    if has_sink:
        raise Left(
            ReasonCode.UNSUPPORTED_FEATURE, "the sink's column is not dropped after the softmax"
        )
    key_dim = resolve(key_dim)
    product = _weights_left(product, current)
    keys = frozenset(f.axis for f in key_dim)
    return _Forward(tuple(nodes), product, dims, key_dim, keys, dropout_p, zeroed)


def _only_user(node: fx.Node, softmax: Softmax) -> fx.Node:
    users = [u for u in node.users if not only_checks(u) and not lends_shape_only(node, u)]
    if softmax.quotient is not None and node is softmax.weights:
        users = [u for u in users if u not in softmax.nodes]
    if len(users) == 1 and users[0].op != "output":
        return users[0]
    products = [u for u in users if as_product(u) is not None]
    where = next((u for u in users if u not in products), None)
    if not users or not (products or any(_leads_to_product(u) for u in users)):
        raise Left(
            ReasonCode.NOT_ATTENTION, "the softmax's result is not multiplied with values", node
        )
    raise Left(
        ReasonCode.WEIGHTS_USED_ELSEWHERE,
        "the attention weights are returned or used besides the product with the values",
        where if where is not None and where.op != "output" else None,
        "do not return them (need_weights=False), or accept that this attention is not fused",
    )


def _leads_to_product(node: fx.Node) -> bool:
    """Whether a product follows through casts, views and dropout."""
    for _ in range(8):
        if as_product(node) is not None or factors_of(node) is not None:
            return True
        if moved_input(node) is None and overload_packet(node) is not aten.dropout:
            return False
        if not node.users:
            return False
        node = next(iter(node.users))
    return False


def _dropout(node: fx.Node, before: float) -> float:
    given = arguments(node)
    p = float(given["p"]) if given["train"] else 0.0
    if p and before:
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "dropout twice on the weights", node)
    if p >= 1:
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "dropout of everything", node)
    return p or before


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


def _zeroing(node: fx.Node) -> fx.Node:
    given = arguments(node)
    if given["value"] != 0 or not isinstance(given["mask"], fx.Node):
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the weights are changed here", node)
    return given["mask"]


def _moved(node: fx.Node, current: fx.Node, dims: Dims) -> Dims:
    moved = moved_input(node)
    if moved is not current or not node.meta["val"].is_floating_point():
        code = ReasonCode.WEIGHTS_USED_ELSEWHERE
        if not _leads_to_product(node) and not any(_leads_to_product(u) for u in node.users):
            code = ReasonCode.NOT_ATTENTION
        raise Left(code, f"the softmax's result goes into `{node.target}`", node)
    try:
        return view_dims(node, dims)
    except LayoutError:
        raise Left(
            ReasonCode.UNSUPPORTED_FEATURE, "the weights are reshaped across their axes", node
        ) from None


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


def _contract_values(forward: _Forward, v: tuple[Step, ...]) -> Contraction:
    product = forward.product
    try:
        out = contract(product.labels, forward.dims, v[-1].dims)
    except LayoutError:
        raise Left(ReasonCode.NOT_ATTENTION, "this product is no w.v", product.node) from None
    summed = [f for d in resolve_all(out.summed) for f in d]
    if [f.axis for f in summed] != [f.axis for f in resolve(forward.key_dim)]:
        raise Left(
            ReasonCode.SOFTMAX_AXIS,
            "the softmax runs over another axis than the product with the values",
            product.node,
            "softmax over the keys: the axis that is contracted with v",
        )
    return out


def _value_dims(out: Contraction, forward: _Forward, v: tuple[Step, ...]) -> Dims:
    """What one value vector is made of: the result's dimensions that come from V alone."""
    of_weights = set(axes_of(forward.dims))
    of_v = set(axes_of(v[-1].dims))
    return tuple(
        d
        for d in resolve_all(out.result)
        if d and all(f.axis in of_v and f.axis not in of_weights for f in d)
    )


# -- checks ----------------------------------------------------------------------------------------


def _which_is_key(
    left: tuple[Step, ...], right: tuple[Step, ...], keys: frozenset[Axis], softmax: Softmax
) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """(q, k): the softmax's axis belongs to k alone."""
    for q, k in ((left, right), (right, left)):
        in_k = set(axes_of(k[-1].dims, repeated=False))
        in_q = set(axes_of(q[-1].dims))
        if keys <= in_k and not keys & in_q:
            return q, k
    raise Left(
        ReasonCode.SOFTMAX_AXIS,
        "the softmax does not run over the keys",
        softmax.start,
        "softmax over the key axis (usually dim=-1)",
    )


def _check_source_of_keys(facts: GraphFacts, k: tuple[Step, ...], forward: _Forward) -> None:
    for value in (k[0].node, forward.product.right):
        if facts.source(value) & Source.DATA:
            return
    raise Left(ReasonCode.NOT_ATTENTION, "keys and values are parameters: a memory look-up")


def _without_repeated_zero(scores: Scores, forward: _Forward) -> tuple[Any, ...]:
    """After the softmax the mask may be applied again: that only makes empty rows zero."""
    if forward.zeroed is not None:
        fills = [s for s in scores.steps if s.kind is MaskKind.FILL]
        same = len(fills) == len(scores.steps) == 1 and fills[0].tensor is forward.zeroed
        if not same or fills[0].inverted:
            raise Left(
                ReasonCode.UNSUPPORTED_FEATURE,
                "the weights are masked with another mask than the scores",
                forward.zeroed,
            )
    return tuple(scores.steps)
