"""Keys of zeros with values of zeros, before or behind the others, as sinks.

Before                                          After
    k = pad(k, (0, 0, 1, 0))    [B, H, 1 + T, D]    attention(q, k, v, sinks=[0, ..])
    v = pad(v, (0, 0, 1, 0))                        mask[.., 1:]
    o = softmax(q @ k.mT + mask) @ v

Their score is 0 for every query, and all that they add is weight without a value: n of them are one
sink of log n. The mask must be proven to let every query see them, and to add nothing to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.frame import frame_of
from fxport.passes.attention.layout import (
    Axis,
    Dim,
    Dims,
    Factor,
    LayoutError,
    align,
    axes_of,
    is_one,
    resolve,
    resolve_all,
)
from fxport.passes.attention.made import filled_with
from fxport.passes.attention.site import Left, MaskKind, MaskStep, Match
from fxport.passes.attention.trace import Step, trace
from fxport.passes.attention.views import number, overload_packet
from fxport.passes.graph_facts import GraphFacts, Source
from fxport.passes.masks.prover import Prover

__all__ = ["zero_keys_as_sinks"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Padded:
    """``cat([zeros, of])`` along one dimension, or ``cat([of, zeros])``.

    Attributes:
        before, behind: how many rows of zeros.
    """

    of: fx.Node
    dim: int
    before: int
    behind: int


def zero_keys_as_sinks(emitter: Emitter, facts: GraphFacts, prover: Prover, match: Match) -> Match:
    """The same attention without such keys; as it is where it has none, or they may be masked."""
    k, v = _padded(match.k[0].node), _padded(match.v[0].node)
    if k is None or v is None or (k.before, k.behind) != (v.before, v.behind):
        return match
    others = (match.early, match.key_scales, match.value_scales, match.terms)
    if any(others) or match.sinks is not None or match.again is not None:
        return match
    try:
        plain = _unmasked(emitter, facts, prover, match, _without(match, k, v), k)
    except (LayoutError, Left):
        plain = None
    if plain is None:
        emitter.undo()
        return match
    plain = replace(plain, k=_further(plain.k, k), v=_further(plain.v, v))
    return replace(plain, out_dims=resolve_all(plain.out_dims))  # in the axes there are now


def _padded(node: fx.Node, number_there: float = 0.0) -> _Padded | None:
    """What rows of one number were put before or behind, if they were."""
    packet = overload_packet(node)
    given = arguments(node) if packet in (aten.pad, aten.constant_pad_nd, aten.cat) else {}
    if packet is aten.cat:
        parts = list(given["tensors"])
        rest = [p for p in parts if filled_with(p) != number_there]
        dim = given["dim"] % len(shape_of(node))
        sizes = [shape_of(p)[dim] for p in parts]
        if len(rest) != 1 or len(parts) < 2:
            return None
        at = parts.index(rest[0])
        counts = [sizes[:at], sizes[at + 1 :]]
        if not all(isinstance(s, int) for part in counts for s in part):
            return None
        before, behind = (sum(int(s) for s in part) for part in counts)
        return _Padded(rest[0], dim, before, behind)
    if not given or given.get("mode", "constant") != "constant":
        return None
    if number(given["value"] or 0) != number_there:
        return None
    pairs = zip(given["pad"][::2], given["pad"][1::2], strict=True)
    along = [(i, pair) for i, pair in enumerate(pairs) if pair != (0, 0)]
    if len(along) != 1 or not all(type(n) is int and n >= 0 for n in along[0][1]):
        return None
    index, (before, behind) = along[0]
    return _Padded(given["self"], len(shape_of(node)) - 1 - index, before, behind)


def _without(match: Match, k: _Padded, v: _Padded) -> Match:
    """
    Raises:
        LayoutError: the rows of zeros are no keys, or not these alone.
    """
    size = shape_of(k.of)[k.dim]
    if shape_of(v.of)[v.dim] != size:
        raise LayoutError
    key: Dim = () if is_one(size) else (Factor(Axis(size, match.start)),)
    return replace(
        match,
        k=(_unpadded(match.k[0], match.key, k, key),),
        v=(_unpadded(match.v[0], match.key, v, key),),
        key=key,
        row_scales=tuple(replace(s, dims=_with(s.dims, match.key, key)) for s in match.row_scales),
        steps=tuple(replace(s, dims=_with(s.dims, match.key, key)) for s in match.steps),
        sinks=math.log(k.before + k.behind),
        zero_rows=True,
        infinite_rows=False,
    )


def _unpadded(step: Step, key: Dim, padded: _Padded, instead: Dim) -> Step:
    """What was padded, in the axes of the operand, but for the keys."""
    dims = resolve_all(step.dims)
    if [f.axis for f in dims[padded.dim]] != [f.axis for f in resolve(key)]:
        raise LayoutError
    return Step(padded.of, _with(dims, key, instead), step.factor)


def _further(steps: tuple[Step, ...], padded: _Padded) -> tuple[Step, ...]:
    """How that came about: heads may be repeated."""
    (step,) = steps
    found = trace(padded.of)
    try:
        for old, new in zip(step.dims, found[-1].dims, strict=True):
            if old or new:
                align(old, new)
    except LayoutError:
        return steps
    return tuple(replace(s, factor=s.factor * step.factor) for s in found)


def _with(dims: Dims, key: Dim, instead: Dim) -> Dims:
    """Dimensions of scores with another axis of keys."""
    old = [f.axis for f in resolve(key)]
    found = [instead if dim and [f.axis for f in dim] == old else dim for dim in resolve_all(dims)]
    if set(axes_of(found)) & set(old):
        raise LayoutError
    return tuple(found)


def _unmasked(
    emitter: Emitter,
    facts: GraphFacts,
    prover: Prover,
    match: Match,
    plain: Match,
    padded: _Padded,
) -> Match | None:
    """With masks of the other keys alone; None if some may do something in the columns of zeros.

    Raises:
        LayoutError: a mask says something in another way than by a tensor.
    """
    count = padded.before + padded.behind
    columns: Dim = (Factor(Axis(count, match.start)),) if count > 1 else ()
    kept, left = [], []
    for step, new in zip(match.steps, plain.steps, strict=True):
        tensor, there = _cut(emitter, step, match.key, padded)
        kept.append(replace(new, tensor=tensor))
        if there is not None:
            dims = _with(step.dims, match.key, columns)
            left.append(replace(step, dims=dims, tensor=there))
    facts.add(emitter.made, match.output)
    if any(facts.source(s.tensor) not in Source.BUFFER for s in left if s.tensor is not None):
        return None
    frame = replace(frame_of(plain), key=tuple(axes_of([columns])))
    proof = prover.prove(left, frame, zero_rows=True, anchored=True)
    band = proof.band
    if proof.rest or band is None or proof.slopes is not None or band.from_end:
        return None
    seen = band.lower is None and (band.upper is None or band.upper >= count - 1)
    return replace(plain, steps=tuple(kept)) if seen else None


def _cut(
    emitter: Emitter, step: MaskStep, key: Dim, padded: _Padded
) -> tuple[fx.Node, fx.Node | None]:
    """A mask without the columns of zeros, and those; None where it is known to do nothing there.

    Raises:
        LayoutError: it does not say anything about single keys by a tensor.
    """
    tensor, old = step.tensor, [f.axis for f in resolve(key)]
    if tensor is None or step.kind not in (MaskKind.FILL, MaskKind.ADD):
        raise LayoutError
    places = [i for i, d in enumerate(resolve_all(step.dims)) if d and [f.axis for f in d] == old]
    dim = places[0] - len(step.dims) + len(shape_of(tensor))
    if dim < 0 or is_one(shape_of(tensor)[dim]):
        return tensor, tensor
    inner = _before_padding(emitter, step, tensor, dim, padded)
    if inner is not None:
        return inner, None
    before, behind = padded.before, padded.behind
    ends = [(0, before)] if before else []
    ends += [(-behind, _END)] if behind else []
    parts = [emitter.call(aten.slice.Tensor, tensor, dim, *end) for end in ends]
    there = parts[0] if len(parts) == 1 else emitter.call(aten.cat.default, parts, dim)
    return emitter.call(aten.slice.Tensor, tensor, dim, before, -behind or _END), there


def _before_padding(
    emitter: Emitter, step: MaskStep, tensor: fx.Node, dim: int, padded: _Padded
) -> fx.Node | None:
    """The mask that was padded as the keys were, with what hides nothing."""
    steps = trace(tensor)
    nothing = 1.0 if step.kind is MaskKind.FILL and step.inverted else 0.0
    found = _padded(steps[0].node, nothing)
    if found is None or any(s.factor != 1 for s in steps):
        return None
    if (found.before, found.behind) != (padded.before, padded.behind):
        return None
    wanted = [tuple(f.axis for f in d) for d in resolve_all(steps[-1].dims)]
    have = [tuple(f.axis for f in d) for d in resolve_all(steps[0].dims)]
    if not have[found.dim] or have[found.dim] != wanted[dim]:
        return None
    key = (Axis(shape_of(found.of)[found.dim], found.of),)
    have[found.dim] = wanted[dim] = key
    inner = emitter.relayout(found.of, have, wanted)
    dtype = tensor.meta["val"].dtype
    return inner if inner.meta["val"].dtype == dtype else emitter.call(aten.to.dtype, inner, dtype)


_END = 2**63 - 1
