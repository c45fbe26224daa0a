"""Attention whose keys are repeated for every head at some lengths, and by the kernel at others.

    T = 16:  scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    T = 37:  keys = k.unsqueeze(2).expand(B, 2, 3, T, D).reshape(B, 6, T, D), values alike
             scaled_dot_product_attention(q, keys, values, attn_mask=band of 16)
    After, T = 37:  scaled_dot_product_attention(q, k, v, attn_mask=band of 16, enable_gqa=True)

As in transformers, which repeats them where there is a mask, and has none where a window covers
everything. The option stands for just this repetition (documentation of torch's function).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.causal_calls import attention_calls
from fxport.capture.sample import Sample, analysed_again

__all__ = ["groups_at_every_length"]

aten = torch.ops.aten

_MERGES = {aten.reshape, aten.view, aten._unsafe_view}
_COPIES = {aten.clone, aten.contiguous, aten.slice, aten.alias}


def groups_at_every_length(samples: Sequence[Sample]) -> list[Sample]:
    """Samples whose calls, one by one, all leave the repetition to the kernel if one does.

    The graphs of those that do not are changed in place; the others are given back as they are.
    """
    changed: set[int] = set()
    for calls in zip(*(attention_calls(sample) for sample in samples), strict=False):
        grouped = [bool(arguments(call)["enable_gqa"]) for call in calls]
        if len(set(grouped)) > 1:
            for index in (i for i, known in enumerate(grouped) if not known):
                if _leave_to_kernel(calls[index], samples[index]):
                    changed.add(index)
    return [analysed_again(s) if i in changed else s for i, s in enumerate(samples)]


def _leave_to_kernel(call: fx.Node, sample: Sample) -> bool:
    """Whether the keys and values of a call were repeated; they are given as they were, then."""
    given = arguments(call)
    key, value = (_before_repetition(given[name], sample) for name in ("key", "value"))
    if key is None or value is None or shape_of(key)[1] != shape_of(value)[1]:
        return False
    given.update(key=key, value=value, enable_gqa=True)
    call.args, call.kwargs = tuple(given.values()), {}
    return True


def _before_repetition(node: fx.Node, sample: Sample) -> fx.Node | None:
    """``[B, G, T, D]`` of ``[B, G * n, T, D]``, each head n times in a row and never written to."""
    if node.op != "call_function" or sample.memory.written_by(node):
        return None
    if node.target is aten.repeat_interleave.self_int:
        given = arguments(node)
        source = given["self"]
        along = len(shape_of(node)) == 4 and given["dim"] in (1, -3)
    else:
        if _packet(node) not in _MERGES:
            return None
        spread = _copied(node.all_input_nodes[0])
        if _packet(spread) is not aten.expand:
            return None
        single = _copied(spread.all_input_nodes[0])
        if _packet(single) is not aten.unsqueeze:
            return None
        source = single.all_input_nodes[0]
        along = arguments(single)["dim"] in (2, -3) and _is_merged(spread, node)
    return source if along and not sample.memory.written_by(source) else None


def _is_merged(spread: fx.Node, node: fx.Node) -> bool:
    """``[B, G, n, T, D]`` to ``[B, G * n, T, D]``."""
    before, after = shape_of(spread), shape_of(node)
    return len(before) == 5 and after == (before[0], before[1] * before[2], *before[3:])


def _copied(node: fx.Node) -> fx.Node:
    """What a value of the same shape was copied from."""
    while _packet(node) in _COPIES and shape_of(node) == shape_of(node.all_input_nodes[0]):
        node = node.all_input_nodes[0]
    return node


def _packet(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", None)
