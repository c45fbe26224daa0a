"""Attentions under ``torch.vmap`` or ``torch.func`` that were not lowered: the pass sees none.

Under vmap what may draw random numbers or switches gradients (`fxport.capture.vmap_regions`), under
``torch.func.grad``, ``vjp`` and ``jvp`` everything. Reported, so that nothing is slow in silence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx

from fxport.errors import ReasonCode
from fxport.passes.attention.site import Left

__all__ = ["vmapped_softmaxes"]

# Which of the two Dynamo records depends on the transform, and on the version of torch.
_MODULES = (torch._C._functorch, torch._functorch.predispatch)


def _called(name: str) -> set[object]:
    return {getattr(module, name) for module in _MODULES if hasattr(module, name)}


_ENTERS = {
    **dict.fromkeys(_called("_vmap_increment_nesting"), "torch.vmap"),
    **dict.fromkeys(_called("_grad_increment_nesting"), "torch.func.grad or vjp"),
    **dict.fromkeys(_called("_jvp_increment_nesting"), "torch.func.jvp"),
}
_LEAVES = {f for name in ("vmap", "grad", "jvp") for f in _called(f"_{name}_decrement_nesting")}
_METHODS = ("softmax", "log_softmax")
_FUNCTIONS = {
    F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, F.scaled_dot_product_attention
}  # fmt: skip


def vmapped_softmaxes(graph: fx.Graph) -> Iterator[tuple[fx.Node, Left]]:
    """Each with its reason."""
    inside: list[str] = []
    for node in graph.nodes:
        if node.target in _ENTERS:
            inside.append(_ENTERS[node.target])
        elif node.target in _LEAVES:
            inside.pop()
        method = node.op == "call_method" and node.target in _METHODS
        if inside and (method or (node.op == "call_function" and node.target in _FUNCTIONS)):
            yield node, _derived(inside[-1], node) if "func" in inside[-1] else _mapped(node)


def _mapped(node: fx.Node) -> Left:
    return Left(
        ReasonCode.UNSUPPORTED_FEATURE,
        "this softmax is inside torch.vmap, in a part that is not traced as a whole: "
        "it may draw random numbers, or switches gradients",
        node,
        "give the tensors their batch dimension: matmul and einsum take any number",
    )


def _derived(transform: str, node: fx.Node) -> Left:
    return Left(
        ReasonCode.UNSUPPORTED_FEATURE,
        f"this softmax is inside {transform}, which is not followed: the derivative is taken in "
        "forward, of every operation as it stands",
        node,
        "loss.backward() outside of forward needs no transform",
    )
