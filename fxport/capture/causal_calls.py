"""Attention that is causal by a flag at some lengths, and by a mask at others.

    T = 16:  scaled_dot_product_attention(q, k, v, is_causal=True)
    T = 37:  scaled_dot_product_attention(q, k, v, attn_mask=band of 16)
    After, T = 16:  scaled_dot_product_attention(q, k, v, attn_mask=tril(ones(16, 16)))

As in code that leaves the mask of a sliding window out where the window covers everything. With a
mask at every length, the masks can be compared like all constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.sample import Sample, analysed_again

__all__ = ["attention_calls", "masks_at_every_length"]

aten = torch.ops.aten


def masks_at_every_length(samples: Sequence[Sample]) -> list[Sample]:
    """Samples whose calls, one by one, are causal in the same way.

    The graphs of those that are not are changed in place; the others are given back as they are.
    """
    rows = [attention_calls(sample) for sample in samples]
    changed: set[int] = set()
    for calls in zip(*rows, strict=False):
        if len({(_is_masked(call), len(call.args)) for call in calls}) > 1:
            masks = [arguments(call)["attn_mask"] for call in calls]
            shape = next((shape_of(mask) for mask in masks if mask is not None), ())
            for index, call in enumerate(calls):
                _by_name(call, shape)
                changed.add(index)
    return [analysed_again(s) if i in changed else s for i, s in enumerate(samples)]


def attention_calls(sample: Sample) -> list[fx.Node]:
    """The calls of torch's attention that tokens enter, in order."""
    target = aten.scaled_dot_product_attention.default
    return [node for node in sample.varying if node.target is target]


def _is_masked(call: fx.Node) -> bool:
    return arguments(call)["attn_mask"] is not None


def _by_name(call: fx.Node, shape: tuple[Any, ...]) -> None:
    """Its options by name, and a mask in place of the flag.

    Args:
        shape: of the mask at another length, whose batch and heads are followed.
    """
    given = arguments(call)
    if given["is_causal"] and given["attn_mask"] is None:
        given.update(attn_mask=_triangle(call, shape), is_causal=False)
    call.args = tuple(given.pop(name) for name in ("query", "key", "value"))
    call.kwargs = given


def _triangle(call: fx.Node, shape: tuple[Any, ...]) -> fx.Node:
    """What the flag means: the first query sees the first key, whatever the lengths."""
    given = arguments(call)
    query, key = (shape_of(given[name])[-2] for name in ("query", "key"))
    kwargs = {"dtype": torch.bool, "device": call.meta["val"].device}
    ones = _constant(call, aten.ones.default, ([query, key],), kwargs)
    triangle = _constant(call, aten.tril.default, (ones,), {})
    leading = shape[:-2]
    own = shape_of(call)[-2 - len(leading) : -2]
    sizes = [1 if one == 1 else size for one, size in zip(leading, own, strict=True)]
    return _constant(call, aten.expand.default, (triangle, [*sizes, query, key]), {})


def _constant(call: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    with call.graph.inserting_before(call):
        node = call.graph.call_function(target, args, kwargs)
    node.meta = {name: fact for name, fact in call.meta.items() if name != "val"}
    values = fx.node.map_arg(args, lambda n: n.meta["val"])
    with call.meta["val"].fake_mode:
        node.meta["val"] = target(*values, **kwargs)
    return node
