"""What the attention pass says: the record of a site, and the decisions of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxport.capture.location import module_of, user_location
from fxport.errors import Reason, ReasonCode
from fxport.ops.params import AttentionParams
from fxport.passes.attention.flex import is_flex
from fxport.passes.attention.frame import Frame
from fxport.passes.attention.layout import Size, axes_of, product
from fxport.passes.attention.masks import MaskPlan
from fxport.passes.attention.sdpa import is_sdpa
from fxport.passes.attention.site import AttentionSite, Match
from fxport.report import Decision, Outcome

__all__ = ["MASK", "WRITTEN_AS", "mask_decisions", "rewritten", "site_of", "stays"]

_PASS = "attention"
WRITTEN_AS = "fxport_written_as"  # in the meta of a softmax: the call that it stands for
# Subject of the decision that follows a site whose constant mask stays dense.
MASK = "mask"


def site_of(
    match: Match, frame: Frame, plan: MaskPlan, params: AttentionParams, dense: bool
) -> AttentionSite:
    heads = [match.head, *(term.head for term in match.terms)]
    return AttentionSite(
        module=module_of(match.start),
        location=user_location(match.start),
        params=params,
        mask=str(plan.band),
        bias=plan.origin if dense else "",
        heads=product(frame.heads),
        kv_heads=product(frame.kv_heads),
        head_dim=_sum([product(axes_of(h)) for h in heads]),
        value_dim=product(frame.value),
        sinks=match.sinks is not None,
        alibi=plan.slopes is not None,
        relied_on=tuple(sorted({*plan.relied_on, *match.relied_on})),
        above=plan.above,
        finite=match.finite is not None,
        spread=plan.spread,
    )


def _sum(sizes: Sequence[Size]) -> Size:
    total: Any = sum(sizes)
    return int(total) if isinstance(total, int) or total.is_Integer else total


def rewritten(node: fx.Node, site: AttentionSite) -> Decision:
    return Decision(_PASS, Outcome.REWRITTEN, _subject(node), str(site), site.module, site.location)


def stays(node: fx.Node, reason: Reason) -> Decision:
    where = user_location(node)
    return Decision(_PASS, Outcome.LEFT, _subject(node), "", module_of(node), where, reason)


def _subject(node: fx.Node) -> str:
    if is_flex(node):
        return "flex_attention"
    default = "scaled_dot_product_attention" if is_sdpa(node) else "softmax"
    return str(node.meta.get(WRITTEN_AS, default))


def mask_decisions(match: Match, plan: MaskPlan, site: AttentionSite) -> list[Decision]:
    """A constant mask that stays dense is reported: it needs memory in T * T."""
    if not plan.unproven:
        return []
    node = plan.dense[-1].node
    reason = Reason(
        ReasonCode.MASK_NOT_PROVEN,
        f"the mask stays a dense tensor: {plan.unproven}",
        user_location(node) or site.location,
        "write it so that it depends on positions and constants only",
    )
    return [Decision(_PASS, Outcome.LEFT, MASK, "", site.module, site.location, reason)]
