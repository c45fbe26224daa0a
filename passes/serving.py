"""From a captured model to the graphs that vLLM runs: the serving passes in order.

capture -> known values -> look-ups -> taken rows -> head -> sinks -> attention -> fixed keys
-> token locality (proof) -> positions -> experts -> split
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import fx

from fxport.capture.arguments import shape_of
from fxport.capture.export import Captured
from fxport.capture.gradients import let_gradients_pass
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.recurrence import convolutions_over
from fxport.capture.walk import Walked
from fxport.diff.stages import Recorder, Stage
from fxport.errors import FxportError, PortError, Reason, ReasonCode
from fxport.passes.attention.lse import sinks_as_columns
from fxport.passes.attention.rewrite import rewrite_attention
from fxport.passes.axes import Axes, Axis, Symbols
from fxport.passes.constants import depends_on
from fxport.passes.decisions import sites_of
from fxport.passes.dtypes import held_apart, serving_dtype
from fxport.passes.empty_parts import drop_empty_parts
from fxport.passes.experts.loops import run_chosen_experts
from fxport.passes.experts.products import multiply_by_expert
from fxport.passes.fixed_keys import attend_to_fixed_keys
from fxport.passes.functional import functionalise
from fxport.passes.head import (
    Head,
    as_rewritten,
    between,
    find_head,
    no_projection,
    uses_of,
)
from fxport.passes.known_values import fold_known_values
from fxport.passes.limits import longest_sequence
from fxport.passes.lookups import look_up_first
from fxport.passes.masked_caches import read_by_causal_attention, read_under_masks
from fxport.passes.obstacles import obstacles
from fxport.passes.positions import gather_by_position
from fxport.passes.split import (
    Splitter,
    attention_layers,
    begins_with_rows,
    ends_in_rows,
    rows_of,
    token_embedding,
)
from fxport.passes.table_lookups import look_up_in_tables
from fxport.passes.taken_rows import name_taken_rows
from fxport.passes.tokens.locality import Locality, analyse
from fxport.report import Decision, Outcome
from fxport.serving import ServingGraph

__all__ = ["Lowered", "lower_for_serving"]


@dataclass(frozen=True)
class Lowered:
    """The serving graph and how it came about."""

    serving: ServingGraph
    decisions: tuple[Decision, ...]
    stages: tuple[Stage, ...] = ()


def lower_for_serving(
    captured: Captured, max_seq_len: int | None, stated: int | None = None
) -> Lowered:
    """Runs the serving passes on a captured model; the captured graph is changed.

    Args:
        captured: from `fxport.capture.export.capture`.
        max_seq_len: the longest sequence to serve; None for the longest that the model allows.
        stated: the length that the model's configuration names, for a model that bounds none.

    Raises:
        PortError: with every obstacle that the failing stage found.
        FxportError: `max_seq_len` is beyond what the model allows.
    """
    gm = captured.graph
    untrainable = (*captured.untrainable, *let_gradients_pass(gm, captured.length))
    captured = dataclasses.replace(captured, untrainable=untrainable)
    symbols = Symbols(captured.batch, captured.length)
    recorder = Recorder(gm)
    if convolutions := convolutions_over(gm, captured.length):
        raise PortError(convolutions)
    with recorder.stage("functionalise") as stage:
        caches = read_under_masks(gm, symbols)
        functionalise(gm)
        stage.note(caches)
    with recorder.stage("known values"):
        drop_empty_parts(gm)
        fold_known_values(gm, stored=True)
    tokens = next(n for n in gm.graph.nodes if n.name == captured.tokens)
    with recorder.stage("look-ups"):
        look_up_in_tables(gm, tokens)
        look_up_first(gm, tokens)
    limit = longest_sequence(gm, captured.length, captured.limit)
    max_seq_len, length_decision = _choose_length(limit, max_seq_len, stated, captured.walked)
    with recorder.stage("taken rows"):
        name_taken_rows(gm)
    with recorder.stage("head") as stage:
        head = find_head(gm, captured.length)
        stage.note(head.decisions)
    with recorder.stage("sinks"):
        sinks_as_columns(gm)
    uses = uses_of(head)
    with recorder.stage("attention") as stage:
        attention = rewrite_attention(gm, assume_spread=True)
        caches = (*caches, *read_by_causal_attention(gm, symbols))
        fixed = attend_to_fixed_keys(gm, symbols)
        stage.note((*attention.decisions, *fixed))
    head = as_rewritten(head, uses)
    _no_attention_in(head, gm)
    embedding = token_embedding(tokens)
    locality = analyse(gm, symbols, max_seq_len)
    reasons = obstacles(gm, sites_of(attention.decisions), locality)
    if not reasons:
        reasons = _check_output(locality, head.logits) + _check_short_lengths(captured)
    if reasons:
        raise PortError(reasons)
    forms = tuple(rows_of(n, locality.axes[n]) for n in (embedding, head.hidden))
    with recorder.stage("positions") as stage:
        positions, gathered = gather_by_position(gm, locality, tokens)
        stage.note(gathered)
    with recorder.stage("experts") as stage:
        experts = (*run_chosen_experts(gm), *multiply_by_expert(gm))
        stage.note(experts)
    serving = _split(captured, gm, tokens, positions, embedding, head, forms, max_seq_len)
    proven = Decision(
        "token locality",
        Outcome.PROVEN,
        f"{len(locality.axes)} operations",
        "every operation outside attention treats each token on its own",
    )
    decisions = (
        length_decision,
        *caches,
        *head.decisions,
        *map(_as_proven, attention.decisions),
        *fixed,
        proven,
        *gathered,
        *experts,
        *_untrainable(untrainable),
    )
    return Lowered(serving, decisions, recorder.stages)


def _untrainable(reasons: tuple[Reason, ...]) -> tuple[Decision, ...]:
    """That `fxport.load(directory).module` refuses to be trained, and why."""
    return tuple(
        Decision(
            "capture", Outcome.LEFT, "training of a loaded port", location=r.location, reason=r
        )
        for r in reasons
    )


def _no_attention_in(head: Head, gm: fx.GraphModule) -> None:
    """vLLM's head sees single tokens; what was chosen for the last one stays so for each."""
    data = depends_on(gm, InputKind.DATA)
    computed = between(head.start, head.logits, data)
    target = torch.ops.fxport.attention.default
    if any(node.target is target for node in computed):
        inputs = [n for n in head.logits.all_input_nodes if n in data]
        raise PortError([no_projection(head.logits, len(inputs))])


