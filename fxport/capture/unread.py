"""Stands for an argument of forward that the logits must not depend on.

forward(ids, targets)  ->  forward(ids, unread(ids, "targets")): the captured graph has no `unread`
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["refuse_read", "unread"]


@torch.library.custom_op("fxport::unread", mutates_args=())
def _unread(ids: Tensor, name: str) -> Tensor:
    return torch.zeros_like(ids)


@_unread.register_fake
def _(ids: Tensor, name: str) -> Tensor:
    return torch.empty_like(ids)


def unread(ids: Tensor, name: str) -> Tensor:
    """Integers like `ids` that nobody knows; opaque to every trace."""
    return _unread(ids, name)


def refuse_read(gm: fx.GraphModule) -> None:
    """Looks for what is left of them once the graph gives the logits only.

    Raises:
        PortError: the logits depend on such an argument.
    """
    found = [n for n in gm.graph.nodes if n.target is torch.ops.fxport.unread.default]
    names = dict.fromkeys(str(n.args[1]) for n in found)
    if names:
        raise PortError([_reason(name) for name in names])


def _reason(name: str) -> Reason:
    return Reason(
        ReasonCode.CAPTURE_FAILED,
        f"the logits depend on `{name}`, which is neither the token ids nor a known value",
        hint="generation knows the token ids alone: give the argument a default, or a value that "
        "is the same in every call in fxport.port(model, example_inputs=(ids, ...))",
    )
