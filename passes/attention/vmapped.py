"""Attentions under ``torch.vmap`` that were not lowered: out of sight of the pass.

What may draw random numbers or switches gradients (`fxport.capture.vmap_regions`). Reported, so
that nothing is slow in silence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx

from fxport.errors import ReasonCode
from fxport.passes.attention.site import Left

__all__ = ["vmapped_softmaxes"]

_ENTERS = torch._functorch.predispatch._vmap_increment_nesting
_LEAVES = torch._functorch.predispatch._vmap_decrement_nesting
_METHODS = ("softmax", "log_softmax")
_FUNCTIONS = {
    F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, F.scaled_dot_product_attention
}  # fmt: skip


def vmapped_softmaxes(graph: fx.Graph) -> Iterator[tuple[fx.Node, Left]]:
    """Each with its reason."""
    depth = 0
    for node in graph.nodes:
        depth += (node.target is _ENTERS) - (node.target is _LEAVES)
        method = node.op == "call_method" and node.target in _METHODS
        if depth and (method or (node.op == "call_function" and node.target in _FUNCTIONS)):
            yield (
                node,
                Left(
                    ReasonCode.UNSUPPORTED_FEATURE,
                    "this softmax is inside torch.vmap, in a part that is not traced as a whole: "
                    "it may draw random numbers, or switches gradients",
                    node,
                    "give the tensors their batch dimension: matmul and einsum take any number",
                ),
            )
