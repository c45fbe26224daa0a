"""``torch.compile(model, backend="vllm_generic")``: flash attention in forward and backward.

    Dynamo's graph -> lower -> training_pipeline -> Inductor

Found through the entry point ``torch_dynamo_backends``; nobody needs to import fxport.
"""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch._dynamo.exc import ShortenTraceback

from fxport.backends.inductor import check_options, compile_with_inductor
from fxport.backends.relied import watch_buffers
from fxport.capture.dynamo import lower
from fxport.capture.location import location_of_stack
from fxport.capture.trace import first_line
from fxport.errors import FxportWarning, PortError, Reason, ReasonCode
from fxport.explain_records import Site
from fxport.explain_text import left_text
from fxport.passes.decisions import sites_of
from fxport.passes.pipeline import training_pipeline
from fxport.report import Outcome

__all__ = ["vllm_generic"]


def vllm_generic(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compiles a graph that Dynamo captured, with every attention that can be proven rewritten.

    Args:
        gm: Dynamo's graph; not changed when nothing is rewritten.
        example_inputs: one value per placeholder.
        options: ``strict``: raise when an attention is left as it was, or may be where Dynamo
            breaks the graph off (default False). An attention whose constant mask no flag
            expresses is rewritten with a dense bias: slower, not left, so it is warned about and
            does not raise. Where Dynamo gives a function up before its first operation no backend
            is asked: `fxport.explain` says so;
            ``inductor``: options for Inductor, by its names.
        mode: as for Inductor: ``"max-autotune"``, ``"reduce-overhead"`` and so on.

    Warns:
        FxportWarning: once per compilation, with a summary, when something was left as it was
            or is slower than it could be, and where Dynamo broke the graph off; silent when all
            is well.

    Raises:
        PortError: ``strict``, and an attention was left as it was, or the graph was broken off.
        ValueError: an unknown option or mode.
        FxportError: on a later call, when a buffer that a proof relied on has changed.
    """
    chosen = _Options.parse(options, mode)
    lowered = lower(gm)
    result = training_pipeline(lowered.graph)
    sites = sites_of(result.decisions)
    broken_off = _broken_off(gm)
    if chosen.strict:
        _refuse(sites, broken_off)
    untraced = [d.reason for d in lowered.decisions if d.reason is not None] + broken_off
    if result.sites:
        graph = lowered.graph
        relied_on = {name for site in result.sites for name in site.relied_on}
        del lowered, result
        gc.collect()  # the graphs dropped are cycles: they would stay, beside Inductor's own peak
        compiled = compile_with_inductor(graph, example_inputs, chosen.inductor)
        compiled = watch_buffers(compiled, gm=graph, names=relied_on)
    else:
        compiled = compile_with_inductor(gm, example_inputs, chosen.inductor)
    # Not earlier: Dynamo may restart the compilation from within Inductor.
    if untraced or any(s.outcome is Outcome.LEFT or s.notes for s in sites):
        text = f"vllm_generic: {left_text(sites, untraced)}"
        warnings.warn(text, FxportWarning, stacklevel=2)
    return compiled


def _broken_off(gm: fx.GraphModule) -> list[Reason]:
    """Where Dynamo ended the graph before forward did: what it does not resume, no pass sees."""
    ended = getattr(gm, "compile_subgraph_reason", None)
    if ended is None or not ended.graph_break:
        return []
    said = f"torch.compile breaks the graph here ({first_line(ended.reason)})"
    reason = Reason(
        ReasonCode.CAPTURE_FAILED,
        f"{said}, and attention after it may stay as it is",
        location_of_stack(ended.user_stack),
        "keep it out of forward; fxport.explain(model, tokens) says what is left",
    )
    return [reason]


@dataclass(frozen=True)
class _Options:
    strict: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None) -> _Options:
        from torch._inductor import list_mode_options

        given = dict(options or {})
        strict = given.pop("strict", False)
        inductor = given.pop("inductor", {})
        if given:
            names = ", ".join(sorted(map(repr, given)))
            raise ValueError(
                f"vllm_generic has no option {names}; it knows 'strict' (bool) and "
                "'inductor' (a dict of Inductor's options)"
            )
        if not isinstance(strict, bool) or not isinstance(inductor, Mapping):
            raise ValueError("vllm_generic: 'strict' is a bool, 'inductor' a dict")
        check_options(inductor)
        preset: Mapping[str, Any] = list_mode_options(mode) if mode else {}
        return cls(strict, {**preset, **inductor})


class _StrictPortError(PortError, ShortenTraceback):
    """A PortError that reaches the user as it is: Dynamo wraps any other exception."""

    def __init__(self, reasons: Sequence[Reason]) -> None:
        here = inspect.currentframe()
        raised_in = here.f_back if here else None  # Dynamo hides the frames before this one
        ShortenTraceback.__init__(self, str(PortError(reasons)), first_useful_frame=raised_in)
        self.reasons = tuple(reasons)


def _refuse(sites: Sequence[Site], broken_off: Sequence[Reason]) -> None:
    """A dense mask is no reason: that attention was rewritten, exactly; it is warned about."""
    reasons = [s.reason for s in sites if s.outcome is Outcome.LEFT and s.reason is not None]
    reasons += broken_off
    if reasons:
        raise _StrictPortError(reasons)
