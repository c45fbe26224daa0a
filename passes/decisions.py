"""The attention pass's decisions as the sites of `fxport.explain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fxport.errors import ReasonCode
from fxport.explain_records import Site
from fxport.passes.attention.rewrite import MASK
from fxport.report import Decision, Outcome

__all__ = ["sites_of"]


def sites_of(decisions: Sequence[Decision]) -> tuple[Site, ...]:
    """One site per softmax or SDPA call; a mask that stays dense becomes a note on its site.

    A constant mask that no flag expresses is rewritten all the same: it is passed as a dense
    bias, exact but with memory in T * T. That is a note, not a site left behind.
    """
    sites: list[Site] = []
    for decision in decisions:
        if decision.subject == MASK:
            assert decision.reason is not None
            notes = (*sites[-1].notes, decision.reason)
            sites[-1] = replace(sites[-1], notes=notes)
        else:
            sites.append(_site(decision))
    return tuple(sites)


def _site(decision: Decision) -> Site:
    outcome, reason = decision.outcome, decision.reason
    if reason is not None and reason.code is ReasonCode.NOT_ATTENTION:
        outcome = Outcome.PROVEN
    return Site(
        outcome,
        decision.subject,
        decision.detail,
        decision.module,
        decision.location,
        reason,
    )
