"""Puts the bodies of regions in their place.

Before                                                          After
    wrap_with_autocast("cpu", bf16, False, .., body, q, cos)        what body computes from q, cos
    wrap_with_set_grad_enabled(False, body, x)                      what body computes from x
    wrap_with_autocast("cpu", bf16, True, .., body, x, w)           linear(to(x, bf16), to(w, bf16))
        body: linear(x, w)

Autocast that is switched off changes nothing, as nothing is captured under autocast; neither does
a switch of gradients where none are taken. Autocast that is switched on is written out: every
operand that it casts (`fxport.capture.autocast`) is cast by an operation of its own.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from fxport.capture.autocast import Autocast, UnknownUnderAutocast, operand_dtype
from fxport.capture.location import user_location
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["inline_regions"]

aten = torch.ops.aten

_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_UNDERSTOOD = (torch.ops.higher_order.flex_attention,)


def inline_regions(gm: fx.GraphModule) -> None:
    """Rewrites the graph in place, nested regions too.

    Raises:
        PortError: a region that is not understood.
    """
    under: dict[fx.Node, Autocast] = {}  # regions inside of such that switch autocast on
    while region := next((n for n in gm.graph.nodes if _body(n) is not None), None):
        body = _body(region)
        assert body is not None
        module = getattr(gm, str(body.target))
        for name, child in module._modules.items():  # regions inside of regions
            gm.add_module(f"{body.target}_{name}", child)
        mode = _switched_on(region) or under.pop(region, None)
        outputs = _copy(gm, region, module, f"{body.target}_", mode, under)
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
    return Reason(ReasonCode.UNSUPPORTED_OP, f"no rule for `{node.target}`", user_location(node))


def _unknown(node: fx.Node) -> PortError:
    reason = Reason(
        ReasonCode.UNSUPPORTED_OP,
        f"what autocast does to `{node.target}` is not known",
        user_location(node),
        "cast its operands by hand, or switch autocast off around it",
    )
    return PortError([reason])


def _body(node: fx.Node) -> fx.Node | None:
    """The body of a region."""
    position = {_GRAD: 1, _AUTOCAST: 4}.get(node.target)  # type: ignore[arg-type]
    return None if position is None else node.args[position]  # type: ignore[return-value]


def _inputs(region: fx.Node) -> tuple[Any, ...]:
    return region.args[2:] if region.target is _GRAD else region.args[5:]


def _switched_on(region: fx.Node) -> Autocast | None:
    if region.target is not _AUTOCAST or region.args[2] is False:
        return None
    device, dtype = region.args[:2]
    assert isinstance(device, str)
    dtype = dtype or torch.get_autocast_dtype(device)
    assert isinstance(dtype, torch.dtype)
    return Autocast(device, dtype)


def _copy(
    gm: fx.GraphModule,
    region: fx.Node,
    body: fx.GraphModule,
    prefix: str,
    mode: Autocast | None,
    under: dict[fx.Node, Autocast],
) -> tuple[fx.Node, ...]:
    values: dict[fx.Node, Any] = dict(
        zip(body.graph.find_nodes(op="placeholder"), _inputs(region), strict=True)
    )
    with gm.graph.inserting_before(region):
        for node in body.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            cast = _operands(gm.graph, node, values, mode)
            copied = values[node] = gm.graph.node_copy(node, cast.__getitem__)
            if node.op == "get_attr":
                copied.target = prefix + str(node.target)
                if not isinstance(getattr(body, str(node.target)), fx.GraphModule):
                    raise AssertionError(f"{node.target} of a region is no region")
            elif mode is not None and node.target is _GRAD:
                under[copied] = mode
    (result,) = body.graph.output_node().args
    outputs: Any = fx.node.map_arg(result, values.__getitem__)
    return tuple(outputs)


def _operands(
    graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any], mode: Autocast | None
) -> dict[fx.Node, Any]:
    """What a node of a body reads, cast as autocast has it."""
    if mode is None:
        return values
    if not isinstance(node.target, torch._ops.OpOverload):
        if isinstance(node.target, HigherOrderOperator) and _body(node) is None:
            raise _unknown(node)
        return values
    try:
        dtype = operand_dtype(node, mode)
    except UnknownUnderAutocast as error:
        raise _unknown(node) from error
    if dtype is None:
        return values
    cast = dict(values)
    for operand in node.all_input_nodes:
        value: Any = operand.meta.get("val")
        if mode.casts(value) and value.dtype != dtype:
            cast[operand] = graph.call_function(aten.to.dtype, (values[operand], dtype))
            with torch.no_grad():
                cast[operand].meta = {**node.meta, "val": value.to(dtype)}
    return cast
