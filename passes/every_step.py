"""What it costs that values of weights alone are made anew for every step of serving.

    w = lora_b @ lora_a + base       [C, C], made again for every token that is generated
    linear(x, w)

The original does so too; but nobody who serves expects it. Small values are not worth a line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fxport.capture.location import module_of, user_location
from fxport.errors import Location, Reason, ReasonCode
from fxport.report import Decision, Outcome
from fxport.serving import Part, ServingGraph

__all__ = ["every_step_records"]

# a matrix of 256 x 256: reading it is what one linear layer of a small model costs a token
_NUMBERS = 2**16


@dataclass
class _Work:
    module: str
    values: int = 0
    numbers: int = 0


def every_step_records(serving: ServingGraph) -> tuple[Decision, ...]:
    """One record for each of the user's lines that makes large values of weights alone."""
    lines: dict[Location | None, _Work] = {}
    for part in (serving.embed, serving.body, serving.head):
        for node in _of_weights(part):
            work = lines.setdefault(user_location(node), _Work(module_of(node)))
            work.values += 1
            work.numbers += _numbers(node)
    return tuple(_record(line, work) for line, work in lines.items())


def _of_weights(part: Part) -> Iterator[fx.Node]:
    """What computes a large value, and no token flows into."""
    alone: set[fx.Node] = set()
    for node in part.graph.nodes:
        if node.op == "placeholder":
            known = node.name in part.weights
        else:
            known = bool(node.all_input_nodes) and all(n in alone for n in node.all_input_nodes)
        if node.op == "output" or not known:
            continue
        alone.add(node)
        if node.op == "call_function" and not _moves_nothing(node) and _numbers(node) >= _NUMBERS:
            yield node


def _moves_nothing(node: fx.Node) -> bool:
    """A view, or one of several results."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    alias = [r.alias_info for r in node.target._schema.returns]
    return any(a is not None and not a.is_write for a in alias)


def _numbers(node: fx.Node) -> int:
    made = node.meta.get("val")
    values = made if isinstance(made, tuple | list) else (made,)
    return sum(math.prod(map(int, v.shape)) for v in values if isinstance(v, torch.Tensor))


def _record(line: Location | None, work: _Work) -> Decision:
    detail = f"{work.values} values, {work.numbers:,} numbers"
    reason = Reason(
        ReasonCode.EVERY_STEP,
        f"{detail} of weights alone are made again at every step, however few tokens it has",
        line,
        "make them once, before the port: merge the weights, or keep the result as a parameter",
    )
    subject = "values of weights alone"
    return Decision("weights", Outcome.LEFT, subject, detail, work.module, line, reason)
