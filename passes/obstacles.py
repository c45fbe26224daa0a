"""What keeps a graph from vLLM, said where the user can change it.

an attention that was left         why it was left, not that it mixes tokens
a mask of the tokens' values       where they enter the mask, not that it has two token axes
anything else                      as the proof of token locality has it
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxport.capture.arguments import arguments
from fxport.capture.inputs import InputKind
from fxport.capture.location import user_location
from fxport.errors import Location, Reason, ReasonCode
from fxport.explain_records import Site
from fxport.passes.constants import depends_on, is_symbolic
from fxport.passes.tokens.locality import Locality
from fxport.report import Outcome

__all__ = ["obstacles"]


def obstacles(gm: fx.GraphModule, sites: Sequence[Site], locality: Locality) -> list[Reason]:
    """Every reason why the graph cannot be served; empty when token locality is proven."""
    if not locality.reasons:
        return []
    left = [s for s in sites if s.outcome is Outcome.LEFT]
    biases, lines = _dense_biases(gm)
    reasons = [s.reason for s in left if s.reason is not None]
    reasons += biases
    reasons += [note for s in sites for note in s.notes]
    for reason in locality.reasons:
        if not _follows(reason, left) and _line(reason.location) not in lines:
            reasons.append(reason)
    return reasons or list(locality.reasons)


def _dense_biases(gm: fx.GraphModule) -> tuple[list[Reason], set[tuple[str, int] | None]]:
    """Attentions whose mask is a tensor, which vLLM cannot express, and the lines that make it.

    The reason is put where data or a parameter enters the mask: its constant part is harmless.
    """
    data, learned = depends_on(gm, InputKind.DATA), depends_on(gm, InputKind.PARAMETER)
    reasons: list[Reason] = []
    lines: set[tuple[str, int] | None] = set()
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.fxport.attention.default):
        bias = arguments(node)["bias"]
        if bias is None:
            continue
        if bias not in data | learned:  # constant: the pass said why no flag expresses it
            lines |= {_line(user_location(n)) for n in _made_of(bias, set())[0]}
            continue
        varying = data if bias in data else learned
        made, enters = _made_of(bias, varying)
        lines |= {_line(user_location(n)) for n in made if n not in data}
        what = "depends on data" if varying is data else "is learned"
        reason = Reason(
            ReasonCode.MASK_DATA_DEPENDENT if varying is data else ReasonCode.UNSUPPORTED_FEATURE,
            f"the mask or bias of an attention {what}, which vLLM's attention cannot express",
            user_location(enters) or user_location(node),
            "use a mask of positions alone: causal, a window, ALiBi (vLLM's sequences hold no "
            "padding: forward may leave a mask of padding out)",
        )
        reasons.append(reason)
    return list(dict.fromkeys(reasons)), lines


def _made_of(bias: fx.Node, varying: set[fx.Node]) -> tuple[set[fx.Node], fx.Node]:
    """What a mask is computed from, and the last operation that `varying` enters it by."""
    made, pending, enters = {bias}, [bias], bias
    joined = False
    while pending:
        node = pending.pop(0)
        inputs = [n for n in node.all_input_nodes if not is_symbolic(n)]
        mixed = node in varying and any(n not in varying for n in inputs)
        if mixed and not joined:
            enters, joined = node, True
        for source in inputs:
            if source not in made and source.op == "call_function":
                made.add(source)
                pending.append(source)
    return made, enters


def _line(location: Location | None) -> tuple[str, int] | None:
    return (location.file, location.line) if location is not None else None


def _follows(reason: Reason, left: Sequence[Site]) -> bool:
    """An attention that was left mixes tokens: why it was left says more than that it does."""
    here = reason.location
    return here is not None and any(
        s.location is not None
        and (s.location.file, s.location.function) == (here.file, here.function)
        for s in left
    )
