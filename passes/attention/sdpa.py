"""``scaled_dot_product_attention`` as a match: the call names its parts, axes as elsewhere.

sdpa(q [.., H, Tq, D], k [.., Hkv, Tk, D], v, attn_mask, dropout_p, is_causal, scale,
     enable_gqa)
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.errors import ReasonCode
from fxport.passes.attention.layout import (
    Axis,
    Dims,
    Factor,
    LayoutError,
    axes_of,
    own_dims,
    resolve_all,
)
from fxport.passes.attention.products import contract
from fxport.passes.attention.site import Left, MaskKind, MaskStep, Match
from fxport.passes.attention.trace import trace
from fxport.passes.attention.views import number, overload_packet
from fxport.passes.attention.weights import check_dropout
from fxport.passes.graph_facts import GraphFacts

__all__ = ["is_sdpa", "match_sdpa"]

aten = torch.ops.aten


def is_sdpa(node: fx.Node) -> bool:
    return overload_packet(node) is aten.scaled_dot_product_attention


def match_sdpa(facts: GraphFacts, node: fx.Node) -> Match:
    """The attention that a call is.

    Raises:
        Left: it cannot be expressed.
    """
    del facts
    given = arguments(node)
    q, k, v = (trace(given[name]) for name in ("query", "key", "value"))
    size = shape_of(given["query"])[-1]
    scale = given.get("scale")
    if scale is None:
        if not isinstance(size, int):
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the head size is symbolic", node)
        scale = 1 / math.sqrt(size)
    if number(scale) is None:
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the scale is symbolic", node)
    if not scale > 0:  # some of torch's kernels take its square root
        raise Left(
            ReasonCode.UNSUPPORTED_FEATURE,
            "the scale is negative or 0, where torch gives NaN or not, as the kernel will have it",
            node,
            "negate q",
        )
    check_dropout(float(given["dropout_p"]), node)
    k_dims, v_dims = k[-1].dims, v[-1].dims
    if given.get("enable_gqa"):
        k_dims, v_dims = (_grouped(q[-1].dims, dims, node) for dims in (k_dims, v_dims))
    batch = tuple(f"n{i}" for i in range(max(len(s[-1].dims) for s in (q, k, v)) - 2))
    try:
        scored = contract(_labels(batch, q[-1].dims, k_dims, "i", "c", "j"), q[-1].dims, k_dims)
        labels = _labels(batch, scored.result, v_dims, "i", "j", "e", transposed=False)
        out = contract(labels, scored.result, v_dims)
    except LayoutError:
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "q, k and v do not fit", node) from None
    return Match(
        start=node,
        output=node,
        interior=(),
        q=q,
        k=k,
        v=v,
        scores=resolve_all(scored.result[:-1]),
        key=resolve_all(scored.result)[-1],
        head=resolve_all(scored.summed),
        value=own_dims(out.result, v_dims, scored.result),
        out_dims=resolve_all(out.result),
        scale=float(scale),
        steps=_masks(node, scored.result),
        dropout_p=float(given["dropout_p"]),
        zero_rows=True,
        infinite_rows=True,
    )


def _labels(
    batch: tuple[str, ...],
    left: Dims,
    right: Dims,
    row: str,
    summed: str,
    column: str,
    transposed: bool = True,
) -> tuple[tuple[str, ...], ...]:
    last = (column, summed) if transposed else (summed, column)
    return (
        (*batch[len(batch) - len(left) + 2 :], row, summed),
        (*batch[len(batch) - len(right) + 2 :], *last),
        (*batch, row, column),
    )


def _grouped(q: Dims, dims: Dims, node: fx.Node) -> Dims:
    """K's or V's dimensions with each head repeated for its group of query heads."""
    heads = _size(q[-3])
    kv_heads = _size(dims[-3])
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % kv_heads:
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "heads do not divide into groups", node)
    if heads == kv_heads:
        return dims
    copies = Factor(Axis(heads // kv_heads, (node, "group")), True)
    return (*dims[:-3], (*dims[-3], copies), *dims[-2:])


def _size(dim: tuple[Factor, ...]) -> object:
    size: object = 1
    for axis in axes_of([dim]):
        size = size * axis.size  # type: ignore[operator]
    return size


def _masks(node: fx.Node, scores: Dims) -> tuple[MaskStep, ...]:
    given = arguments(node)
    steps: list[MaskStep] = []
    mask = given.get("attn_mask")
    if mask is not None and mask.meta["val"].dtype == torch.bool:  # True: may be seen
        steps.append(MaskStep(MaskKind.FILL, node, scores, mask, -math.inf, inverted=True))
    elif mask is not None:
        steps.append(MaskStep(MaskKind.ADD, node, scores, mask))
    if given.get("is_causal"):
        steps.append(MaskStep(MaskKind.CAUSAL, node, scores))
    return tuple(steps)
