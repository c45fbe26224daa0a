"""Puts the bodies of regions that mean nothing in inference in their place.

Before                                                          After
    wrap_with_autocast("cpu", bf16, False, .., body, q, cos)        what body computes from q, cos
    wrap_with_set_grad_enabled(False, body, x)                      what body computes from x

Autocast that is switched off changes nothing, as nothing is captured under autocast; neither does
a switch of gradients where none are taken. Autocast that is switched on is refused.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from fxport.capture.location import user_location
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["inline_regions"]

_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_UNDERSTOOD = (torch.ops.higher_order.flex_attention,)


def inline_regions(gm: fx.GraphModule) -> None:
    """Rewrites the graph in place, nested regions too.

    Raises:
        PortError: a region that does mean something, and is not understood.
    """
    while region := next((n for n in gm.graph.nodes if _body(n) is not None), None):
        body = _body(region)
        assert body is not None
        module = getattr(gm, str(body.target))
        for name, child in module._modules.items():  # regions inside of regions
            gm.add_module(f"{body.target}_{name}", child)
        outputs = _copy(gm, region, module, _inputs(region), f"{body.target}_")
        for user in list(region.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(outputs[user.args[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(region)
        if not body.users:
            gm.graph.erase_node(body)
    reasons = [_refusal(node) for node in gm.graph.nodes if _is_strange(node)]
    if reasons:
        raise PortError(reasons)


def _is_strange(node: fx.Node) -> bool:
    return isinstance(node.target, HigherOrderOperator) and node.target not in _UNDERSTOOD


def _refusal(node: fx.Node) -> Reason:
    if node.target is _AUTOCAST:
        return Reason(
            ReasonCode.UNSUPPORTED_OP,
            "forward switches autocast on",
            next((line for use in node.users if (line := user_location(use))), None),
            "convert the model to the dtype that it shall be served in",
        )
    return Reason(ReasonCode.UNSUPPORTED_OP, f"no rule for `{node.target}`", user_location(node))


def _body(node: fx.Node) -> fx.Node | None:
    """The body of a region without effect."""
    if node.target is _GRAD:
        return node.args[1]  # type: ignore[return-value]
    if node.target is _AUTOCAST and node.args[2] is False:
        return node.args[4]  # type: ignore[return-value]
    return None


def _inputs(region: fx.Node) -> tuple[Any, ...]:
    return region.args[2:] if region.target is _GRAD else region.args[5:]


def _copy(
    gm: fx.GraphModule, region: fx.Node, body: fx.GraphModule, inputs: tuple[Any, ...], prefix: str
) -> tuple[fx.Node, ...]:
    values: dict[fx.Node, Any] = dict(
        zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True)
    )
    with gm.graph.inserting_before(region):
        for node in body.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            copied = values[node] = gm.graph.node_copy(node, values.__getitem__)
            if node.op == "get_attr":
                copied.target = prefix + str(node.target)
                if not isinstance(getattr(body, str(node.target)), fx.GraphModule):
                    raise AssertionError(f"{node.target} of a region is no region")
    (result,) = body.graph.output_node().args
    outputs: Any = fx.node.map_arg(result, values.__getitem__)
    return tuple(outputs)