def _as_proven(decision: Decision) -> Decision:
    """A softmax that is no attention (a router) was proven token-local: nothing was missed."""
    reason = decision.reason
    if reason is None or reason.code is not ReasonCode.NOT_ATTENTION:
        return decision
    detail = f"stays as it is: {reason.message}"
    return dataclasses.replace(decision, outcome=Outcome.PROVEN, detail=detail, reason=None)


def _check_output(locality: Locality, logits: fx.Node) -> list[Reason]:
    axes = locality.axes[logits]
    if axes[:-1] in (((Axis.BATCH,), (Axis.TOKEN,)), ((), (Axis.TOKEN,))):
        return []
    return [
        Reason(ReasonCode.NO_LOGITS, f"the output is made of {axes}; expected [B, T, vocabulary]")
    ]


def _check_short_lengths(captured: Captured) -> list[Reason]:
    if captured.shortest == 2:
        return []
    return [
        Reason(
            ReasonCode.LENGTH_SPECIALISED,
            f"forward takes another path for lengths below {captured.shortest}",
            captured.length_line,
            "make every length take the same path",
        )
    ]


# Used when nothing in the model bounds the length: tables are made up to here.
_UNBOUNDED_LENGTH = 4096


def _choose_length(
    found: int | None, wanted: int | None, stated: int | None, walked: Walked | None
) -> tuple[int, Decision]:
    if wanted is not None and wanted < 1:
        raise FxportError(f"max_seq_len must be positive, not {wanted}")
    if found is not None and wanted is not None and wanted > found:
        at_most = f"the model allows at most {found} tokens"
        if walked is not None and found == walked.longest:
            at_most = f"forward takes the length as a plain number, and was seen up to {found}"
        raise FxportError(f"max_seq_len={wanted}, but {at_most}")
    length = wanted or found or stated or _UNBOUNDED_LENGTH
    if wanted:
        detail = f"{length} tokens, as asked for"
    elif found:
        detail = f"{length} tokens, found in the model"
    elif stated:
        detail = f"{length} tokens, as the model's config says; its code bounds no length"
    else:
        detail = f"{length} tokens: nothing in the model bounds the length (see max_seq_len)"
    return length, Decision("length", Outcome.PROVEN, "longest sequence", detail)


def _split(
    captured: Captured,
    gm: fx.GraphModule,
    tokens: fx.Node,
    positions: fx.Node,
    embedding: fx.Node,
    ends: Head,
    forms: tuple[Axes | None, ...],
    max_seq_len: int,
) -> ServingGraph:
    hidden, logits = ends.hidden, ends.logits
    looked_up, last = forms
    width = _width(hidden, last)
    constants: dict[str, torch.Tensor] = {}

    def constant_name(node: fx.Node) -> str:
        name = f"fxport_constants.{node.target}"
        constants[name] = gm.get_buffer(str(node.target))
        return name

    layers = attention_layers(gm)
    split = Splitter(gm, tokens, constant_name)
    embed = split.part([("input_ids", tokens)], embedding, ("input_ids", 1))
    body = split.part(
        [("embeddings", embedding), ("positions", positions), ("input_ids", tokens)],
        hidden,
        ("positions", 0),
    )
    head = split.part([("hidden", hidden)], logits, ("hidden", 1))
    if looked_up is not None:
        ends_in_rows(embed, ("input_ids", 1), _width(embedding, looked_up))
        begins_with_rows(body, "embeddings", looked_up)
    if last is not None:
        ends_in_rows(body, ("positions", 0), width)
        begins_with_rows(head, "hidden", last)
    inputs = {
        graph_input(n).name: graph_input(n)
        for n in gm.graph.nodes
        if n.op == "placeholder" and "input" in n.meta
    }
    used = {name for p in (embed, body, head) for name in p.weights.values()}
    learned = sorted(used & set(captured.parameters))
    dtype = serving_dtype(gm, captured.parameters)
    for name in used - set(constants):
        if inputs[name].kind is InputKind.BUFFER:
            value = inputs[name].value
            assert value is not None
            constants[name] = value
    return ServingGraph(
        embed=embed,
        body=body,
        head=head,
        attention=layers,
        constants=constants,
        parameters={n: tuple(captured.parameters[n].shape) for n in learned},
        aliases=dict(captured.aliases),
        unused=tuple(sorted(set(captured.state) - used - set(captured.aliases))),
        vocab_size=int(shape_of(logits)[-1]),
        hidden_size=width,
        max_position_embeddings=max_seq_len,
        dtype=dtype,
        dtypes=held_apart(captured.parameters, learned, dtype),
        untrainable=tuple(str(reason) for reason in captured.untrainable),
    )


def _width(state: fx.Node, form: Axes | None) -> int:
    """How many features each token has."""
    sizes = shape_of(state) if form is None else (f for dim in form for f in dim)
    return math.prod(s for s in sizes if isinstance(s, int))
