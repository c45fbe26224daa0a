"""Replaces every softmax attention that can be proven to be one by ``fxport::attention``.

Before                                            After
    kt = transpose(k, -2, -1)                         a = fxport::attention(q, k, v, scale=0.125,
    s = matmul(q, kt) * 0.125                                               causal=True)
    s = masked_fill(s, buffer[..:T, :T] == 0, -inf)   out = a[0]
    p = dropout(softmax(s, -1))
    out = matmul(p, v)

Found by meaning (`match`): which axes are contracted decides, not how it is written.
Masks are proven (`masks`); what is not proven stays a dense bias. Everything else stays as it
was, with a reason.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import fx

import fxport.ops.attention  # noqa: F401  (registers the op)
from fxport.capture.arguments import arguments
from fxport.capture.listed_places import fill_listed_places
from fxport.errors import ReasonCode
from fxport.ops.params import AttentionParams
from fxport.passes.attention.bias import emit_checks, emit_dense, emit_row_scales, restore_nan
from fxport.passes.attention.broadcasts import spell_out_meshgrids, spread_by_the_operation
from fxport.passes.attention.chains import spell_out_chains
from fxport.passes.attention.checks import check_grad_mode
from fxport.passes.attention.cosines import write_out_cosines
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.factors import emit_key_scales
from fxport.passes.attention.fills import spell_out_fills
from fxport.passes.attention.flex import (
    FlexCall,
    erase_calls,
    flex_calls,
    put_back,
    write_out,
)
from fxport.passes.attention.frame import Frame, frame_of
from fxport.passes.attention.layout import product
from fxport.passes.attention.made import power_of
from fxport.passes.attention.masks import MaskPlan, plan_masks
from fxport.passes.attention.match import match_softmax
from fxport.passes.attention.ones import sums_apart
from fxport.passes.attention.parts import join_scores
from fxport.passes.attention.records import (
    MASK,
    WRITTEN_AS,
    mask_decisions,
    rewritten,
    site_of,
    stays,
)
from fxport.passes.attention.repeats import spell_out_repeats
from fxport.passes.attention.respelled import Respelled
from fxport.passes.attention.sdpa import is_sdpa, match_sdpa
from fxport.passes.attention.sinks import emit_sinks
from fxport.passes.attention.site import Apart, AttentionSite, Left, MaskKind, Match
from fxport.passes.attention.softmax import Softmax, is_softmax_call, softmaxes
from fxport.passes.attention.spread import respell_uses
from fxport.passes.attention.terms import emit_terms, join_terms
from fxport.passes.attention.trace import trace
from fxport.passes.attention.unread import Unread, may_be_unread, unread_scores
from fxport.passes.attention.views import is_pointwise, moved_input
from fxport.passes.attention.vmapped import vmapped_softmaxes
from fxport.passes.attention.written import hold_what_is_written
from fxport.passes.attention.zero_keys import zero_keys_as_sinks
from fxport.passes.graph_facts import GraphFacts, erase_dead, erase_if_unused
from fxport.passes.inplace import without_inplace
from fxport.passes.masks.prover import Prover
from fxport.report import Decision

__all__ = ["MASK", "AttentionResult", "AttentionSite", "rewrite_attention"]

aten = torch.ops.aten


@dataclass(frozen=True)
class AttentionResult:
    """What the pass did to one graph.

    Attributes:
        sites: the attentions rewritten, in graph order.
        decisions: one per softmax, SDPA or FlexAttention call, and one per mask not proven.
    """

    sites: tuple[AttentionSite, ...]
    decisions: tuple[Decision, ...]


def rewrite_attention(
    gm: fx.GraphModule, *, check_scores: bool = False, assume_spread: bool = False
) -> AttentionResult:
    """Rewrites a graph of either door in place.

    The new call nodes carry their `AttentionSite` in ``meta["attention"]``.

    Args:
        check_scores: where a mask forbids only while scores stay above some number, check it
            whenever the graph runs; otherwise the site says that it is assumed.
        assume_spread: where a mask adds a number such as -1e4, take it for what it is meant to
            be; the site says how far scores may differ for that. Otherwise it is a bias.
    """
    decisions = [stays(node, left.reason(node)) for node, left in vmapped_softmaxes(gm.graph)]
    started = any(_may_start(n) or may_be_unread(gm, n) for n in gm.graph.nodes)
    if not started and not flex_calls(gm.graph):
        return AttentionResult((), tuple(decisions))
    without_inplace(gm)
    hold_what_is_written(gm)
    flex = _write_out_flex(gm, decisions)
    erase_dead(gm)
    fill_listed_places(gm)
    spell_out_meshgrids(gm)
    spell_out_fills(gm)
    spell_out_chains(gm)
    spell_out_repeats(gm)
    spread_by_the_operation(gm)
    write_out_cosines(gm)
    facts = GraphFacts(gm)
    prover = Prover(facts)
    respelled = [*sums_apart(gm, facts), *join_scores(gm, facts)]
    starts = _starts(gm.graph)
    softmaxes = [s for s in starts if isinstance(s, Softmax)]
    unread = unread_scores(facts, softmaxes)
    decisions += [stays(node, left.reason(node)) for node, left in unread.reported]
    respelled += respell_uses(gm, facts, softmaxes)
    sites: dict[fx.Node, AttentionSite] = {}
    said: dict[fx.Node, list[Decision]] = {}
    pending = starts
    while pending:
        again = []
        for start in pending:
            node = _reported_at(start)
            try:
                match = _match(facts, start)
                site, more = _rewrite(gm, facts, prover, match, check_scores, assume_spread)
            except Left as left:
                unseen = unread.between.get(node) if _sees_no_scores(unread, node, left) else None
                said[node] = [stays(node, (unseen or left).reason(node))]
                if left.code is ReasonCode.WEIGHTS_USED_ELSEWHERE:
                    again.append(start)
                continue
            sites[node] = site
            said[node] = [rewritten(node, site), *more]
        # One attention may have been what used the scores of another.
        pending = again if len(again) < len(pending) else []
    _put_back(gm, respelled, starts, flex, sites)
    if sites:
        gm.recompile()
    in_order = [_reported_at(start) for start in starts]
    decisions += [decision for node in in_order for decision in said[node]]
    found = tuple(sites[node] for node in in_order if node in sites)
    return AttentionResult(found, tuple(decisions))


def _sees_no_scores(unread: Unread, node: fx.Node, left: Left) -> bool:
    if isinstance(left, Apart):
        return True
    return left.code is ReasonCode.NOT_ATTENTION and node in unread.of_pairs


def _put_back(
    gm: fx.GraphModule,
    respelled: list[Respelled],
    starts: list[Softmax | fx.Node],
    flex: dict[fx.Node, FlexCall],
    sites: Collection[fx.Node],
) -> None:
    """What was spelled in another way for attentions that were left."""
    gone = {s.weights for s in starts if isinstance(s, Softmax) and s.start in sites}
    for uses in respelled:
        if not uses.weights & gone:
            uses.put_back(gm)
    for node in [n for n in flex if n not in sites]:
        put_back(gm, flex.pop(node))
    erase_calls(gm, flex.values())


def _match(facts: GraphFacts, start: Softmax | fx.Node) -> Match:
    if isinstance(start, Softmax):
        return match_softmax(facts, start)
    return join_terms(facts, match_sdpa(facts, start))


def _reported_at(start: Softmax | fx.Node) -> fx.Node:
    return start.start if isinstance(start, Softmax) else start


def _write_out_flex(gm: fx.GraphModule, decisions: list[Decision]) -> dict[fx.Node, FlexCall]:
    """FlexAttention calls written out, by their softmax."""
    found: dict[fx.Node, FlexCall] = {}
    for node in flex_calls(gm.graph):
        try:
            call = write_out(gm, node)
        except Left as left:
            decisions.append(stays(node, left.reason(node)))
            continue
        call.softmax.meta[WRITTEN_AS] = "flex_attention"
        found[call.softmax] = call
    return found


def _may_start(node: fx.Node) -> bool:
    return is_sdpa(node) or is_softmax_call(node) or power_of(node) is not None


def _starts(graph: fx.Graph) -> list[Softmax | fx.Node]:
    found: list[Softmax | fx.Node] = list(softmaxes(graph))
    found += [n for n in graph.nodes if is_sdpa(n)]
    return sorted(found, key=_reported_at)


def _rewrite(
    gm: fx.GraphModule,
    facts: GraphFacts,
    prover: Prover,
    match: Match,
    check_scores: bool,
    assume_spread: bool,
) -> tuple[AttentionSite, list[Decision]]:
    emitter = _emitter(gm, match)
    try:
        return _rewritten(emitter, facts, prover, match, check_scores, assume_spread)
    except Left:
        emitter.undo()
        raise


def _emitter(gm: fx.GraphModule, match: Match) -> Emitter:
    traced = [s.node for trace in (match.q, match.k, match.v) for s in trace]
    return Emitter(gm, match.output, [*traced, *match.interior])


def _rewritten(
    emitter: Emitter,
    facts: GraphFacts,
    prover: Prover,
    match: Match,
    check_scores: bool,
    assume_spread: bool,
) -> tuple[AttentionSite, list[Decision]]:
    match = zero_keys_as_sinks(emitter, facts, prover, match)
    _check_unwritten(facts, match)
    moves = [*match.q[1:], *match.k[1:], *match.v[1:]]
    moves += trace(match.sinks[0])[1:] if isinstance(match.sinks, tuple) else ()
    check_grad_mode(facts, [step.node for step in moves], match.output)
    frame = frame_of(match)
    plan = plan_masks(prover, facts, match, frame, assume_spread=assume_spread)
    _check_blocks(match, plan)
    call, replacement, site = _emit(emitter, match, frame, plan, check_scores)
    call.meta["attention"] = site
    facts.add(emitter.made, match.output)
    match.output.replace_all_uses_with(replacement)
    _loosen_views(replacement)
    erase_if_unused(emitter.gm, [match.output])
    return site, mask_decisions(match, plan, site)


def _check_blocks(match: Match, plan: MaskPlan) -> None:
    """FlexAttention's GPU kernels skip what its mask forbids; a dense mask skips nothing.

    Raises:
        Left: the call is faster as it is.
    """
    on_cpu = match.output.meta["val"].device.type == "cpu"
    written_as = match.start.meta.get(WRITTEN_AS)
    fill = next((s.node for s in plan.dense if s.kind is MaskKind.FILL), None)
    if fill is not None and written_as == "flex_attention" and not on_cpu:
        raise Left(
            ReasonCode.MASK_DATA_DEPENDENT if plan.origin == "data" else ReasonCode.MASK_NOT_PROVEN,
            "no flag says this mask, and FlexAttention skips the blocks that it forbids",
            fill,
            "keep FlexAttention here; or pack documents by cu_seqlens (fxport.ops.attention)",
        )


def _loosen_views(value: fx.Node) -> None:
    """The op's result has other strides than a product's: what views it may have to copy."""
    pending = [value]
    while pending:
        for user in list(pending.pop().users):
            if user.target is aten.view.default:
                shape = arguments(user)["size"]
                user.target = aten.reshape.default
                user.args, user.kwargs = (user.args[0], shape), {}
            # A pointwise result may be laid out as its input is.
            follows = moved_input(user) is not None or is_pointwise(user)
            if follows and user not in pending:
                pending.append(user)


def _check_unwritten(facts: GraphFacts, match: Match) -> None:
    """Operands are read at the end of the attention now: nothing may write into them before."""
    read = [(s.node, steps[0].node) for steps in (match.q, match.k, match.v) for s in steps]
    scales = (*match.row_scales, *match.key_scales, *match.value_scales, *match.out_scales)
    factors = [s.factor for s in scales]
    for value, first in [*read, *((f, f) for f in factors if isinstance(f, fx.Node))]:
        write = facts.written_between(value, first, match.output)
        if write is not None:
            raise Left(
                ReasonCode.MUTATED_IN_PLACE,
                "q, k, v or a factor is changed in place before the attention is complete",
                write,
                "use the out-of-place operation",
            )


def _emit(
    emitter: Emitter, match: Match, frame: Frame, plan: MaskPlan, check_scores: bool
) -> tuple[fx.Node, fx.Node, AttentionSite]:
    dtype = _compute_dtype(match)
    (q, fq), (k, fk), (v, fv) = (
        emitter.operand(trace, wanted, dtype)
        for trace, wanted in ((match.q, frame.q), (match.k, frame.k), (match.v, frame.v))
    )
    if fv != 1:
        v = emitter.call(aten.mul.Tensor, v, fv)
    scale = match.scale * fq * fk
    q, k = emit_terms(emitter, match.terms, frame, q, k, scale)
    q = emit_row_scales(emitter, q, match.row_scales, frame)
    k = emit_key_scales(emitter, k, match.key_scales, frame)
    v = emit_key_scales(emitter, v, match.value_scales, frame)
    dense = emit_dense(emitter, plan, frame, dtype)
    if dense.empty is not None:
        q = emitter.call(aten.masked_fill.Scalar, q, dense.empty, 0.0)
    params = _params(match, plan, frame, scale)
    slopes = _slopes(emitter, plan.slopes, frame, q) if plan.slopes is not None else None
    sinks = emit_sinks(emitter, match.sinks, frame) if match.sinks is not None else None
    seed = _seed(emitter, q) if params.dropout_p else None
    call = emitter.call(
        torch.ops.fxport.attention.default, q, k, v, dense.bias, sinks, slopes, None, seed,
        params.scale, params.causal, params.window_left, params.window_right, params.softcap,
        params.dropout_p, _q_offset(emitter, plan, frame), 0, params.chunk,
    )  # fmt: skip
    out = emitter.call(operator.getitem, call, 0)
    if dense.nan_rows:
        lse = emitter.call(operator.getitem, call, 1)
        out = restore_nan(emitter, out, lse, call, dense.nan_in_scores)
    out = emit_row_scales(emitter, out, match.out_scales, frame)
    checked = check_scores and (plan.above is not None or match.finite is not None)
    if checked:
        lse = emitter.call(operator.getitem, call, 1)
        emit_checks(emitter, lse, plan, match)
    wanted = [tuple(f.axis for f in dim) for dim in match.out_dims]
    out = emitter.relayout(out, frame.out, wanted)
    if out.meta["val"].dtype != match.output.meta["val"].dtype:
        out = emitter.call(aten.to.dtype, out, match.output.meta["val"].dtype)
    site = site_of(match, frame, plan, params, dense.bias is not None)
    return call, out, replace(site, checked=checked)


def _compute_dtype(match: Match) -> torch.dtype:
    """The dtype of q, k and v in the op.

    An upcast before the products is dropped if all three come from one narrower dtype and the
    result goes back to it: products of bf16 numbers are exact in float32, where the op adds them.
    """
    dtypes = [trace[-1].node.meta["val"].dtype for trace in (match.q, match.k, match.v)]
    narrow = dtypes[2]
    traces = [match.q, match.k, match.v, *(t for term in match.terms for t in (term.q, term.k))]
    stored = [[s.node.meta["val"].dtype for s in trace] for trace in traces]
    if match.output.meta["val"].dtype == narrow and all(narrow in found for found in stored):
        return narrow
    wide = dtypes[0]
    for dtype in dtypes[1:]:
        wide = torch.promote_types(wide, dtype)
    return wide


def _params(match: Match, plan: MaskPlan, frame: Frame, scale: float) -> AttentionParams:
    band = plan.band
    causal = band.upper == 0
    offset = 0
    if band.from_end:
        difference = product(frame.key) - product(frame.query)
        offset = difference if isinstance(difference, int) else 0
    return AttentionParams(
        scale=scale,
        causal=causal,
        window_left=-1 if band.lower is None else -band.lower,
        window_right=-1 if causal or band.upper is None else band.upper,
        softcap=match.softcap,
        dropout_p=match.dropout_p,
        q_offset=offset,
        chunk=band.chunk or 0,
    )


def _q_offset(emitter: Emitter, plan: MaskPlan, frame: Frame) -> int | fx.Node:
    if not plan.band.from_end:
        return 0
    return emitter.size(product(frame.key) - product(frame.query))


def _slopes(emitter: Emitter, value: torch.Tensor, frame: Frame, q: fx.Node) -> fx.Node:
    found = q.meta["val"]
    dtype = torch.promote_types(found.dtype, torch.float32)
    return emitter.for_each_head("alibi_slopes", value.to(found.device, dtype), frame)


def _seed(emitter: Emitter, q: fx.Node) -> fx.Node:
    return emitter.call(
        aten.randint.low, 0, 2**62, [1], dtype=torch.int64, device=q.meta["val"].device
    )
