"""Finds an attention around a softmax: back to the product of Q and K, forward to that with V.

    q, k -> product -> scale, softcap, mask -> softmax -> dropout -> product <- v

Which axis is the key axis, which the head size, follows from what is contracted with what.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import fx

from fxport.errors import ReasonCode
from fxport.passes.attention.checks import check_closed, check_grad_mode, check_rounding
from fxport.passes.attention.factors import is_gate, is_truth, with_value_scales
from fxport.passes.attention.fill_twice import same_fill
from fxport.passes.attention.frame import frame_of, query_axes
from fxport.passes.attention.layout import (
    Axis,
    Dims,
    LayoutError,
    axes_of,
    own_dims,
    resolve,
    resolve_all,
)
from fxport.passes.attention.learned import is_learned_product
from fxport.passes.attention.paths import Walk, obstacles, paths, product_behind, walk
from fxport.passes.attention.products import Contraction, as_product, contract, sums_products
from fxport.passes.attention.scores import Scores
from fxport.passes.attention.site import Apart, Left, MaskKind, MaskStep, Match, Shift, Torn
from fxport.passes.attention.softmax import PlacedSink, Softmax, subtracted_maximum, subtracts_whole
from fxport.passes.attention.terms import is_score_like, join_terms
from fxport.passes.attention.trace import Step, as_it_is, trace
from fxport.passes.attention.weights import Forward, to_values
from fxport.passes.graph_facts import GraphFacts, Source

__all__ = ["match_softmax"]

aten = torch.ops.aten

_Look: TypeAlias = Callable[[fx.Node], tuple[Step, ...]]
_MAX_PATHS = 8  # sums of several products: more than two have not been seen


def match_softmax(facts: GraphFacts, softmax: Softmax) -> Match:
    """The attention that a softmax belongs to.

    Raises:
        Left: there is none, or it cannot be expressed.
    """
    ways = list(itertools.islice(paths(softmax.scores), _MAX_PATHS))
    if not ways:
        raise _no_product(facts, softmax.scores)
    reasons: list[Left] = []
    found: list[Match] = []
    for path in ways:
        try:
            found.append(_match_joined(facts, softmax, path))
        except Left as left:
            reasons.append(left)
    serious = [r for r in reasons if r.code is not ReasonCode.NOT_ATTENTION]
    match = _widest(found) if found else None
    if match is None:
        raise (serious or reasons)[0]
    if _hides_keys(match):
        raise (serious or [_no_scores(match)])[0]
    _check_kept(facts, softmax, match)
    return match


def _hides_keys(match: Match) -> bool:
    """Whether the product is a mask and what is added to it the scores.

    A number beside the product is let go, and ``(same - 1) * 1e9 + s`` needs it in float32.
    """
    return not is_score_like(match.scale, match.q, match.k) and any(s.adds for s in match.steps)


def _no_scores(match: Match) -> Left:
    return Left(
        ReasonCode.NOT_ATTENTION,
        f"scores are added to a product times {match.scale:g}, which hides keys like a mask",
        match.start,
    )


def _match_joined(facts: GraphFacts, softmax: Softmax, path: list[fx.Node]) -> Match:
    try:
        match = _match_path(facts, softmax, path, trace)
    except Torn:  # no axes are both what repeated keys are made of and what the weights become
        match = _match_path(facts, softmax, path, as_it_is)
    return join_terms(facts, match)


def _widest(found: list[Match]) -> Match:
    """Of several products the one that most others are added to, without keys for every query."""
    if len(found) == 1:
        return found[0]
    query = _queries_at(max(found, key=lambda match: len(query_axes(match))))
    fits = [m for m in found if _queries_at(m) == query and is_score_like(m.scale, m.q, m.k)]
    return max(fits, key=lambda match: len(match.terms), default=found[0])


def _queries_at(match: Match) -> int | None:
    """Which dimension of the scores the queries are in."""
    try:
        (query,) = frame_of(match).query
    except Left:
        return None
    return next(i for i, dim in enumerate(match.scores) if query in axes_of([dim]))


def _no_product(facts: GraphFacts, scores: fx.Node) -> Left:
    """Why no way of known operations leads from a product to the scores."""
    for obstacle in obstacles(scores):
        if sums_products(obstacle) and len(_data_of(facts, obstacle)) > 1:
            return Left(
                ReasonCode.UNSUPPORTED_FEATURE,
                f"the scores come from `{obstacle.target}`, which is not read as q.k here",
                obstacle,
            )
        if any(_of_data(facts, n) for n in product_behind(obstacle)):
            return Left(
                ReasonCode.UNSUPPORTED_FEATURE,
                f"`{obstacle.target}` stands between the product of q and k and the softmax",
                obstacle,
            )
    return Apart("this softmax is not over a product of two tensors", scores)


def _data_of(facts: GraphFacts, node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if Source.DATA in facts.source(n)]


def _of_data(facts: GraphFacts, node: fx.Node) -> bool:
    product = as_product(node)
    assert product is not None
    return all(Source.DATA in facts.source(n) for n in (product.left, product.right))


def _match_path(facts: GraphFacts, softmax: Softmax, path: list[fx.Node], look: _Look) -> Match:
    scored = as_product(path[0])
    assert scored is not None
    left, right = look(scored.left), look(scored.right)
    try:
        contraction = contract(scored.labels, left[-1].dims, right[-1].dims)
    except LayoutError:
        raise Left(ReasonCode.NOT_ATTENTION, "this product is no q.k", path[0]) from None
    walked = walk(path, contraction.result)
    forward = to_values(softmax, walked)
    q, k = _which_is_key(left, right, forward.keys, softmax)
    _check_source_of_keys(facts, k, forward)
    v = trace(forward.product.right)
    out = _contract_values(facts, forward, v)
    scores = Scores(facts, forward.keys, scored.alpha)
    if scored.added is not None:
        scores.add_initial(path[0], scored.added, scored.beta, walked.dims[0])
    for before, node, dims in zip(path, path[1:], walked.dims[1:], strict=False):
        scores.apply(node, before, dims)
    if softmax.factor != 1:
        scores.scale_by(softmax.start, softmax.factor)
    _apply_kept(facts, scores, softmax, walked.dims[-1])
    zeroed, again = _masked_again(facts, scores, forward)
    check_grad_mode(facts, (*path, *softmax.nodes, *forward.nodes), forward.product.node)
    maxima = (n for node in path for n in subtracted_maximum(node))
    interior = (*path, *maxima, *softmax.nodes, *forward.nodes)
    output = forward.product.node
    if softmax.quotient is not None:
        interior, output = (*interior, output), softmax.quotient
    check_closed(interior, output)
    check_rounding(interior, output, path[0], v[-1].node)
    key = forward.key_dim
    match = Match(
        start=softmax.start,
        output=output,
        interior=interior,
        q=q,
        k=k,
        v=v,
        scores=tuple(d for d in _score_dims(walked) if resolve(d) != key),
        key=key,
        head=resolve_all(contraction.summed),
        # Copies of the weights are no other weights: where they were repeated, values differ.
        value=own_dims(out.result, v[-1].dims, _score_dims(walked)),
        out_dims=resolve_all(out.result),
        scale=scores.scale,
        softcap=scores.softcap,
        row_scales=tuple(scores.row_scales),
        key_scales=tuple(scores.key_scales),
        early=tuple(scores.early),
        steps=tuple(scores.steps),
        sinks=scores.sinks,
        dropout_p=forward.dropout_p,
        # Where no key is allowed a sink takes all the weight.
        zero_rows=softmax.zero_rows
        or zeroed
        or (scores.sinks is not None and softmax.sink is None),
        infinite_rows=softmax.zero_rows and not zeroed and scores.sinks is None,
        again=again,
        without_nan=forward.without_nan,
        out_scales=forward.out_scales,
        shift=Shift.WHOLE if any(map(subtracts_whole, path)) else softmax.shift,
        relied_on=facts.buffers(scores.read),
        finite=scores.finite,
    )
    _check_unmixed(facts, match, path[0])
    return with_value_scales(match)


def _apply_kept(facts: GraphFacts, scores: Scores, softmax: Softmax, dims: Dims) -> None:
    """What is done to the exponentials before they are divided."""
    if softmax.sink is not None:
        scores.add_sink(softmax.start, _sink(softmax.sink, dims))
    kept = softmax.kept
    if kept is None:
        return
    step = MaskStep(kept.kind, kept.node, dims, kept.mask, -math.inf, kept.inverted)
    open_ = kept.kind is MaskKind.KEEP and facts.source(kept.mask) not in Source.BUFFER
    if open_ and (is_truth(kept.mask) or is_gate(kept.mask)):
        step = replace(step, logarithm=True)
    scores.steps.append(step)


def _check_kept(facts: GraphFacts, softmax: Softmax, match: Match) -> None:
    """What is added to the scores is known by now: further products are no masks.

    Raises:
        Left: exponentials are masked, and the scores by the data before, with a finite number.
    """
    kept = softmax.kept
    if kept is None:
        return
    for step in match.steps:
        finite = step.kind is not MaskKind.FILL or step.number != float("-inf")
        if not finite or step.tensor is None or step.node is kept.node:
            continue
        if facts.source(step.tensor) & Source.DATA:
            raise Left(
                ReasonCode.EMPTY_ROW,
                "scores are masked by data with a finite number, and the weights once more: "
                "rows without any key come out as NaN or not, as the scores will have it",
                kept.node,
                "fill the scores with float('-inf') under both masks",
            )


def _sink(sink: PlacedSink, dims: Dims) -> float | tuple[fx.Node, Dims]:
    if isinstance(sink, float):
        return sink
    column, places = sink
    return column, tuple(() if place is None else dims[place] for place in places)


def _score_dims(walked: Walk) -> Dims:
    """The scores' dimensions, the sink's column left out."""
    dims = resolve_all(walked.dims[-1])
    if walked.sink_axis is None:
        return dims
    sink = walked.sink_axis
    return tuple(
        resolve(walked.key_without_sink) if sink in [f.axis for f in d] else d for d in dims
    )


# -- the values ------------------------------------------------------------------------------------


def _contract_values(facts: GraphFacts, forward: Forward, v: tuple[Step, ...]) -> Contraction:
    product = forward.product
    try:
        out = contract(product.labels, forward.dims, v[-1].dims)
    except LayoutError:
        raise Left(ReasonCode.NOT_ATTENTION, "this product is no w.v", product.node) from None
    summed = [f for d in resolve_all(out.summed) for f in d]
    if [f.axis for f in summed] != [f.axis for f in resolve(forward.key_dim)]:
        if not facts.source(product.right) & Source.DATA:
            raise _mixed("weights", product.node)
        raise Left(
            ReasonCode.SOFTMAX_AXIS,
            "the softmax runs over another axis than the product with the values",
            product.node,
            "softmax over the keys: the axis that is contracted with v",
        )
    return out


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


def _check_unmixed(facts: GraphFacts, match: Match, product: fx.Node) -> None:
    """What was taken for keys may be scores, and what for queries a matrix that mixes heads."""
    scores = as_product(match.k[0].node) is not None and _of_data(facts, match.k[0].node)
    learned = not facts.source(match.q[0].node) & Source.DATA
    if scores and learned and not query_axes(match):
        raise _mixed("scores", product)


def _mixed(what: str, node: fx.Node) -> Left:
    return Left(
        ReasonCode.UNSUPPORTED_FEATURE,
        f"a product with something learned or constant mixes the {what} of different heads",
        node,
        "no kernel has it: mix the heads of the output instead",
    )


def _check_source_of_keys(facts: GraphFacts, k: tuple[Step, ...], forward: Forward) -> None:
    values = (k[0].node, forward.product.right)
    if any(facts.source(value) & Source.DATA for value in values):
        return
    if any(facts.source(value) & Source.MUTATED for value in values):
        raise Left(
            ReasonCode.MUTATED_IN_PLACE,
            "keys or values are written into a tensor part by part, which is not followed here",
            forward.product.node,
            "torch.cat or torch.stack the parts",
        )
    raise Left(ReasonCode.NOT_ATTENTION, "keys and values are parameters: a memory look-up")


def _masked_again(
    facts: GraphFacts, scores: Scores, forward: Forward
) -> tuple[bool, MaskStep | None]:
    """After the softmax the mask may be applied again: that only makes empty rows zero.

    Whether it is that same mask, or else the mask, which is still to be shown to change nothing.
    """
    again, steps = forward.again, scores.steps
    if again is None:
        fills = all(s.kind is MaskKind.FILL and s.number == -math.inf for s in steps)
        return forward.without_nan and bool(steps) and fills, None
    same = bool(steps) and same_fill(steps[-1], again)
    # what else is added to the scores must leave no row without a key
    same = same and all(s.adds and is_learned_product(facts, s.tensor) for s in steps[:-1])
    return (True, None) if same else (False, again)
