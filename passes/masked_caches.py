"""A cache that is read whole under a mask: what lies behind the sequence is never seen.

Before                                              After
    index_put_(cache [1, H, S, D], [.., arange(T)], k)
    mask = index(causal [S, S], [arange(T)])            seen = slice(mask, 1, 0, T)
    sdpa(q, cache, other cache, mask)                   sdpa(q, k, v, seen)

Sound where the mask, evaluated at several lengths, hides every column from T on: a hidden key has
the weight 0, whatever an earlier call has left there. An attention that was written by hand is
known to be causal once it is `fxport::attention`: `read_by_causal_attention` does the same then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.caches import drop_unread_writes
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.memory import Memory
from fxport.passes.attention.emit import Emitter
from fxport.passes.axes import Symbols
from fxport.passes.constants import depends_on, evaluate
from fxport.passes.functional import drop_whole_slices
from fxport.passes.masks.effects import FORBIDDEN, hard_limit
from fxport.report import Decision, Outcome

__all__ = ["read_by_causal_attention", "read_under_masks"]

aten = torch.ops.aten

# They keep the rows of the cache apart and in order.
_PASSING_ON = {
    aten.to.dtype, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.detach.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default,
    aten.repeat_interleave.self_int, aten.expand.default, aten.reshape.default, aten.view.default,
    aten.flatten.using_ints,
}  # fmt: skip
# A mask must hide what lies behind sequences of these lengths, and of all but one row.
_PROBES = (1, 2, 3, 7, 37)


@dataclass(frozen=True)
class _Read:
    """A cache after a write of the first T rows, as attention sees it.

    Attributes:
        value: what was written.
        rows: the shape of that part of the cache; T where the rows are counted.
        steps: what lies between the cache and attention.
        dims: along which the rows lie in the cache, and after each step.
    """

    value: fx.Node
    rows: tuple[Any, ...]
    steps: tuple[fx.Node, ...]
    dims: tuple[int, ...]


def read_under_masks(gm: fx.GraphModule, symbols: Symbols) -> tuple[Decision, ...]:
    """Calls of torch's attention; rewrites the graph in place; one decision for each."""
    if not any(map(_writes, gm.graph.nodes)):
        return ()
    drop_whole_slices(gm)
    varying = depends_on(gm, InputKind.DATA, InputKind.PARAMETER)

    def hides_the_rest(node: fx.Node) -> bool:
        mask = arguments(node)["attn_mask"]
        return mask is not None and mask not in varying and _hides_the_rest(mask, symbols)

    target = aten.scaled_dot_product_attention.default
    return _narrowed(gm, symbols, target, ("key", "value", "attn_mask"), hides_the_rest)


def read_by_causal_attention(gm: fx.GraphModule, symbols: Symbols) -> tuple[Decision, ...]:
    """The same for `fxport::attention`, whose row i sees no key behind i."""
    if not any(map(_writes, gm.graph.nodes)):
        return ()

    def is_causal(node: fx.Node) -> bool:
        given = arguments(node)
        return given["causal"] and given["q_offset"] == 0 and given["bias"] is None

    return _narrowed(gm, symbols, torch.ops.fxport.attention.default, ("k", "v"), is_causal)


def _narrowed(
    gm: fx.GraphModule,
    symbols: Symbols,
    target: torch._ops.OpOverload,
    names: tuple[str, ...],
    hides_the_rest: Callable[[fx.Node], bool],
) -> tuple[Decision, ...]:
    """`names`: of keys, values and the mask."""
    memory, decisions = Memory(gm.graph), []
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.find_nodes(op="call_function", target=target):
        given = arguments(node)
        reads = [_read(given[name], node, symbols, memory, order) for name in names[:2]]
        if reads[0] is None or reads[1] is None or not hides_the_rest(node):
            continue
        known = {name: read for name, read in zip(names[:2], reads, strict=True) if read}
        _narrow(gm, node, known, names[2:], symbols)
        detail = "only what was just written is read: the mask hides the rest"
        decisions.append(Decision("caches", Outcome.REWRITTEN, "cache under a mask", detail))
    if decisions:
        gm.graph.eliminate_dead_code()  # what read the cache
        drop_unread_writes(gm)
    return tuple(decisions)


