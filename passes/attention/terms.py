"""Scores that are a sum of products, as one product over heads put end to end.

Before                                      After
    s = q1 @ k1.mT + q2 @ k2.mT * 0.5           q = cat([q1, q2 * 0.5], -1)
    s = s + mask                                k = cat([k1, k2], -1)
    out = softmax(s, -1) @ v                    out = softmax(q @ k.mT + mask, -1) @ v

As in multi-head latent attention, where k2 is one for all heads. Added to the scores the second
product would be a bias of T * T numbers per head, and no flag could stand for the mask beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from fxport.capture.arguments import arguments
from fxport.errors import ReasonCode
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.frame import Frame
from fxport.passes.attention.layout import (
    Axis,
    Dims,
    LayoutError,
    align,
    axes_of,
    conform,
    product,
    resolve_all,
)
from fxport.passes.attention.products import Contraction, as_product, contract
from fxport.passes.attention.site import Left, MaskKind, MaskStep, Match, Term
from fxport.passes.attention.trace import Step, trace
from fxport.passes.attention.views import number, overload_packet
from fxport.passes.graph_facts import GraphFacts, Source

__all__ = ["LARGEST_FACTOR", "WIDEST", "emit_terms", "is_score_like", "join_terms"]

aten = torch.ops.aten

WIDEST = 256  # the largest head that kernels take
LARGEST_FACTOR = 100.0


def join_terms(facts: GraphFacts, match: Match) -> Match:
    """Takes the biases that are products of queries and keys for the part of the scores they are.

    Only those that nothing but other biases precedes: a mask or a softcap may not be overtaken. A
    factor on some rows or keys belongs to what comes before it alone.

    Raises:
        Left: something else is added before a softcap or a factor.
    """
    terms: list[Term] = []
    for step in match.early:
        found = _terms(facts, match, step)
        if found is None or not _fits([*terms, *found], match):
            raise Left(
                ReasonCode.ORDER_OF_OPS,
                "a softcap, or a factor that is a tensor, comes after the mask or bias",
                step.node,
                "apply it to the raw scores, and the mask last",
            )
        terms += found
    if match.softcap or match.row_scales or match.key_scales:
        return replace(match, terms=tuple(terms), early=())
    rest = list(match.steps)
    for step in match.steps:
        if step.kind is not MaskKind.ADD:
            break
        found = _terms(facts, match, step)
        if found is not None and _fits([*terms, *found], match):
            terms += found
            rest.remove(step)
    return replace(match, terms=tuple(terms), steps=tuple(rest)) if terms else match


def _fits(terms: list[Term], match: Match) -> bool:
    """Where the first product is too wide for any kernel already, a bias would be no better."""
    widths = [product(axes_of(head)) for head in (match.head, *(t.head for t in terms))]
    known = [w for w in widths if isinstance(w, int)]
    return len(known) == len(widths) and (sum(known) <= WIDEST or known[0] > WIDEST)


def _terms(facts: GraphFacts, match: Match, step: MaskStep) -> list[Term] | None:
    """The products that a bias is the sum of, if it is nothing else."""
    assert step.tensor is not None
    terms: list[Term] = []
    for summand, factor in _summands(step.tensor, step.number):
        term = _term(facts, match, step.dims, summand, factor)
        if term is None:
            return None
        terms.append(term)
    return terms


def _summands(node: fx.Node, factor: float) -> Iterator[tuple[fx.Node, float]]:
    packet = overload_packet(node)
    if packet in (aten.add, aten.sub):
        left, right = node.args[:2]
        alpha = number(arguments(node).get("alpha", 1))
        if isinstance(left, fx.Node) and isinstance(right, fx.Node) and alpha:
            yield from _summands(left, factor)
            yield from _summands(right, factor * (alpha if packet is aten.add else -alpha))
            return
    yield node, factor


def _term(
    facts: GraphFacts, match: Match, scores: Dims, summand: fx.Node, factor: float
) -> Term | None:
    way = trace(summand)
    found = as_product(way[0].node)
    if found is None or found.added is not None:
        return None
    left, right = trace(found.left), trace(found.right)
    if not _is_undisturbed(facts, match, [way, left, right]):
        return None
    try:
        contraction = contract(found.labels, left[-1].dims, right[-1].dims)
        _identify(way, contraction, scores)
    except LayoutError:
        return None
    factor *= way[0].factor * found.alpha
    if not is_score_like(factor, left, right):
        return None
    for q, k in ((left, right), (right, left)):
        term = Term(q, k, resolve_all(contraction.summed), factor)
        if _is_of_this_attention(match, term):
            return term
    return None


def is_score_like(factor: float, left: tuple[Step, ...], right: tuple[Step, ...]) -> bool:
    """Whether a product has a factor like scores: -1e9 makes a mask of it, which may empty rows."""
    return abs(factor * left[0].factor * right[0].factor) <= LARGEST_FACTOR


def _identify(way: tuple[Step, ...], contraction: Contraction, scores: Dims) -> None:
    """Declares the axes of a product to be those of the scores that it is added to.

    Raises:
        LayoutError: they are not. The scores' own axes are never split.
    """
    for of_product, of_value in zip(contraction.result, way[0].dims, strict=True):
        align(of_product, of_value)
    added = way[-1].dims
    for of_scores, of_bias in zip(scores[len(scores) - len(added) :], added, strict=True):
        if of_bias:
            conform(of_scores, of_bias)


def _is_of_this_attention(match: Match, term: Term) -> bool:
    """Queries that vary as scores may, and keys that vary as the others do."""
    of_q, of_k = (axes_of(t[-1].dims, repeated=False) for t in (term.q, term.k))
    head, key = axes_of(term.head), axes_of([match.key])
    rows = axes_of(match.scores)
    shared = {
        *axes_of(match.k[-1].dims, repeated=False),
        *axes_of(match.v[-1].dims, repeated=False),
    }
    per_key = [a for a in of_k if a not in head]
    return (
        _once(head, of_q)
        and _once([*head, *key], of_k)
        and {*of_q} <= {*head, *rows}
        and {*per_key} <= {*key, *(shared & {*rows})}
    )


def _once(needed: list[Axis], given: list[Axis]) -> bool:
    return all(given.count(axis) == 1 for axis in needed)


def _is_undisturbed(facts: GraphFacts, match: Match, traces: list[tuple[Step, ...]]) -> bool:
    """Operands are read at the end of the attention, with its autograd and in its precision."""
    way, *operands = traces
    dtypes = {t[-1].node.meta["val"].dtype for t in (match.q, match.k, *operands)}
    moves = [s.node for s in way] + [s.node for t in operands for s in t[1:]]
    return (
        len(dtypes) == 1
        and Source.MUTATED not in facts.source(way[-1].node)
        and facts.grad_switched(moves, match.output) is None
    )


def emit_terms(
    emitter: Emitter, terms: tuple[Term, ...], frame: Frame, q: fx.Node, k: fx.Node, scale: float
) -> tuple[fx.Node, fx.Node]:
    """q and k with the heads of all terms behind their own; `scale` is that of the whole."""
    dtype = q.meta["val"].dtype
    queries, keys = [q], [k]
    for term in terms:
        head = tuple(axes_of(term.head))
        more_q, fq = emitter.operand(term.q, (*frame.q[:3], head), dtype)
        more_k, fk = emitter.operand(term.k, (*frame.k[:3], head), dtype)
        ratio = term.factor * fq * fk / scale
        queries.append(more_q if ratio == 1 else emitter.call(aten.mul.Tensor, more_q, ratio))
        keys.append(more_k)
    if terms:
        q, k = (emitter.call(aten.cat.default, parts, -1) for parts in (queries, keys))
    return q, k
