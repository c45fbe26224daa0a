"""Operations that mix tokens whatever the rest of a graph does, so that the search can end early.

    conv1d(x [B, C, T + 3], w [C, 1, 4])        a convolution over the tokens
    lstm(x, ...)                                a recurrent network
    for t in range(T): h = a * h + x[:, t]      37 tokens: 812 operations, 53 tokens: 1132

In a graph with a symbolic length a convolution is seen by its sizes, in graphs of plain lengths by
how its sizes differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.location import user_location
from fxport.capture.sample import Sample
from fxport.capture.written import writes_to_state
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["convolutions_over", "refuse_recurrence"]

aten = torch.ops.aten

_RECURRENT = (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)
_CONVOLUTIONS = (
    aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, aten.conv_transpose1d,
)  # fmt: skip
_HINT = "only attention may look at other tokens"


def convolutions_over(gm: fx.GraphModule, length: sympy.Symbol) -> list[Reason]:
    """One reason for each convolution of a symbolic graph that runs along the tokens."""
    return [
        _convolution(node)
        for node in gm.graph.nodes
        if _packet(node) in _CONVOLUTIONS
        and _runs_along(node, lambda axis, size: not isinstance(size, int) and size.has(length))
    ]


def refuse_recurrence(first: Sample, second: Sample | None) -> None:
    """Refuses what no further length could make portable.

    Args:
        second: the same model at another length and the same batch size, if it takes that.

    Raises:
        PortError: a convolution, a recurrent network, or a loop over the tokens.
    """
    reasons = [
        Reason(
            ReasonCode.MIXES_TOKENS,
            f"a recurrent network (`{node.target}`) runs along the sequence",
            user_location(node),
            _HINT,
        )
        for node in first.varying
        if _packet(node) in _RECURRENT
    ]
    if second is not None:
        reasons += _convolutions(first, second) or _loop(first, second)
    if reasons:
        raise PortError(reasons)


def _convolutions(first: Sample, second: Sample) -> list[Reason]:
    longer = second.length - first.length
    pairs = zip(*(_of(s, _CONVOLUTIONS) for s in (first, second)), strict=False)
    return [
        _convolution(one)
        for one, other in pairs
        if one.target == other.target
        and _runs_along(one, lambda axis, size: shape_of(_input(other))[axis] - size == longer)  # noqa: B023
    ]


def _loop(first: Sample, second: Sample) -> list[Reason]:
    """A model without memory of earlier calls must take the same steps for every length."""
    remembers = first.changed or writes_to_state(first)
    if remembers or len(first.varying) == len(second.varying):
        return []
    fewer, more = sorted((first, second), key=lambda sample: len(sample.varying))
    pairs = zip(more.varying, fewer.varying, strict=False)
    at = next((one for one, other in pairs if one.target != other.target), more.varying[-1])
    added = len(more.varying) - len(fewer.varying)
    a_loop = added >= abs(second.length - first.length)
    like = "a loop over the tokens" if a_loop else "one with a path for some lengths"
    return [
        Reason(
            ReasonCode.DEPENDS_ON_LENGTH,
            f"forward runs {len(first.varying)} operations for {first.length} tokens and "
            f"{len(second.varying)} for {second.length}, as {like} does",
            user_location(at),
            _HINT,
        )
    ]


def _convolution(node: fx.Node) -> Reason:
    return Reason(
        ReasonCode.MIXES_TOKENS,
        "a convolution runs along the (token) axis, so tokens are mixed outside attention",
        user_location(node),
        _HINT,
    )


def _runs_along(node: fx.Node, is_tokens: Callable[[int, Any], bool]) -> bool:
    """Whether a kernel of more than one entry runs along an axis of tokens."""
    kernel = shape_of(arguments(node)["weight"])
    sizes = shape_of(_input(node))
    return any(
        kernel[axis] != 1 and is_tokens(axis - len(kernel), sizes[axis - len(kernel)])
        for axis in range(2, len(kernel))
    )


def _input(node: fx.Node) -> fx.Node:
    found = arguments(node)["input"]
    assert isinstance(found, fx.Node)
    return found


def _of(sample: Sample, packets: tuple[Any, ...]) -> list[fx.Node]:
    return [n for n in sample.varying if _packet(n) in packets]


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)
