"""What `fxport.explain` found, as data. The text lives in `fxport.explain_text`."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property

from fxport.errors import Location, Reason
from fxport.report import Outcome

__all__ = ["Door", "Explanation", "GraphBreak", "LinearSite", "PositionSite", "Site"]


class Door(enum.StrEnum):
    """Which use of the model was explained."""

    SERVING = "serving"  # `fxport.port`: one graph for every length
    TRAINING = "training"  # `torch.compile(backend="vllm_generic")`: one call with its arguments


@dataclass(frozen=True)
class Site:
    """One softmax, what stands in its place between q.k and the values, or one call of SDPA.

    Attributes:
        outcome: REWRITTEN to ``fxport::attention``; PROVEN: no attention, stays and is right to;
            LEFT: an attention that stays as it is, `reason` says why.
        subject: ``"softmax"`` or ``"scaled_dot_product_attention"``.
        detail: what it became: mask, heads, scale and so on; "" when it stays.
        module: qualified name of the user's module, or "".
        location: the user's line of the call.
        reason: the first thing in the way (LEFT), or what the softmax is instead (PROVEN).
        notes: what makes a rewritten site slower than it could be.
    """

    outcome: Outcome
    subject: str
    detail: str = ""
    module: str = ""
    location: Location | None = None
    reason: Reason | None = None
    notes: tuple[Reason, ...] = ()


@dataclass(frozen=True)
class LinearSite:
    """How one linear would be sharded over tensor-parallel ranks.

    Attributes:
        weight: qualified name of the weight.
        sharding: the planner's word: ``"column"``, ``"row"``, ``"replicated"``, ...
        why: what decided.
        location: the user's line of the call.
    """

    weight: str
    sharding: str
    why: str = ""
    location: Location | None = None


@dataclass(frozen=True)
class PositionSite:
    """One value that depends on the position of a token in its sequence.

    Attributes:
        subject: what it is: ``"embedding table wpe.weight [64, 24]"``, ``"cos of positions"``.
        detail: what a port makes of it.
        module: qualified name of the user's module, or "".
        location: the user's line.
    """

    subject: str
    detail: str
    module: str = ""
    location: Location | None = None


@dataclass(frozen=True)
class GraphBreak:
    """A place where torch.compile ends one graph and begins another (training door only)."""

    message: str
    location: Location | None = None


@dataclass(frozen=True)
class Explanation:
    """What fxport does with a model or function, and what is in its way.

    ``str(explanation)`` is the text, at most 80 columns wide.

    Attributes:
        subject: the model's class or the function's name.
        door: which use was explained.
        sites: one per softmax or SDPA call, in the order of computation.
        linears: one per linear; None when no tensor-parallel plan was made.
        positions: one per value that depends on the position (serving door).
        obstacles: everything that refuses a port; empty when it would succeed.
        graph_breaks: training door only.
        graphs: how many graphs were looked at.
        training: what ``torch.compile`` would do in one call, where token ids were given.
    """

    subject: str
    door: Door
    sites: tuple[Site, ...] = ()
    linears: tuple[LinearSite, ...] | None = None
    positions: tuple[PositionSite, ...] = ()
    obstacles: tuple[Reason, ...] = ()
    graph_breaks: tuple[GraphBreak, ...] = ()
    graphs: int = 1
    training: Explanation | None = None

    @cached_property
    def attention(self) -> tuple[Site, ...]:
        """The sites that are attention: rewritten or left."""
        return tuple(s for s in self.sites if s.outcome is not Outcome.PROVEN)

    @property
    def rewritten(self) -> tuple[Site, ...]:
        return tuple(s for s in self.sites if s.outcome is Outcome.REWRITTEN)

    @property
    def left(self) -> tuple[Site, ...]:
        return tuple(s for s in self.sites if s.outcome is Outcome.LEFT)

    @property
    def ok(self) -> bool:
        """Whether a port would succeed; in training, whether nothing was left."""
        return not self.obstacles and (self.door is Door.SERVING or not self.left)

    @property
    def summary(self) -> str:
        """``attention 30 of 32, 2 left: mask depends on data (model.py:41)``."""
        from fxport.explain_text import attention_summary

        return attention_summary(self.sites)

    def __str__(self) -> str:
        from fxport.explain_text import explanation_text

        return explanation_text(self)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values, every site by itself."""
        from fxport.explain_text import explanation_dict

        return explanation_dict(self)