# --- the write ---------------------------------------------------------------------------------


def _writes(node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return packet in (aten.index_put_, aten.index_put, aten.index_copy_, aten.index_copy)


def _written(node: fx.Node, symbols: Symbols) -> tuple[fx.Node, int] | None:
    """What is written to the first T rows, and along which dimension they lie."""
    if not _writes(node):
        return None
    given = arguments(node)
    if "indices" in given:
        used = [(d, i) for d, i in enumerate(given["indices"]) if i is not None]
        if len(used) != 1 or given["accumulate"]:
            return None
        (dim, index), value = used[0], given["values"]
    else:
        dim, index, value = given["dim"], given["index"], given["source"]
    shape = shape_of(given["self"])
    dim %= len(shape)
    rows = (*shape[:dim], symbols.length, *shape[dim + 1 :])
    counted = _counts(index, symbols) and isinstance(shape[dim], int)
    behind = len(shape_of(value))  # torch leaves leading dimensions of size 1 out
    same = shape_of(value) == rows[len(rows) - behind :] and set(rows[:-behind]) <= {1}
    return (value, dim) if counted and same and behind > len(rows) - dim - 1 else None


def _counts(index: fx.Node, symbols: Symbols) -> bool:
    """Whether this is ``arange(T)``."""
    while index.target in (aten.to.dtype, aten.alias.default, aten.expand.default):
        index = index.all_input_nodes[0]
    packet = getattr(index.target, "overloadpacket", None)
    if packet is not aten.arange or shape_of(index) != (symbols.length,):
        return False
    given = arguments(index)
    return given.get("start", 0) == 0 and given.get("step", 1) == 1


def _read(
    seen: fx.Node,
    attention: fx.Node,
    symbols: Symbols,
    memory: Memory,
    order: dict[fx.Node, int],
) -> _Read | None:
    """Follows what attention sees back to the cache."""
    chain = [attention, seen]
    while chain[-1].target in _PASSING_ON:
        chain.append(chain[-1].all_input_nodes[0])
    cache, reader = chain[-1], chain[-2]
    steps = tuple(reversed(chain[1:-1]))
    writes = memory.written_by(cache)
    write = cache if _writes(cache) else next(iter(writes), None)
    if write is None or writes not in ([], [write]) or order[write] > order[reader]:
        return None
    if write is not cache and (not _is_input(cache) or arguments(write)["self"] is not cache):
        return None
    found = _written(write, symbols)
    if found is None or not _is_finite(cache) or memory.written_by(found[0]):
        return None
    value, dim = found
    dims = _dims(dim, steps)
    if dims is None or dims[-1] != len(shape_of(seen)) - 2:
        return None
    shape = shape_of(cache)
    return _Read(value, (*shape[:dim], symbols.length, *shape[dim + 1 :]), steps, dims)


def _is_input(node: fx.Node) -> bool:
    return node.op == "placeholder" and graph_input(node).kind is InputKind.BUFFER


def _is_finite(cache: fx.Node) -> bool:
    """Zero times what is in the cache must be zero."""
    while _writes(cache):
        cache = arguments(cache)["self"]
    if cache.target in (aten.zeros.default, aten.full.default):
        return True
    if not _is_input(cache):
        return False
    value = graph_input(cache).value
    return value is not None and bool(torch.isfinite(value).all())


# --- the mask ----------------------------------------------------------------------------------


def _hides_the_rest(mask: fx.Node, symbols: Symbols) -> bool:
    shape = shape_of(mask)
    if len(shape) < 2 or not isinstance(shape[-1], int) or shape[-2] != symbols.length:
        return False
    lengths = [n for n in (*_PROBES, shape[-1] - 1, shape[-1]) if 0 < n <= shape[-1]]
    try:
        limit = -math.inf if mask.meta["val"].dtype == torch.bool else hard_limit(mask)
        return all(_hidden(evaluate(mask, {symbols.length: n}), n, limit) for n in lengths)
    except ValueError:  # depends on the batch size
        return False


def _hidden(mask: torch.Tensor, length: int, limit: float) -> bool:
    behind = mask[..., length:]
    if mask.dtype == torch.bool:
        return not bool(behind.any())
    if bool((behind == float("-inf")).all()):
        return True
    # A finite number hides a key from the rows that see another one.
    seen = (mask[..., :length] > FORBIDDEN).any(-1)
    return bool((behind <= limit).all() and seen.all())


# --- the rewrite -------------------------------------------------------------------------------


def _narrow(
    gm: fx.GraphModule,
    node: fx.Node,
    reads: Mapping[str, _Read],
    masks: Sequence[str],
    symbols: Symbols,
) -> None:
    emitter = Emitter(gm, node, [node])
    tokens = next(
        n
        for n in gm.graph.find_nodes(op="placeholder")
        if "input" in n.meta and graph_input(n).kind is InputKind.DATA
    )
    length = emitter.call(aten.sym_size.int, tokens, 1)
    given = arguments(node)
    new = {name: _again(emitter, read, length) for name, read in reads.items()}
    new |= {name: _seen(emitter, given[name], length) for name in masks}
    assert isinstance(node.target, torch._ops.OpOverload)
    order = [a.name for a in node.target._schema.arguments]
    args = [new.get(name, value) for name, value in zip(order, node.args, strict=False)]
    kwargs = {name: new.get(name, value) for name, value in node.kwargs.items()}
    replaced = emitter.call(node.target, *args, **kwargs)
    replaced.meta.update({k: v for k, v in node.meta.items() if k != "val"})
    node.replace_all_uses_with(replaced)
    gm.graph.erase_node(node)


def _seen(emitter: Emitter, mask: fx.Node, length: fx.Node) -> fx.Node:
    """The first T columns; the trace may have been longer than the cache, so T is said here."""
    sliced = emitter.call(aten.slice.Tensor, mask, len(shape_of(mask)) - 1, 0, length)
    sizes = (*mask.meta["val"].shape[:-1], length.meta["val"])
    with emitter.fake_mode:
        sliced.meta["val"] = mask.meta["val"].new_empty(sizes)
    return sliced


def _again(emitter: Emitter, read: _Read, length: fx.Node) -> fx.Node:
    """The same steps from what was written; sizes of the cache become T."""
    new = read.value
    if shape_of(new) != read.rows:
        at = read.dims[0]
        shape = [*read.rows[:at], length, *read.rows[at + 1 :]]
        new = emitter.call(aten.reshape.default, new, shape)
    for step, dim in zip(read.steps, read.dims[1:], strict=True):
        given = arguments(step)
        for name in ("size", "shape"):
            if name in given:
                given[name] = [*given[name][:dim], length, *given[name][dim + 1 :]]
        rest = {k: v for k, v in given.items() if k != "self"}
        new = emitter.call(step.target, new, **rest)  # type: ignore[arg-type]
    return new


def _dims(dim: int, steps: tuple[fx.Node, ...]) -> tuple[int, ...] | None:
    """Where the rows lie before and after each step; None where that is not certain."""
    dims = [dim]
    for step in steps:
        moved = _moved(step, dims[-1])
        if moved is None:
            return None
        dims.append(moved)
    return tuple(dims)


def _moved(step: fx.Node, dim: int) -> int | None:
    given = arguments(step)
    before, after = shape_of(step.all_input_nodes[0]), shape_of(step)
    rank = len(before)
    if step.target is aten.transpose.int:
        a, b = given["dim0"] % rank, given["dim1"] % rank
        return int({a: b, b: a}.get(dim, dim))
    if step.target is aten.permute.default:
        return next(i for i, d in enumerate(given["dims"]) if d % rank == dim)
    if step.target is aten.unsqueeze.default:
        return dim + int(given["dim"] % (rank + 1) <= dim)
    behind = rank - dim  # the rows and what stands behind them, or before them, stays as it is
    if behind <= len(after) and before[dim:] == after[len(after) - behind :]:
        return len(after) - behind
    return dim if before[: dim + 1] == after[: dim + 1] else None
